// A part of the input on its way through normalizers and pre-tokenizers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/text/pattern.h"
#include "ferry/text/unicode.h"

namespace ferry::text {

// One code point of a transformed text. `change` is 0 if it stands for the next code point of the
// text before, 1 if it is inserted, and -n if it stands for the next one and n more are dropped.
struct Change {
  char32_t code_point;
  int change = 0;
};

// Text that remembers for each byte where in the input it came from, since Metaspace's scheme
// "first" asks whether a piece starts the input. Keeps the bookkeeping of the Rust crate's
// NormalizedString, start offsets only.
class Piece {
 public:
  Piece() = default;
  // The whole input: every byte is its own origin.
  explicit Piece(std::string text);

  const std::string& text() const { return text_; }
  bool empty() const { return text_.empty(); }
  // The offset in the input at which this piece was cut out.
  size_t start() const { return start_; }

  Piece slice(size_t begin, size_t end) const;
  // Replaces the text; `dropped` code points at the start are gone.
  void transform(const std::vector<Change>& changes, size_t dropped = 0);
  void replace(const Pattern& pattern, std::string_view content);
  void prepend(std::string_view prefix);
  void strip(bool left, bool right);
  void normalize(NormalForm form);
  // Keeps the code points for which `keep` holds.
  template <class Keep>
  void filter(Keep keep) {
    std::vector<Change> changes;
    size_t dropped = 0;
    for (size_t at = 0; at < text_.size();) {
      const char32_t c = next_code_point(text_, at);
      if (keep(c)) {
        changes.push_back({c, 0});
      } else if (changes.empty()) {
        ++dropped;
      } else {
        --changes.back().change;
      }
    }
    transform(changes, dropped);
  }
  // Each code point becomes another one.
  template <class Map>
  void map(Map map) {
    std::vector<Change> changes;
    for (size_t at = 0; at < text_.size();) changes.push_back({map(next_code_point(text_, at)), 0});
    transform(changes);
  }

  // The slices that `spans` name.
  std::vector<Piece> slices(const std::vector<Span>& spans) const;

  // The id of the added token that this piece is, or -1: then it has still to be tokenized.
  int64_t added_token = -1;

 private:
  std::string text_;
  std::vector<uint32_t> origin_;  // one per byte
  size_t start_ = 0;
};

}  // namespace ferry::text
