// Decoders: tokens back to text, for messages.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ferry/text/json_view.h"
#include "ferry/text/pre_tokenizer.h"

namespace ferry::text {

// Immutable and thread-safe. Ported from the classes of the same names in the Rust crate
// `tokenizers` (0.23). A chain of decoders maps lists of tokens; the text is the last list, joined.
class Decoder {
 public:
  virtual ~Decoder() = default;
  virtual std::vector<std::string> decode(std::vector<std::string> tokens) const = 0;

  // Reads a "decoder" section of tokenizer.json. Throws FormatError for an unknown type.
  static std::shared_ptr<const Decoder> from_json(const JsonView& json);

  static std::shared_ptr<const Decoder> byte_level();
  static std::shared_ptr<const Decoder> metaspace(char32_t replacement, PrependScheme scheme);
};

}  // namespace ferry::text
