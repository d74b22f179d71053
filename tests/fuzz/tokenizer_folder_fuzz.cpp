// A tokenizer's folder from anywhere: vocab.json, merges.txt, tokenizer_config.json,
// special_tokens_map.json and added_tokens.json, in this order, each ended by a byte 0xff; an empty
// one is not there. Refused, or a tokenizer that takes any text.
#include <array>
#include <cstdint>
#include <string_view>

#include "ferry/base/error.h"
#include "ferry/text/tokenizer.h"
#include "scratch_folder.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace ferry;
  static const fuzz::ScratchFolder folder("tokenizer");
  constexpr std::array kFiles = {"vocab.json", "merges.txt", "tokenizer_config.json",
                                 "special_tokens_map.json", "added_tokens.json"};
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  for (const char* file : kFiles) {
    size_t end = std::min(rest.find('\xff'), rest.size());
    std::string_view bytes = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (bytes.empty()) {
      std::filesystem::remove(folder.path() / file);
    } else {
      folder.write(file, bytes);
    }
  }
  try {
    auto tokenizer = text::Tokenizer::from_pretrained(folder.path());
    for (const char* prompt :
         {"", "a red circle", " Caf\u00e9 \u65e5\u672c <|endoftext|>  low\n"}) {
      auto ids = tokenizer->encode(prompt, {.max_length = 16, .truncation = true}).ids;
      tokenizer->decode(ids, true);
      tokenizer->decode(tokenizer->encode(prompt).ids);
    }
  } catch (const FormatError&) {
  } catch (const IoError&) {        // a file that the class needs is not there
  } catch (const ArgumentError&) {  // no token for a character, and no unknown token
  }
  return 0;
}
