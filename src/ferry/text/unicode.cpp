#include "ferry/text/unicode.h"

#include <unicode/brkiter.h>
#include <unicode/uchar.h>
#include <unicode/utf8.h>

#include <memory>

#include "ferry/base/error.h"
#include "ferry/text/unicode_versions.h"

namespace ferry::text {
namespace {

int32_t as_icu_size(std::string_view text) {
  if (text.size() > static_cast<size_t>(INT32_MAX) / 4) {
    throw_error<ArgumentError>("text of {} bytes; the longest that can be tokenized is {}",
                               text.size(), INT32_MAX / 4);
  }
  return static_cast<int32_t>(text.size());
}

uint32_t category_mask(char32_t c) {
  return U_GET_GC_MASK(static_cast<UChar32>(c));
}

}  // namespace

void check_utf8(std::string_view text, std::string_view what) {
  const int32_t size = as_icu_size(text);
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  for (int32_t i = 0; i < size;) {
    const int32_t start = i;
    UChar32 c;
    U8_NEXT(bytes, i, size, c);
    if (c < 0) {
      throw_error<ArgumentError>("{}: byte {} (0x{:02x}) is not valid UTF-8", what, start,
                                 bytes[start]);
    }
  }
}

char32_t next_code_point(std::string_view text, size_t& position) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  UChar32 c;
  U8_NEXT_OR_FFFD(bytes, position, text.size(), c);
  return static_cast<char32_t>(c);
}

char32_t previous_code_point(std::string_view text, size_t& position) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  auto at = static_cast<int32_t>(position);
  UChar32 c;
  U8_PREV_OR_FFFD(bytes, 0, at, c);
  position = static_cast<size_t>(at);
  return static_cast<char32_t>(c);
}

void append_utf8(std::string& out, char32_t code_point) {
  char buffer[U8_MAX_LENGTH];
  int32_t size = 0;
  U8_APPEND_UNSAFE(buffer, size, static_cast<UChar32>(code_point));
  out.append(buffer, static_cast<size_t>(size));
}

size_t utf8_length(char32_t code_point) {
  return U8_LENGTH(static_cast<UChar32>(code_point));
}

size_t count_code_points(std::string_view text) {
  size_t count = 0;
  for (const char byte : text) count += !U8_IS_TRAIL(static_cast<uint8_t>(byte));
  return count;
}

std::string to_utf8_lossy(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (size_t i = 0; i < bytes.size();) append_utf8(out, next_code_point(bytes, i));
  return out;
}

bool is_whitespace(char32_t c) {
  return u_isUWhiteSpace(static_cast<UChar32>(c));
}

bool is_numeric(char32_t c) {
  return (category_mask(c) & (U_GC_ND_MASK | U_GC_NL_MASK | U_GC_NO_MASK)) != 0 ||
         (c > 0xFFFF && numeric_additions().contains(static_cast<UChar32>(c)));
}

bool is_word(char32_t c) {
  return u_isUAlphabetic(static_cast<UChar32>(c)) ||
         (category_mask(c) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0 || c == 0x200C ||
         c == 0x200D || (c > 0x7F && word_additions().contains(static_cast<UChar32>(c)));
}

bool is_punctuation(char32_t c) {
  if (c < 0x80) {
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
           (c >= '{' && c <= '~');
  }
  if (c == 0x166D || c == 0x111C9) return true;  // no longer punctuation in ICU
  return (category_mask(c) & U_GC_P_MASK) != 0 &&
         !later_punctuation().contains(static_cast<UChar32>(c));
}

bool is_mark(char32_t c) {
  return c == 0x1CF2 || c == 0x1CF3 ||
         ((category_mask(c) & U_GC_M_MASK) != 0 &&
          !later_marks().contains(static_cast<UChar32>(c)));
}

bool is_mark_nonspacing(char32_t c) {
  return c == 0x1734 || ((category_mask(c) & U_GC_MN_MASK) != 0 &&
                         !later_nonspacing_marks().contains(static_cast<UChar32>(c)));
}

bool is_other(char32_t c) {
  // Format characters that came after the crate's table.
  const bool later =
      c == 0x890 || c == 0x891 || c == 0x8E2 || c == 0x110CD || (c >= 0x13430 && c <= 0x1343F);
  return (category_mask(c) & (U_GC_CC_MASK | U_GC_CF_MASK | U_GC_CO_MASK)) != 0 && !later;
}

bool is_chinese(char32_t c) {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) ||
         (c >= 0x20000 && c <= 0x2A6DF) || (c >= 0x2A700 && c <= 0x2B73F) ||
         (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) ||
         (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

void append_lowercase(std::vector<char32_t>& out, char32_t c) {
  if (c == 0x0130) {  // the only code point whose lowercase is two: İ
    out.push_back('i');
    out.push_back(0x0307);
  } else {
    const auto lower = static_cast<char32_t>(u_tolower(static_cast<UChar32>(c)));
    out.push_back(lower == c && c > 0x1000 ? later_lowercase(c) : lower);
  }
}

std::vector<size_t> grapheme_boundaries(std::string_view text) {
  std::vector<size_t> boundaries{0};
  UErrorCode status = U_ZERO_ERROR;
  std::unique_ptr<icu::BreakIterator> graphemes(
      icu::BreakIterator::createCharacterInstance(icu::Locale::getRoot(), status));
  UText utext = UTEXT_INITIALIZER;
  utext_openUTF8(&utext, text.data(), as_icu_size(text), &status);
  if (U_SUCCESS(status)) graphemes->setText(&utext, status);
  if (U_FAILURE(status)) {
    utext_close(&utext);
    throw_error<Error>("ICU cannot find grapheme boundaries: {}", u_errorName(status));
  }
  for (int32_t at = graphemes->next(); at != icu::BreakIterator::DONE; at = graphemes->next()) {
    boundaries.push_back(static_cast<size_t>(at));
  }
  utext_close(&utext);
  return boundaries;
}

}  // namespace ferry::text
