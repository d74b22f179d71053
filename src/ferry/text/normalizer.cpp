#include "ferry/text/normalizer.h"

#include <string>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/text/byte_level.h"
#include "ferry/text/charsmap.h"

namespace ferry::text {
namespace {

using NormalizerPtr = std::shared_ptr<const Normalizer>;

// A normalizer that is one function.
template <class Function>
class Step final : public Normalizer {
 public:
  explicit Step(Function function) : function_(std::move(function)) {}
  void normalize(Piece& piece) const override { function_(piece); }

 private:
  Function function_;
};

template <class Function>
NormalizerPtr step(Function function) {
  return std::make_shared<Step<Function>>(std::move(function));
}

void lowercase_piece(Piece& piece) {
  std::vector<Change> changes;
  std::vector<char32_t> lower;
  const std::string& text = piece.text();
  for (size_t at = 0; at < text.size();) {
    lower.clear();
    append_lowercase(lower, next_code_point(text, at));
    for (size_t i = 0; i < lower.size(); ++i) changes.push_back({lower[i], i > 0 ? 1 : 0});
  }
  piece.transform(changes);
}

// The bookkeeping of the Rust crate's Precompiled: what is removed at the very start is not counted
// as dropped, so that the text still counts as starting where it did.
void replace_part(std::vector<Change>& changes, std::string_view part, std::string_view by) {
  const auto old_count = static_cast<int>(count_code_points(part));
  int new_count = 0;
  for (size_t at = 0; at < by.size(); ++new_count) changes.push_back({next_code_point(by, at), 0});
  if (new_count > old_count) {
    for (int i = 0; i < new_count - old_count; ++i) changes[changes.size() - 1 - i].change = 1;
  } else if (new_count < old_count && !changes.empty()) {
    changes.back().change += new_count - old_count;
  }
}

void apply_charsmap(const Charsmap& map, Piece& piece) {
  // Longer graphemes are looked up character by character.
  constexpr size_t kLongestGrapheme = 5;
  const std::string_view text = piece.text();
  std::vector<Change> changes;
  changes.reserve(text.size());
  bool modified = false;
  const std::vector<size_t> boundaries = grapheme_boundaries(text);
  for (size_t i = 0; i + 1 < boundaries.size(); ++i) {
    const auto grapheme = text.substr(boundaries[i], boundaries[i + 1] - boundaries[i]);
    if (grapheme.size() <= kLongestGrapheme) {
      if (const auto replacement = map.transform(grapheme)) {
        replace_part(changes, grapheme, *replacement);
        modified = true;
        continue;
      }
    }
    for (size_t at = 0; at < grapheme.size();) {
      const size_t begin = at;
      const char32_t c = next_code_point(grapheme, at);
      const auto part = grapheme.substr(begin, at - begin);
      if (const auto replacement = map.transform(part)) {
        replace_part(changes, part, *replacement);
        modified = true;
      } else {
        changes.push_back({c, 0});
      }
    }
  }
  if (modified) piece.transform(changes);
}

bool is_nmt_control(char32_t c) {
  return (c >= 0x01 && c <= 0x08) || c == 0x0B || (c >= 0x0E && c <= 0x1F) || c == 0x7F ||
         c == 0x8F || c == 0x9F;
}

char32_t nmt_space(char32_t c) {
  const bool space = c == 0x09 || c == 0x0A || c == 0x0C || c == 0x0D || c == 0x1680 ||
                     (c >= 0x200B && c <= 0x200F) || c == 0x2028 || c == 0x2029 || c == 0x2581 ||
                     c == 0xFEFF || c == 0xFFFD;
  return space ? U' ' : c;
}

struct BertOptions {
  bool clean_text, handle_chinese_chars, strip_accents, lowercase;
};

void normalize_bert(const BertOptions& options, Piece& piece) {
  const auto is_kept_blank = [](char32_t c) { return c == '\t' || c == '\n' || c == '\r'; };
  if (options.clean_text) {
    piece.filter(
        [&](char32_t c) { return c != 0 && c != 0xFFFD && (is_kept_blank(c) || !is_other(c)); });
    piece.map([&](char32_t c) { return is_kept_blank(c) || is_whitespace(c) ? U' ' : c; });
  }
  if (options.handle_chinese_chars) {
    std::vector<Change> changes;
    for (size_t at = 0; at < piece.text().size();) {
      const char32_t c = next_code_point(piece.text(), at);
      if (is_chinese(c)) {
        changes.insert(changes.end(), {{U' ', 0}, {c, 1}, {U' ', 1}});
      } else {
        changes.push_back({c, 0});
      }
    }
    piece.transform(changes);
  }
  if (options.strip_accents) {
    piece.normalize(NormalForm::nfd);
    piece.filter([](char32_t c) { return !is_mark_nonspacing(c); });
  }
  if (options.lowercase) lowercase_piece(piece);
}

NormalizerPtr bert_from_json(const JsonView& json) {
  BertOptions options{};
  options.clean_text = json.at("clean_text").boolean();
  options.handle_chinese_chars = json.at("handle_chinese_chars").boolean();
  options.lowercase = json.at("lowercase").boolean();
  options.strip_accents = json.boolean_or("strip_accents", options.lowercase);
  return step([options](Piece& piece) { normalize_bert(options, piece); });
}

NormalizerPtr sequence_from_json(const JsonView& json) {
  std::vector<NormalizerPtr> steps;
  for (const JsonView& element : json.at("normalizers").elements()) {
    steps.push_back(Normalizer::from_json(element));
  }
  return Normalizer::sequence(std::move(steps));
}

NormalizerPtr precompiled_from_json(const JsonView& json) {
  const auto charsmap = json.find("precompiled_charsmap");
  if (!charsmap) return step([](Piece&) {});
  try {
    return Normalizer::precompiled(decode_base64(charsmap->string()));
  } catch (const FormatError& e) {
    charsmap->fail(e.what());
  }
}

}  // namespace

NormalizerPtr Normalizer::sequence(std::vector<NormalizerPtr> steps) {
  return step([steps = std::move(steps)](Piece& piece) {
    for (const NormalizerPtr& normalizer : steps) normalizer->normalize(piece);
  });
}

NormalizerPtr Normalizer::unicode(NormalForm form) {
  return step([form](Piece& piece) { piece.normalize(form); });
}

NormalizerPtr Normalizer::lowercase() {
  return step(lowercase_piece);
}

NormalizerPtr Normalizer::replace(std::shared_ptr<const Pattern> pattern, std::string content) {
  return step([pattern = std::move(pattern), content = std::move(content)](Piece& piece) {
    piece.replace(*pattern, content);
  });
}

NormalizerPtr Normalizer::precompiled(std::string_view charsmap) {
  return step([map = Charsmap(charsmap)](Piece& piece) { apply_charsmap(map, piece); });
}

NormalizerPtr Normalizer::from_json(const JsonView& json) {
  const std::string type = json.at("type").string();
  if (type == "Sequence") return sequence_from_json(json);
  if (type == "NFC") return unicode(NormalForm::nfc);
  if (type == "NFD") return unicode(NormalForm::nfd);
  if (type == "NFKC") return unicode(NormalForm::nfkc);
  if (type == "NFKD") return unicode(NormalForm::nfkd);
  if (type == "Lowercase") return lowercase();
  if (type == "Replace") {
    return replace(pattern_from_json(json.at("pattern")), json.at("content").string());
  }
  if (type == "Precompiled") return precompiled_from_json(json);
  if (type == "Prepend") {
    return step([prefix = json.at("prepend").string()](Piece& piece) { piece.prepend(prefix); });
  }
  if (type == "Strip") {
    return step([left = json.at("strip_left").boolean(),
                 right = json.at("strip_right").boolean()](Piece& p) { p.strip(left, right); });
  }
  if (type == "StripAccents") {
    return step([](Piece& piece) { piece.filter([](char32_t c) { return !is_mark(c); }); });
  }
  if (type == "BertNormalizer") return bert_from_json(json);
  if (type == "Nmt") {
    return step([](Piece& piece) {
      piece.filter([](char32_t c) { return !is_nmt_control(c); });
      piece.map(nmt_space);
    });
  }
  if (type == "ByteLevel") return step(map_bytes_to_characters);
  json.at("type").fail(fmt::format("'{}' is not a normalizer that ferry knows", type));
}

std::shared_ptr<const Pattern> pattern_from_json(const JsonView& json) {
  try {
    if (const auto text = json.find("String")) return Pattern::literal(text->string());
    if (const auto regex = json.find("Regex")) return Pattern::regex(regex->string());
  } catch (const FormatError& e) {
    json.fail(e.what());
  }
  json.fail("expected {\"String\": ...} or {\"Regex\": ...}");
}

}  // namespace ferry::text
