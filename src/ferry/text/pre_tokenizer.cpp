#include "ferry/text/pre_tokenizer.h"

#include <string>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/text/byte_level.h"
#include "ferry/text/normalizer.h"

namespace ferry::text {
namespace {

using PreTokenizerPtr = std::shared_ptr<const PreTokenizer>;

constexpr std::string_view kGpt2Regex =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

template <class Function>
class Step final : public PreTokenizer {
 public:
  explicit Step(Function function) : function_(std::move(function)) {}
  std::vector<Piece> split(Piece piece) const override { return function_(std::move(piece)); }

 private:
  Function function_;
};

template <class Function>
PreTokenizerPtr step(Function function) {
  return std::make_shared<Step<Function>>(std::move(function));
}

PreTokenizerPtr split_at_code_points(std::function<bool(char32_t)> test, SplitBehavior behavior) {
  return PreTokenizer::split_at(Pattern::code_points(std::move(test)), behavior, false);
}

// Runs of word characters and runs of what is neither word nor blank: \w+|[^\w\s]+
std::vector<Piece> split_words(const Piece& piece) {
  enum class Kind { word, other, blank };
  const auto kind_of = [](char32_t c) {
    return is_word(c) ? Kind::word : is_whitespace(c) ? Kind::blank : Kind::other;
  };
  std::vector<Span> spans;
  Kind previous = Kind::blank;
  const std::string& text = piece.text();
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const Kind kind = kind_of(next_code_point(text, at));
    if (kind != Kind::blank) {
      if (kind == previous) {
        spans.back().end = at;
      } else {
        spans.push_back({begin, at, true});
      }
    }
    previous = kind;
  }
  return piece.slices(spans);
}

SplitBehavior behavior_from_json(const JsonView& json) {
  const std::string name = json.string();
  if (name == "Removed") return SplitBehavior::removed;
  if (name == "Isolated") return SplitBehavior::isolated;
  if (name == "MergedWithPrevious") return SplitBehavior::merged_with_previous;
  if (name == "MergedWithNext") return SplitBehavior::merged_with_next;
  if (name == "Contiguous") return SplitBehavior::contiguous;
  json.fail(fmt::format("'{}' is not a behaviour of a split", name));
}

PreTokenizerPtr sequence_from_json(const JsonView& json) {
  std::vector<PreTokenizerPtr> steps;
  for (const JsonView& element : json.at("pretokenizers").elements()) {
    steps.push_back(PreTokenizer::from_json(element));
  }
  return PreTokenizer::sequence(std::move(steps));
}

PreTokenizerPtr fixed_length(size_t length) {
  return step([length](const Piece& piece) {
    std::vector<Span> spans;
    const std::string& text = piece.text();
    for (size_t at = 0; at < text.size();) {
      const size_t begin = at;
      for (size_t i = 0; i < length && at < text.size(); ++i) next_code_point(text, at);
      spans.push_back({begin, at, true});
    }
    return piece.slices(spans);
  });
}

}  // namespace

PreTokenizerPtr PreTokenizer::sequence(std::vector<PreTokenizerPtr> steps) {
  return step([steps = std::move(steps)](Piece piece) {
    std::vector<Piece> pieces;
    pieces.push_back(std::move(piece));
    for (const PreTokenizerPtr& next : steps) pieces = pre_tokenize(next.get(), std::move(pieces));
    return pieces;
  });
}

PreTokenizerPtr PreTokenizer::split_at(std::shared_ptr<const Pattern> pattern,
                                       SplitBehavior behavior, bool invert) {
  return step([pattern = std::move(pattern), behavior, invert](const Piece& piece) {
    return piece.slices(split_spans(pattern->find(piece.text()), behavior, invert));
  });
}

PreTokenizerPtr PreTokenizer::byte_level(bool add_prefix_space, bool use_regex) {
  auto pattern = use_regex ? Pattern::regex(kGpt2Regex) : nullptr;
  return step([add_prefix_space, pattern = std::move(pattern)](Piece piece) {
    if (add_prefix_space && !piece.text().starts_with(' ')) piece.prepend(" ");
    std::vector<Piece> pieces;
    if (pattern) {
      pieces = piece.slices(pattern->find(piece.text()));
    } else {
      pieces.push_back(std::move(piece));
    }
    for (Piece& part : pieces) map_bytes_to_characters(part);
    return pieces;
  });
}

PreTokenizerPtr PreTokenizer::whitespace_split() {
  return split_at_code_points(is_whitespace, SplitBehavior::removed);
}

PreTokenizerPtr PreTokenizer::metaspace(char32_t replacement, PrependScheme scheme, bool split) {
  std::string mark;
  append_utf8(mark, replacement);
  return step([mark, scheme, split, space = Pattern::literal(" "),
               delimiter = Pattern::literal(mark)](Piece piece) {
    piece.replace(*space, mark);
    const bool prepends =
        scheme == PrependScheme::always || (scheme == PrependScheme::first && piece.start() == 0);
    if (prepends && !piece.text().starts_with(mark)) piece.prepend(mark);
    if (!split) return std::vector<Piece>{std::move(piece)};
    return piece.slices(
        split_spans(delimiter->find(piece.text()), SplitBehavior::merged_with_next, false));
  });
}

PrependScheme prepend_scheme_from_json(const JsonView& json) {
  PrependScheme scheme = PrependScheme::always;
  if (const auto value = json.find("prepend_scheme")) {
    const std::string name = value->string();
    if (name == "first") {
      scheme = PrependScheme::first;
    } else if (name == "never") {
      scheme = PrependScheme::never;
    } else if (name != "always") {
      value->fail(fmt::format("got '{}', expected always, first or never", name));
    }
  }
  if (!json.boolean_or("add_prefix_space", true)) return PrependScheme::never;
  return scheme;
}

PreTokenizerPtr PreTokenizer::from_json(const JsonView& json) {
  const std::string type = json.at("type").string();
  if (type == "Sequence") return sequence_from_json(json);
  if (type == "Split") {
    return split_at(pattern_from_json(json.at("pattern")), behavior_from_json(json.at("behavior")),
                    json.at("invert").boolean());
  }
  if (type == "ByteLevel") {
    return byte_level(json.at("add_prefix_space").boolean(), json.boolean_or("use_regex", true));
  }
  if (type == "Metaspace") {
    return metaspace(json.at("replacement").character(), prepend_scheme_from_json(json),
                     json.boolean_or("split", true));
  }
  if (type == "Whitespace") return step(split_words);
  if (type == "WhitespaceSplit") return whitespace_split();
  if (type == "Punctuation") {
    const auto behavior = json.find("behavior");
    return split_at_code_points(is_punctuation,
                                behavior ? behavior_from_json(*behavior) : SplitBehavior::isolated);
  }
  if (type == "Digits") {
    return split_at_code_points(is_numeric, json.at("individual_digits").boolean()
                                                ? SplitBehavior::isolated
                                                : SplitBehavior::contiguous);
  }
  if (type == "BertPreTokenizer") {
    return sequence(
        {whitespace_split(), split_at_code_points(is_punctuation, SplitBehavior::isolated)});
  }
  if (type == "CharDelimiterSplit") {
    return split_at_code_points(
        [d = json.at("delimiter").character()](char32_t c) { return c == d; },
        SplitBehavior::removed);
  }
  if (type == "FixedLength") {
    const auto length = json.find("length");
    const uint32_t count = length ? length->id() : 5;
    if (count == 0) json.at("length").fail("got 0, expected at least 1");
    return fixed_length(count);
  }
  json.at("type").fail(fmt::format("'{}' is not a pre-tokenizer that ferry knows", type));
}

std::vector<Piece> pre_tokenize(const PreTokenizer* pre_tokenizer, std::vector<Piece> pieces) {
  if (pre_tokenizer == nullptr) return pieces;
  std::vector<Piece> out;
  out.reserve(pieces.size());
  for (Piece& piece : pieces) {
    if (piece.added_token >= 0) {
      out.push_back(std::move(piece));
      continue;
    }
    for (Piece& part : pre_tokenizer->split(std::move(piece))) {
      if (!part.empty()) out.push_back(std::move(part));
    }
  }
  return out;
}

}  // namespace ferry::text
