// spiece.model from anywhere: refused with a FormatError, or a tokenizer that takes any text.
#include <cstdint>
#include <string_view>

#include "ferry/base/error.h"
#include "ferry/text/t5_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace ferry::text;
  try {
    const auto model = SentencePieceModel::parse(
        std::string_view(reinterpret_cast<const char*>(data), size), "input");
    const auto backend = make_t5_backend(t5_vocabulary(model, 3), model.precompiled_charsmap);
    for (const char* prompt :
         {"", "a red circle", " \uff21\u0301 \u65e5\u672c \u2581 <extra_id_0>\r\n"}) {
      backend.decode(backend.tokenize(prompt, false), false);
    }
  } catch (const ferry::FormatError&) {
  }
  return 0;
}
