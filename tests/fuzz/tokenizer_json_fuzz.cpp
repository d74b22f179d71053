// tokenizer.json from anywhere: refused with a FormatError, or a tokenizer that takes any text.
#include <cstdint>
#include <string_view>

#include "ferry/base/error.h"
#include "ferry/text/tokenizer_backend.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace ferry::text;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const auto backend = TokenizerBackend::from_json(JsonView::parse(text, "input"));
    for (const char* prompt :
         {"", "Hello, World!  low lowest", " \u00e9e\u0301 \u65e5\u672c 12 <s>a</s>\n"}) {
      const auto ids = backend.post_processor.process(backend.tokenize(prompt, false));
      backend.decode(ids, true);
    }
  } catch (const ferry::FormatError&) {
  } catch (const ferry::ArgumentError&) {  // no token for a character, and no unknown token
  }
  return 0;
}
