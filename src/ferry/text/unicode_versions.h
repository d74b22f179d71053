// Where the Unicode versions differ. Debian's ICU 72 has Unicode 15.0; within the Rust crate
// `tokenizers` Oniguruma has 16, std::char 17, and the normalization and the categories are of
// years ago. The ids have to be the crate's, so these tables carry the differences. With a newer
// ICU the additions are simply there twice.
#pragma once

#include <unicode/uniset.h>

#include <string>
#include <string_view>

namespace ferry::text {

// The members that ICU 72 lacks of a general category ("L", "Lu", "Nd", ...), as the inside of a
// [set]; empty if none.
std::string category_additions(std::string_view category);

const icu::UnicodeSet& numeric_additions();       // N, as in std::char
const icu::UnicodeSet& word_additions();          // \w
const icu::UnicodeSet& later_punctuation();       // P in ICU, not yet in the crate
const icu::UnicodeSet& later_marks();             // M in ICU, not yet in the crate
const icu::UnicodeSet& later_nonspacing_marks();  // Mn likewise
const icu::UnicodeSet& normalized_code_points();  // all but those newer than the normalization
// The lowercase of a code point that ICU 72 does not know, else `c`.
char32_t later_lowercase(char32_t c);

}  // namespace ferry::text
