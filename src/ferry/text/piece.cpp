#include "ferry/text/piece.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/text/unicode_versions.h"

namespace ferry::text {
namespace {

const icu::Normalizer2& icu_normalizer(NormalForm form) {
  using Instance = const icu::Normalizer2* (*)(UErrorCode&);
  // What is newer than the crate's tables is left as it is.
  const auto make = [](Instance instance) {
    UErrorCode status = U_ZERO_ERROR;
    const icu::Normalizer2* normalizer = instance(status);
    if (U_FAILURE(status)) {
      throw_error<Error>("ICU has no normalization data: {}", u_errorName(status));
    }
    return icu::FilteredNormalizer2(*normalizer, normalized_code_points());
  };
  static const icu::FilteredNormalizer2 nfc = make(icu::Normalizer2::getNFCInstance);
  static const icu::FilteredNormalizer2 nfd = make(icu::Normalizer2::getNFDInstance);
  static const icu::FilteredNormalizer2 nfkc = make(icu::Normalizer2::getNFKCInstance);
  static const icu::FilteredNormalizer2 nfkd = make(icu::Normalizer2::getNFKDInstance);
  switch (form) {
    case NormalForm::nfc:
      return nfc;
    case NormalForm::nfd:
      return nfd;
    case NormalForm::nfkc:
      return nfkc;
    default:
      return nfkd;
  }
}

}  // namespace

Piece::Piece(std::string text) : text_(std::move(text)), origin_(text_.size()) {
  std::iota(origin_.begin(), origin_.end(), 0u);
}

Piece Piece::slice(size_t begin, size_t end) const {
  Piece out;
  out.text_ = text_.substr(begin, end - begin);
  out.origin_.assign(origin_.begin() + static_cast<ptrdiff_t>(begin),
                     origin_.begin() + static_cast<ptrdiff_t>(end));
  out.start_ = out.origin_.empty() ? start_ : out.origin_.front();
  return out;
}

std::vector<Piece> Piece::slices(const std::vector<Span>& spans) const {
  std::vector<Piece> out;
  out.reserve(spans.size());
  for (const Span& span : spans) {
    if (span.end > span.begin) out.push_back(slice(span.begin, span.end));
  }
  return out;
}

void Piece::transform(const std::vector<Change>& changes, size_t dropped) {
  std::string text;
  std::vector<uint32_t> origin;
  text.reserve(text_.size());
  origin.reserve(text_.size());
  size_t at = 0;  // the next byte of the old text that has not been consumed
  const auto skip = [&](size_t count) {
    while (count-- > 0 && at < text_.size()) next_code_point(text_, at);
  };
  skip(dropped);
  for (const Change& change : changes) {
    uint32_t from = 0;
    if (change.change > 0) {
      from = at == 0 || origin_.empty() ? 0 : origin_[at - 1];
    } else if (at < origin_.size()) {
      from = origin_[at];
      skip(1 + static_cast<size_t>(-change.change));
    }
    append_utf8(text, change.code_point);
    origin.resize(text.size(), from);
  }
  text_ = std::move(text);
  origin_ = std::move(origin);
}

void Piece::replace(const Pattern& pattern, std::string_view content) {
  std::string text;
  std::vector<uint32_t> origin;
  text.reserve(text_.size());
  origin.reserve(text_.size());
  for (const Span& span : pattern.find(text_)) {
    if (span.matched) {
      text += content;
      origin.resize(text.size(), span.end == 0 ? 0 : origin_[span.end - 1]);
    } else {
      text.append(text_, span.begin, span.end - span.begin);
      origin.insert(origin.end(), origin_.begin() + static_cast<ptrdiff_t>(span.begin),
                    origin_.begin() + static_cast<ptrdiff_t>(span.end));
    }
  }
  text_ = std::move(text);
  origin_ = std::move(origin);
}

void Piece::prepend(std::string_view prefix) {
  if (text_.empty()) return;
  origin_.insert(origin_.begin(), prefix.size(), origin_.front());
  text_.insert(0, prefix);
}

void Piece::strip(bool left, bool right) {
  size_t begin = 0;
  size_t end = text_.size();
  for (size_t at = 0; left && at < text_.size() && is_whitespace(next_code_point(text_, at));) {
    begin = at;
  }
  for (size_t at = end; right && at > begin && is_whitespace(previous_code_point(text_, at));) {
    end = at;
  }
  text_ = text_.substr(begin, end - begin);
  origin_.assign(origin_.begin() + static_cast<ptrdiff_t>(begin),
                 origin_.begin() + static_cast<ptrdiff_t>(end));
}

void Piece::normalize(NormalForm form) {
  const icu::Normalizer2& normalizer = icu_normalizer(form);
  UErrorCode status = U_ZERO_ERROR;
  if (normalizer.isNormalizedUTF8(text_, status) && U_SUCCESS(status)) return;
  // Segment by segment: what starts before a boundary cannot combine with what follows it.
  std::string text;
  std::vector<uint32_t> origin;
  for (size_t at = 0; at < text_.size() && U_SUCCESS(status);) {
    const size_t begin = at;
    next_code_point(text_, at);
    for (size_t peek = at; peek < text_.size(); at = peek) {
      if (normalizer.hasBoundaryBefore(static_cast<UChar32>(next_code_point(text_, peek)))) break;
    }
    icu::StringByteSink<std::string> sink(&text);
    normalizer.normalizeUTF8(
        0, icu::StringPiece(text_.data() + begin, static_cast<int32_t>(at - begin)), sink, nullptr,
        status);
    origin.resize(text.size(), origin_[begin]);
  }
  if (U_FAILURE(status)) {
    throw_error<Error>("ICU cannot normalize {} bytes: {}", text_.size(), u_errorName(status));
  }
  text_ = std::move(text);
  origin_ = std::move(origin);
}

}  // namespace ferry::text
