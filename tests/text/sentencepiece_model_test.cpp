#include "ferry/text/sentencepiece_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <string>

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"
#include "ferry/text/tokenizer.h"
#include "folder.h"

namespace ferry::text {
namespace {

using testing::HasSubstr;

// Protobuf by hand, of parts short enough for lengths of one byte.
std::string bytes_field(int number, const std::string& content) {
  return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(content.size())} +
         content;
}
std::string number_field(int number, char value) {
  return std::string{static_cast<char>(number << 3), value};
}
std::string piece(const std::string& text, float score, char type) {
  std::string raw(4, '\0');
  std::memcpy(raw.data(), &score, 4);
  return bytes_field(
      1, bytes_field(1, text) + std::string(1, 2 << 3 | 5) + raw + number_field(3, type));
}

TEST(SentencePieceModel, ReadsPiecesAndSpecs) {
  const std::string unk_id("\xC0\x02\x02", 3);  // field 40: 2
  const auto model = SentencePieceModel::parse(
      piece("<pad>", 0, 3) + piece("▁a", -2.5f, 1) + bytes_field(2, number_field(3, 1) + unk_id) +
          bytes_field(3, bytes_field(2, "map")) + bytes_field(9, "unknown field"),
      "test");
  ASSERT_EQ(model.pieces.size(), 2u);
  EXPECT_EQ(model.pieces[0].type, SentencePieceModel::Type::control);
  EXPECT_EQ(model.pieces[1].piece, "▁a");
  EXPECT_EQ(model.pieces[1].score, -2.5f);
  EXPECT_EQ(model.kind, SentencePieceModel::Kind::unigram);
  EXPECT_EQ(model.unk_id, 2);
  EXPECT_EQ(model.precompiled_charsmap, "map");
}

TEST(SentencePieceModel, RefusesOtherBytes) {
  const std::string cases[] = {
      "",
      std::string(100, '\0'),
      "{\"model\": 1}",
      std::string("\x0A\x7F", 2) + "short",
      std::string(20, '\xFF'),
      piece("a", 0, 9),
      bytes_field(2, number_field(3, 7)),
      number_field(1, 1),
      bytes_field(3, number_field(2, 1)),
  };
  for (const std::string& bytes : cases) {
    try {
      SentencePieceModel::parse(bytes, "some.model");
      ADD_FAILURE() << testing::PrintToString(bytes);
    } catch (const FormatError& e) {
      EXPECT_THAT(e.what(), HasSubstr("some.model"));
    }
  }
}

// Cut anywhere, a model is refused or is one with fewer pieces; it never reads past its end.
TEST(SentencePieceModel, CutShort) {
  const std::string whole = io::read_text_file(FERRY_FIXTURES "/tokenizers/t5-spiece/spiece.model");
  const size_t pieces = SentencePieceModel::parse(whole, "whole").pieces.size();
  for (size_t size = 0; size < whole.size(); size += 1 + size / 300) {
    try {
      EXPECT_LE(SentencePieceModel::parse(std::string(whole, 0, size), "cut").pieces.size(),
                pieces);
    } catch (const FormatError&) {
    }
  }
}

TEST(SentencePieceModel, ATokenizerNamesTheFile) {
  const std::pair<std::string, const char*> cases[] = {
      {"no protobuf", "spiece.model"},
      {piece("a", 0, 1) + bytes_field(2, number_field(3, 2)), "model_type is 2"},
      {piece("\xFF", 0, 1), "token 0"},
      {piece("a", 0, 1) + piece("b", 0, 1) + piece("c", 0, 2) + bytes_field(3, bytes_field(2, "x")),
       "character map"},
      {piece("a", 0, 1) + piece("b", std::numeric_limits<float>::quiet_NaN(), 1), "token 1"},
  };
  for (const auto& [bytes, part] : cases) {
    Folder folder;
    folder.write("spiece.model", bytes);
    try {
      Tokenizer::from_pretrained(folder.path());
      ADD_FAILURE() << part;
    } catch (const FormatError& e) {
      EXPECT_THAT(e.what(), HasSubstr("spiece.model"));
      EXPECT_THAT(e.what(), HasSubstr(part));
    }
  }
}

}  // namespace
}  // namespace ferry::text
