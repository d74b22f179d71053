// The file of a sentencepiece model (`spiece.model`).
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace ferry::text {

// What a tokenizer needs of sentencepiece's ModelProto. Read without libsentencepiece: the ids have
// to be Hugging Face's, whose normalization and search differ from that library's, so that only the
// pieces and the character map are of use; and protobuf stays out of the process.
struct SentencePieceModel {
  enum class Type : uint8_t { normal = 1, unknown, control, user_defined, unused, byte };
  enum class Kind : uint8_t { unigram = 1, bpe, word, character };
  struct Entry {
    std::string piece;
    float score = 0;
    Type type = Type::normal;
  };
  std::vector<Entry> pieces;  // a piece's id is its position
  Kind kind = Kind::unigram;
  int32_t unk_id = 0;
  bool byte_fallback = false;
  std::string precompiled_charsmap;  // empty: the text is not normalized

  // Throws FormatError, naming `name` and the byte, for what is no ModelProto.
  static SentencePieceModel parse(std::string_view bytes, std::string_view name);
  static SentencePieceModel read(const std::filesystem::path& path);
};

}  // namespace ferry::text
