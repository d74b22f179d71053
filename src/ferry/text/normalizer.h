// Normalizers: the first stage, on the text between added tokens.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "ferry/text/json_view.h"
#include "ferry/text/piece.h"

namespace ferry::text {

// Immutable and thread-safe. Ported from the classes of the same names in the Rust crate
// `tokenizers` (0.23).
class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual void normalize(Piece& piece) const = 0;

  // Reads a "normalizer" section of tokenizer.json. Throws FormatError for an unknown type.
  static std::shared_ptr<const Normalizer> from_json(const JsonView& json);

  static std::shared_ptr<const Normalizer> sequence(
      std::vector<std::shared_ptr<const Normalizer>> steps);
  static std::shared_ptr<const Normalizer> unicode(NormalForm form);
  static std::shared_ptr<const Normalizer> lowercase();
  static std::shared_ptr<const Normalizer> replace(std::shared_ptr<const Pattern> pattern,
                                                   std::string content);
  // `charsmap`: the blob of a sentencepiece model.
  static std::shared_ptr<const Normalizer> precompiled(std::string_view charsmap);
};

// The pattern of a Replace or Split: {"String": "..."} or {"Regex": "..."}.
std::shared_ptr<const Pattern> pattern_from_json(const JsonView& json);

}  // namespace ferry::text
