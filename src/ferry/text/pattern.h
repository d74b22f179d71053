// The patterns of tokenizer.json: plain strings and regular expressions in Oniguruma's syntax.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ferry::text {

// A part of a text in bytes, and whether the pattern matched it. The spans that a pattern finds are
// in order and cover the text.
struct Span {
  size_t begin = 0;
  size_t end = 0;
  bool matched = false;
};

// Immutable; find() may be called from several threads.
class Pattern {
 public:
  virtual ~Pattern() = default;
  virtual std::vector<Span> find(std::string_view text) const = 0;

  static std::shared_ptr<const Pattern> literal(std::string text);
  // Oniguruma's syntax, run by ICU: \s, \w and \h are given Oniguruma's meaning, ^ and $ match at
  // lines. Throws FormatError if ICU does not take the expression.
  static std::shared_ptr<const Pattern> regex(std::string_view expression);
  // Each code point for which `test` holds is one match.
  static std::shared_ptr<const Pattern> code_points(std::function<bool(char32_t)> test);
};

// What becomes of the matches when a text is split.
enum class SplitBehavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

// The spans that remain after `behavior`; empty ones included. `invert` swaps matched and
// unmatched.
std::vector<Span> split_spans(std::vector<Span> spans, SplitBehavior behavior, bool invert);

}  // namespace ferry::text
