// Any text through stages of each kind. What is no UTF-8 is refused; bytes come back as they were.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "ferry/base/error.h"
#include "ferry/text/byte_level.h"
#include "ferry/text/tokenizer_backend.h"

namespace {

using namespace ferry::text;

// Bytes as tokens, so that nothing is lost.
std::string byte_vocabulary() {
  std::string vocabulary = "{";
  for (int byte = 0; byte < 256; ++byte) {
    vocabulary += byte > 0 ? ", \"" : "\"";
    const char32_t c = byte_to_character(static_cast<uint8_t>(byte));
    if (c == '"' || c == '\\') vocabulary += '\\';
    append_utf8(vocabulary, c);
    vocabulary += "\": " + std::to_string(byte);
  }
  return vocabulary + "}";
}

TokenizerBackend make(const std::string& stages) {
  return TokenizerBackend::from_json(JsonView::parse(
      R"({"decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "merges": [], "vocab": )" +
          byte_vocabulary() + "}" + stages + "}",
      "stages"));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const TokenizerBackend lossless =
      make(R"(, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false})");
  static const TokenizerBackend everything = make(
      R"(, "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "StripAccents"},
         {"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
         {"type": "Strip", "strip_left": true, "strip_right": true}, {"type": "NFKC"}]},
         "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"},
         {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"},
         {"type": "Digits", "individual_digits": false}, {"type": "ByteLevel", "add_prefix_space": true}]},
         "added_tokens": [{"id": 0, "content": "ab", "lstrip": true, "rstrip": true, "normalized": true},
         {"id": 0, "content": "<s>", "single_word": true, "special": true, "normalized": false}])");
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    check_utf8(text, "input");
  } catch (const ferry::ArgumentError&) {
    return 0;
  }
  if (lossless.decode(lossless.tokenize(text, false), false) != text) std::abort();
  everything.decode(everything.tokenize(text, false), false);
  return 0;
}
