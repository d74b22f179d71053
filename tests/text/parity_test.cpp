// The ids of the committed tokenizers against transformers' (tests/fixtures/README.md).
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "ferry/text/json_view.h"
#include "ferry/text/tokenize_file.h"
#include "ferry/text/tokenizer.h"
#include "folder.h"

namespace ferry::text {
namespace {

using nlohmann::json;

template <class T>
std::vector<T> lines(const std::filesystem::path& path) {
  std::vector<T> out;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) out.push_back(json::parse(line).get<T>());
  return out;
}

class Parity : public testing::TestWithParam<std::string> {
 protected:
  std::filesystem::path dir() const { return FERRY_FIXTURES "/tokenizers/" + GetParam(); }
};

TEST_P(Parity, IdsAreHuggingFaces) {
  const auto texts = lines<std::string>(dir() / "strings.jsonl");
  const auto expected = lines<std::vector<int64_t>>(dir() / "ids.jsonl");
  const auto cut = lines<std::vector<int64_t>>(dir() / "ids_max16.jsonl");
  ASSERT_GE(texts.size(), 150u);
  ASSERT_EQ(texts.size(), expected.size());
  ASSERT_EQ(texts.size(), cut.size());
  const auto tokenizer = Tokenizer::from_pretrained(dir());
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(tokenizer->encode(texts[i]).ids, expected[i]) << json(texts[i]);
    EXPECT_EQ(tokenizer->encode(texts[i], {.max_length = 16, .truncation = true}).ids, cut[i])
        << json(texts[i]);
  }
}

TEST_P(Parity, TokenizeFileWritesTheSame) {
  const Folder folder;
  const auto output = folder.path() / "out.jsonl";
  tokenize_file(dir(), dir() / "strings.jsonl", output);
  EXPECT_EQ(lines<std::vector<int64_t>>(output), lines<std::vector<int64_t>>(dir() / "ids.jsonl"));
  tokenize_file(dir(), dir() / "strings.jsonl", output, 16);
  EXPECT_EQ(lines<std::vector<int64_t>>(output),
            lines<std::vector<int64_t>>(dir() / "ids_max16.jsonl"));
}

TEST_P(Parity, ASavedTokenizerIsTheSame) {
  const Folder folder;
  Tokenizer::from_pretrained(dir())->save_pretrained(folder.path());
  const auto saved = Tokenizer::from_pretrained(folder.path());
  const auto texts = lines<std::string>(dir() / "strings.jsonl");
  const auto expected = lines<std::vector<int64_t>>(dir() / "ids.jsonl");
  const auto batch = saved->encode(texts, {});
  for (size_t i = 0; i < texts.size(); ++i) EXPECT_EQ(batch[i].ids, expected[i]);
}

INSTANTIATE_TEST_SUITE_P(Fixtures, Parity,
                         testing::Values("clip-files", "clip-json", "t5-spiece", "t5-spiece-bytes",
                                         "t5-json", "t5-json-bytes"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace ferry::text
