// Pre-tokenizers: cut the normalized text into the pieces that the model sees one by one.
#pragma once

#include <memory>
#include <vector>

#include "ferry/text/json_view.h"
#include "ferry/text/piece.h"

namespace ferry::text {

enum class PrependScheme { always, first, never };

// Immutable and thread-safe. Ported from the classes of the same names in the Rust crate
// `tokenizers` (0.23).
class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  // The parts of one piece; empty ones are dropped by the caller.
  virtual std::vector<Piece> split(Piece piece) const = 0;

  // Reads a "pre_tokenizer" section of tokenizer.json. Throws FormatError for an unknown type.
  static std::shared_ptr<const PreTokenizer> from_json(const JsonView& json);

  static std::shared_ptr<const PreTokenizer> sequence(
      std::vector<std::shared_ptr<const PreTokenizer>> steps);
  static std::shared_ptr<const PreTokenizer> split_at(std::shared_ptr<const Pattern> pattern,
                                                      SplitBehavior behavior, bool invert);
  static std::shared_ptr<const PreTokenizer> byte_level(bool add_prefix_space, bool use_regex);
  static std::shared_ptr<const PreTokenizer> whitespace_split();
  static std::shared_ptr<const PreTokenizer> metaspace(char32_t replacement, PrependScheme scheme,
                                                       bool split);
};

// Metaspace's "prepend_scheme", with the older "add_prefix_space". Throws FormatError.
PrependScheme prepend_scheme_from_json(const JsonView& json);

// Applies `pre_tokenizer` (or nothing) to the pieces that are no added tokens.
std::vector<Piece> pre_tokenize(const PreTokenizer* pre_tokenizer, std::vector<Piece> pieces);

}  // namespace ferry::text
