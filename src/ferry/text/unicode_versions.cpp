#include "ferry/text/unicode_versions.h"

#include <initializer_list>

#include "ferry/base/error.h"

// Made by comparing, for every code point, ICU 72 with the components of tokenizers 0.23.
namespace ferry::text {
namespace {

struct Addition {
  std::string_view category;
  const char* set;
};

// General categories of what Unicode 15.1 and 16 assigned.
constexpr Addition kAdditions[] = {
    {"Lu", R"(\u1C89\uA7CB-\uA7CC\uA7DA\uA7DC\U00010D50-\U00010D65)"},
    {"Ll", R"(\u1C8A\uA7CD\uA7DB\U00010D70-\U00010D85)"},
    {"Lo",
     R"(\U000105C0-\U000105F3\U00010D4A-\U00010D4D\U00010D4F\U00010EC2-\U00010EC4)"
     R"(\U00011380-\U00011389\U0001138B\U0001138E\U00011390-\U000113B5\U000113B7\U000113D1)"
     R"(\U000113D3\U00011BC0-\U00011BE0\U00013460-\U000143FA\U00016100-\U0001611D)"
     R"(\U00016D43-\U00016D6A\U00018CFF\U0001E5D0-\U0001E5ED\U0001E5F0\U0002EBF0-\U0002EE5D)"},
    {"Lm", R"(\U00010D4E\U00010D6F\U00016D40-\U00016D42\U00016D6B-\U00016D6C)"},
    {"Nd", R"(\U00010D40-\U00010D49\U000116D0-\U000116E3\U00011BF0-\U00011BF9\U00016130-\U00016139)"
           R"(\U00016D70-\U00016D79\U0001CCF0-\U0001CCF9\U0001E5F1-\U0001E5FA)"},
    {"M", R"(\u0897\U00010D69-\U00010D6D\U00010EFC\U000113B8-\U000113C0\U000113C2\U000113C5)"
          R"(\U000113C7-\U000113CA\U000113CC-\U000113D0\U000113D2\U000113E1-\U000113E2\U00011F5A)"
          R"(\U0001611E-\U0001612F\U0001E5EE-\U0001E5EF)"},
    {"P", R"(\u1B4E-\u1B4F\u1B7F\U00010D6E\U000113D4-\U000113D5\U000113D7-\U000113D8\U00011BE1)"
          R"(\U00016D6D-\U00016D6F\U0001E5FF)"},
    {"S", R"(\u2427-\u2429\u2FFC-\u2FFF\u31E4-\u31E5\u31EF\U00010D8E-\U00010D8F)"
          R"(\U0001CC00-\U0001CCEF\U0001CD00-\U0001CEB3\U0001F8B2-\U0001F8BB\U0001F8C0-\U0001F8C1)"
          R"(\U0001FA89\U0001FA8F\U0001FABE\U0001FAC6\U0001FADC\U0001FADF\U0001FAE9)"
          R"(\U0001FBCB-\U0001FBEF)"},
};

constexpr const char* kNumericSince17 = R"([\U00011DE0-\U00011DE9\U00016FF4-\U00016FF6])";

constexpr const char* kNotYetPunctuation =
    "["
    R"(\u061D\u09FD\u0A76\u0C77\u0C84\u1B7D-\u1B7E\u2E43-\u2E4F\u2E52-\u2E5D\U00010EAD)"
    R"(\U00010F55-\U00010F59\U00010F86-\U00010F89\U0001144B-\U0001144F\U0001145A-\U0001145B)"
    R"(\U0001145D\U00011660-\U0001166C\U000116B9\U0001183B\U00011944-\U00011946\U000119E2)"
    R"(\U00011A3F-\U00011A46\U00011A9A-\U00011A9C\U00011A9E-\U00011AA2\U00011B00-\U00011B09)"
    R"(\U00011C41-\U00011C45\U00011C70-\U00011C71\U00011EF7-\U00011EF8\U00011F43-\U00011F4F)"
    R"(\U00011FFF\U00012FF1-\U00012FF2\U00016E97-\U00016E9A\U00016FE2\U0001E95E-\U0001E95F)"
    "]";

constexpr const char* kNotYetMarks =
    "["
    R"(\u07FD\u0898-\u089F\u08CA-\u08D3\u09FE\u0AFA-\u0AFF\u0B55\u0C04\u0C3C\u0CF3\u0D00)"
    R"(\u0D3B-\u0D3C\u0D81\u0EBA\u0ECE\u1715\u180F\u1ABF-\u1ACE\u1CF7\u1DF6-\u1DFA\uA82C)"
    R"(\uA8FF\U00010D24-\U00010D27\U00010EAB-\U00010EAC\U00010EFD-\U00010EFF)"
    R"(\U00010F46-\U00010F50\U00010F82-\U00010F85\U00011070\U00011073-\U00011074\U000110C2)"
    R"(\U00011145-\U00011146\U000111C9\U000111CE-\U000111CF\U00011241\U0001133B\U0001145E)"
    R"(\U0001182C-\U0001183A\U00011930-\U00011935\U00011937-\U00011938\U0001193B-\U0001193E)"
    R"(\U00011940\U00011942-\U00011943\U000119D1-\U000119D7\U000119DA-\U000119E0\U000119E4)"
    R"(\U00011A01-\U00011A0A\U00011A33-\U00011A39\U00011A3B-\U00011A3E\U00011A47)"
    R"(\U00011A51-\U00011A5B\U00011A8A-\U00011A99\U00011D31-\U00011D36\U00011D3A)"
    R"(\U00011D3C-\U00011D3D\U00011D3F-\U00011D45\U00011D47\U00011D8A-\U00011D8E)"
    R"(\U00011D90-\U00011D91\U00011D93-\U00011D97\U00011EF3-\U00011EF6\U00011F00-\U00011F01)"
    R"(\U00011F03\U00011F34-\U00011F3A\U00011F3E-\U00011F42\U00013440\U00013447-\U00013455)"
    R"(\U00016F4F\U00016F7F-\U00016F87\U00016FE4\U00016FF0-\U00016FF1\U0001CF00-\U0001CF2D)"
    R"(\U0001CF30-\U0001CF46\U0001E08F\U0001E130-\U0001E136\U0001E2AE\U0001E2EC-\U0001E2EF)"
    R"(\U0001E4EC-\U0001E4EF)"
    "]";

constexpr const char* kNotYetNonspacing =
    "["
    R"(\u07FD\u0898-\u089F\u08CA-\u08E1\u09FE\u0AFA-\u0AFF\u0B55\u0C04\u0C3C\u0D00)"
    R"(\u0D3B-\u0D3C\u0D81\u0EBA\u0ECE\u180F\u1885-\u1886\u1ABF-\u1ACE\u1DF6-\u1DFB\uA82C)"
    R"(\uA8C5\uA8FF\uA9BD\U00010D24-\U00010D27\U00010EAB-\U00010EAC\U00010EFD-\U00010EFF)"
    R"(\U00010F46-\U00010F50\U00010F82-\U00010F85\U00011070\U00011073-\U00011074\U000110C2)"
    R"(\U000111C9\U000111CF\U0001123E\U00011241\U0001133B\U00011438-\U0001143F)"
    R"(\U00011442-\U00011444\U00011446\U0001145E\U0001182F-\U00011837\U00011839-\U0001183A)"
    R"(\U0001193B-\U0001193C\U0001193E\U00011943\U000119D4-\U000119D7\U000119DA-\U000119DB)"
    R"(\U000119E0\U00011A01-\U00011A0A\U00011A33-\U00011A38\U00011A3B-\U00011A3E\U00011A47)"
    R"(\U00011A51-\U00011A56\U00011A59-\U00011A5B\U00011A8A-\U00011A96\U00011A98-\U00011A99)"
    R"(\U00011C30-\U00011C36\U00011C38-\U00011C3D\U00011C3F\U00011C92-\U00011CA7)"
    R"(\U00011CAA-\U00011CB0\U00011CB2-\U00011CB3\U00011CB5-\U00011CB6\U00011D31-\U00011D36)"
    R"(\U00011D3A\U00011D3C-\U00011D3D\U00011D3F-\U00011D45\U00011D47\U00011D90-\U00011D91)"
    R"(\U00011D95\U00011D97\U00011EF3-\U00011EF4\U00011F00-\U00011F01\U00011F36-\U00011F3A)"
    R"(\U00011F40\U00011F42\U00013440\U00013447-\U00013455\U00016F4F\U00016FE4)"
    R"(\U0001CF00-\U0001CF2D\U0001CF30-\U0001CF46\U0001E000-\U0001E006\U0001E008-\U0001E018)"
    R"(\U0001E01B-\U0001E021\U0001E023-\U0001E024\U0001E026-\U0001E02A\U0001E08F)"
    R"(\U0001E130-\U0001E136\U0001E2AE\U0001E2EC-\U0001E2EF\U0001E4EC-\U0001E4EF)"
    R"(\U0001E944-\U0001E94A)"
    "]";

constexpr const char* kNotYetDecomposed =
    "["
    R"(\u32FF\uA7F2-\uA7F4\uAB69\U00010781-\U00010785\U00010787-\U000107B0)"
    R"(\U000107B2-\U000107BA\U00011938\U0001E030-\U0001E06D\U0001F16C\U0001FBF0-\U0001FBF9)"
    "]";

// Lowercase of what Unicode 16 and 17 assigned: `first` to `last` move by `distance`.
struct CaseRange {
  char32_t first, last;
  int32_t distance;
};
constexpr CaseRange kLowercase[] = {
    {0x1C89, 0x1C89, 1},    {0xA7CB, 0xA7CB, -42343}, {0xA7CC, 0xA7CC, 1}, {0xA7CE, 0xA7CE, 1},
    {0xA7D2, 0xA7D2, 1},    {0xA7D4, 0xA7D4, 1},      {0xA7DA, 0xA7DA, 1}, {0xA7DC, 0xA7DC, -42561},
    {0x10D50, 0x10D65, 32}, {0x16EA0, 0x16EB8, 27}};

icu::UnicodeSet make_set(const std::string& pattern) {
  UErrorCode status = U_ZERO_ERROR;
  icu::UnicodeSet set(icu::UnicodeString::fromUTF8(pattern), status);
  if (U_FAILURE(status)) throw_error<Error>("ICU does not take a set: {}", u_errorName(status));
  set.freeze();
  return set;
}

icu::UnicodeSet additions_of(std::initializer_list<std::string_view> categories) {
  std::string pattern = "[";
  for (const std::string_view category : categories) pattern += category_additions(category);
  return make_set(pattern + "]");
}

}  // namespace

std::string category_additions(std::string_view category) {
  std::string out;
  for (const auto& [name, set] : kAdditions) {
    // "L" is all of "Lu", "Ll", ...
    if (name == category || (category.size() == 1 && name.front() == category.front())) out += set;
  }
  return out;
}

const icu::UnicodeSet& numeric_additions() {
  static const icu::UnicodeSet set =
      make_set("[" + category_additions("N") + kNumericSince17 + "]");
  return set;
}

const icu::UnicodeSet& word_additions() {
  static const icu::UnicodeSet set = additions_of({"L", "M", "N"});
  return set;
}

const icu::UnicodeSet& later_punctuation() {
  static const icu::UnicodeSet set = make_set(kNotYetPunctuation);
  return set;
}

const icu::UnicodeSet& later_marks() {
  static const icu::UnicodeSet set = make_set(kNotYetMarks);
  return set;
}

const icu::UnicodeSet& later_nonspacing_marks() {
  static const icu::UnicodeSet set = make_set(kNotYetNonspacing);
  return set;
}

const icu::UnicodeSet& normalized_code_points() {
  static const icu::UnicodeSet set = make_set(std::string("[^") + kNotYetDecomposed + kNotYetMarks +
                                              "[" + category_additions("M") + "]]");
  return set;
}

char32_t later_lowercase(char32_t c) {
  for (const CaseRange& range : kLowercase) {
    if (c >= range.first && c <= range.last) return c + static_cast<char32_t>(range.distance);
  }
  return c;
}

}  // namespace ferry::text
