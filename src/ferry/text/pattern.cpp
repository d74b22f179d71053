#include "ferry/text/pattern.h"

#include <unicode/regex.h>
#include <unicode/utf16.h>

#include <algorithm>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/text/unicode.h"
#include "ferry/text/unicode_versions.h"

namespace ferry::text {
namespace {

// More than any sane expression needs on a text of megabytes, and a bound on what a bad one takes.
constexpr int32_t kRegexStackBytes = 256 << 20;
// Of one match, in ICU's steps of about a millisecond: an expression from a file may backtrack
// exponentially.
constexpr int32_t kRegexTimeLimit = 10'000;

class Literal final : public Pattern {
 public:
  explicit Literal(std::string text) : text_(std::move(text)) {}

  std::vector<Span> find(std::string_view text) const override {
    std::vector<Span> spans;
    size_t done = 0;
    for (size_t at; (at = text.find(text_, done)) != std::string_view::npos;) {
      if (at > done) spans.push_back({done, at, false});
      done = at + text_.size();
      spans.push_back({at, done, true});
    }
    if (done < text.size() || spans.empty()) spans.push_back({done, text.size(), false});
    return spans;
  }

 private:
  std::string text_;
};

class CodePoints final : public Pattern {
 public:
  explicit CodePoints(std::function<bool(char32_t)> test) : test_(std::move(test)) {}

  std::vector<Span> find(std::string_view text) const override {
    std::vector<Span> spans;
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
      const size_t begin = at;
      if (!test_(next_code_point(text, at))) continue;
      if (begin > done) spans.push_back({done, begin, false});
      spans.push_back({begin, at, true});
      done = at;
    }
    if (done < text.size() || spans.empty()) spans.push_back({done, text.size(), false});
    return spans;
  }

 private:
  std::function<bool(char32_t)> test_;
};

// A class such as \p{L}, with the members that ICU lacks.
std::string property_set(std::string_view name, bool negated) {
  if (name.starts_with('^')) {
    name.remove_prefix(1);
    negated = !negated;
  }
  return fmt::format(R"([{}\p{{{}}}{}])", negated ? "^" : "", name, category_additions(name));
}

// The inside of a set for \w: ICU's has other marks, and Oniguruma's some numbers of Latin-1.
std::string word_set() {
  return R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u00B2\u00B3\u00B9\u00BC-\u00BE)" +
         category_additions("L") + category_additions("M") + category_additions("Nd");
}

// Rewrites what the two engines read differently. ICU's \s lacks U+000B and U+0085, its \h is a
// blank where Oniguruma's is a hexadecimal digit, and its Unicode is older.
std::string to_icu_syntax(std::string_view expression) {
  std::string out;
  for (size_t i = 0; i < expression.size(); ++i) {
    if (expression[i] != '\\' || i + 1 == expression.size()) {
      out += expression[i];
      continue;
    }
    const char escaped = expression[++i];
    if (escaped == 's') {
      out += R"(\p{White_Space})";
    } else if (escaped == 'S') {
      out += R"(\P{White_Space})";
    } else if (escaped == 'w') {
      out += "[" + word_set() + "]";
    } else if (escaped == 'W') {
      out += "[^" + word_set() + "]";
    } else if (escaped == 'd' || escaped == 'D') {
      out += property_set("Nd", escaped == 'D');
    } else if (escaped == 'b') {  // ICU's \b has other word characters than its \w
      out += fmt::format("(?:(?<=[{0}])(?![{0}])|(?<![{0}])(?=[{0}]))", word_set());
    } else if (escaped == 'B') {
      out += fmt::format("(?:(?<=[{0}])(?=[{0}])|(?<![{0}])(?![{0}]))", word_set());
    } else if (escaped == 'h') {
      out += "[0-9A-Fa-f]";
    } else if (escaped == 'H') {
      out += "[^0-9A-Fa-f]";
    } else if ((escaped == 'p' || escaped == 'P') && expression.substr(i + 1).starts_with('{')) {
      const size_t close = std::min(expression.find('}', i), expression.size());
      out += property_set(expression.substr(i + 2, close - i - 2), escaped == 'P');
      i = close;
    } else {
      out += {'\\', escaped};
    }
  }
  return out;
}

class Regex final : public Pattern {
 public:
  explicit Regex(std::string_view expression) {
    UErrorCode status = U_ZERO_ERROR;
    UParseError where;
    const std::string translated = to_icu_syntax(expression);
    pattern_.reset(icu::RegexPattern::compile(icu::UnicodeString::fromUTF8(translated),
                                              UREGEX_MULTILINE | UREGEX_UNIX_LINES, where, status));
    if (U_FAILURE(status)) {
      throw_error<FormatError>("regular expression '{}': {} at character {}", expression,
                               u_errorName(status), where.offset);
    }
  }

  std::vector<Span> find(std::string_view text) const override {
    if (text.empty()) return {{0, 0, false}};
    std::vector<Span> spans;
    const auto wide = icu::UnicodeString::fromUTF8(
        icu::StringPiece(text.data(), static_cast<int32_t>(text.size())));
    UErrorCode status = U_ZERO_ERROR;
    std::unique_ptr<icu::RegexMatcher> matcher(pattern_->matcher(wide, status));
    if (U_SUCCESS(status)) matcher->setStackLimit(kRegexStackBytes, status);
    if (U_SUCCESS(status)) matcher->setTimeLimit(kRegexTimeLimit, status);

    // Matches come in order, so one walk turns UTF-16 positions into bytes.
    int32_t walked = 0;
    size_t bytes = 0;
    const auto bytes_at = [&](int32_t position) {
      while (walked < position) {
        UChar32 c;
        U16_NEXT(wide.getBuffer(), walked, wide.length(), c);
        bytes += utf8_length(static_cast<char32_t>(c));
      }
      return bytes;
    };
    size_t done = 0;
    bool any = false;
    while (U_SUCCESS(status) && matcher->find(status) && U_SUCCESS(status)) {
      const size_t begin = bytes_at(matcher->start(status));
      const size_t end = bytes_at(matcher->end(status));
      if (begin == end && any && begin == done) continue;  // as Oniguruma's iterator
      if (begin > done) spans.push_back({done, begin, false});
      spans.push_back({begin, end, true});
      done = end;
      any = true;
    }
    if (U_FAILURE(status)) {
      throw_error<ArgumentError>(
          "the tokenizer's regular expression failed on a text of {} bytes: {}", text.size(),
          u_errorName(status));
    }
    if (done < text.size()) spans.push_back({done, text.size(), false});
    return spans;
  }

 private:
  std::unique_ptr<const icu::RegexPattern> pattern_;
};

}  // namespace

std::shared_ptr<const Pattern> Pattern::literal(std::string text) {
  if (text.empty()) throw_error<FormatError>("a pattern that is an empty string");
  return std::make_shared<Literal>(std::move(text));
}

std::shared_ptr<const Pattern> Pattern::regex(std::string_view expression) {
  return std::make_shared<Regex>(expression);
}

std::shared_ptr<const Pattern> Pattern::code_points(std::function<bool(char32_t)> test) {
  return std::make_shared<CodePoints>(std::move(test));
}

std::vector<Span> split_spans(std::vector<Span> spans, SplitBehavior behavior, bool invert) {
  if (invert) {
    for (Span& span : spans) span.matched = !span.matched;
  }
  switch (behavior) {
    case SplitBehavior::isolated:
      return spans;
    case SplitBehavior::removed:
      std::erase_if(spans, [](const Span& span) { return span.matched; });
      return spans;
    default:
      break;
  }
  const bool backwards = behavior == SplitBehavior::merged_with_next;
  if (backwards) std::reverse(spans.begin(), spans.end());
  std::vector<Span> out;
  bool previous = false;
  for (const Span& span : spans) {
    const bool merge = behavior == SplitBehavior::contiguous ? span.matched == previous
                                                             : span.matched && !previous;
    if (merge && !out.empty()) {
      (backwards ? out.back().begin : out.back().end) = backwards ? span.begin : span.end;
    } else {
      out.push_back(span);
    }
    previous = span.matched;
  }
  if (backwards) std::reverse(out.begin(), out.end());
  return out;
}

}  // namespace ferry::text
