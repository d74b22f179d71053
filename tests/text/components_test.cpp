// Each stage against Hugging Face's tokenizers 0.23; make_fixtures.py writes the expected values.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "ferry/io/json_file.h"
#include "ferry/text/byte_level.h"
#include "ferry/text/tokenizer_backend.h"

namespace ferry::text {
namespace {

using nlohmann::json;

const json& fixture() {
  static const json loaded =
      json::parse(io::read_text_file(FERRY_TEXT_FIXTURES "/components.json"));
  return loaded;
}

JsonView view(const json& config) {
  return JsonView::parse(config.dump(), "components.json");
}

TEST(Components, Normalizers) {
  const auto texts = fixture()["texts"].get<std::vector<std::string>>();
  ASSERT_GE(fixture()["normalizers"].size(), 18u);
  for (const json& entry : fixture()["normalizers"]) {
    const auto normalizer = Normalizer::from_json(view(entry["config"]));
    for (size_t i = 0; i < texts.size(); ++i) {
      Piece piece(texts[i]);
      normalizer->normalize(piece);
      EXPECT_EQ(piece.text(), entry["expected"][i].get<std::string>())
          << entry["config"] << " on " << json(texts[i]);
    }
  }
}

TEST(Components, PreTokenizers) {
  const auto texts = fixture()["texts"].get<std::vector<std::string>>();
  ASSERT_GE(fixture()["pre_tokenizers"].size(), 25u);
  for (const json& entry : fixture()["pre_tokenizers"]) {
    const auto pre_tokenizer = PreTokenizer::from_json(view(entry["config"]));
    for (size_t i = 0; i < texts.size(); ++i) {
      if (texts[i].empty()) continue;  // no piece to split
      std::vector<std::string> pieces;
      std::vector<Piece> input(1, Piece(texts[i]));
      for (const Piece& piece : pre_tokenize(pre_tokenizer.get(), std::move(input))) {
        pieces.push_back(piece.text());
      }
      EXPECT_EQ(pieces, entry["expected"][i].get<std::vector<std::string>>())
          << entry["config"] << " on " << json(texts[i]);
    }
  }
}

TEST(Components, Decoders) {
  const auto lists = fixture()["tokens"].get<std::vector<std::vector<std::string>>>();
  ASSERT_GE(fixture()["decoders"].size(), 11u);
  for (const json& entry : fixture()["decoders"]) {
    const auto decoder = Decoder::from_json(view(entry["config"]));
    for (size_t i = 0; i < lists.size(); ++i) {
      std::string text;
      for (const std::string& part : decoder->decode(lists[i])) text += part;
      EXPECT_EQ(text, entry["expected"][i].get<std::string>()) << entry["config"] << " list " << i;
    }
  }
}

TEST(Components, WholeTokenizers) {
  const auto texts = fixture()["texts"].get<std::vector<std::string>>();
  ASSERT_GE(fixture()["tokenizers"].size(), 10u);
  for (const json& entry : fixture()["tokenizers"]) {
    const auto backend = TokenizerBackend::from_json(view(entry["tokenizer"]));
    for (size_t i = 0; i < texts.size(); ++i) {
      const auto ids = backend.post_processor.process(backend.tokenize(texts[i], false));
      EXPECT_EQ(ids, entry["ids"][i].get<std::vector<uint32_t>>())
          << entry["name"] << " on " << json(texts[i]);
      if (ids.empty()) continue;
      EXPECT_EQ(backend.decode(ids, false), entry["decoded"][i].get<std::string>())
          << entry["name"] << " on " << json(texts[i]);
      EXPECT_EQ(backend.decode(ids, true), entry["decoded_without_special"][i].get<std::string>())
          << entry["name"] << " on " << json(texts[i]);
    }
  }
}

// sentencepiece's published example: the best sum of scores, unknown characters in one token.
TEST(Components, UnigramFindsTheBestPath) {
  const auto model = TokenModel::from_json(JsonView::parse(R"({"type": "Unigram", "unk_id": 0,
      "vocab": [["<unk>", 0.0], ["a", 0.0], ["b", 0.0], ["c", 0.0], ["d", 0.0], ["cd", 1.0],
                ["ab", 2.0], ["abc", 5.0], ["abcd", 10.0]]})",
                                                           "inline"));
  std::vector<uint32_t> ids;
  model->tokenize("abcdacdxx", ids);
  EXPECT_EQ(ids, (std::vector<uint32_t>{8, 1, 5, 0}));
}

TEST(Components, ByteAlphabetIsReversible) {
  std::string all;
  std::string mapped;
  for (int byte = 0; byte < 256; ++byte) {
    all += static_cast<char>(byte);
    append_utf8(mapped, byte_to_character(static_cast<uint8_t>(byte)));
  }
  EXPECT_EQ(characters_to_bytes(mapped), all);
  EXPECT_EQ(byte_to_character(' '), U'\u0120');
  EXPECT_EQ(byte_to_character(0xAD), U'\u0143');
  EXPECT_EQ(characters_to_bytes("日"), std::nullopt);
}

}  // namespace
}  // namespace ferry::text
