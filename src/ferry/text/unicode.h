// UTF-8 and the Unicode properties that tokenizers need. The definitions are those of the Rust
// crate behind Hugging Face's tokenizers (std::char, regex, unicode_categories), computed with ICU.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ferry::text {

// Throws ArgumentError, naming the byte, if `text` is not valid UTF-8. `what` names the text.
void check_utf8(std::string_view text, std::string_view what);

// The code point at `position`, which is moved behind it. REQUIRES: valid UTF-8, position < size.
char32_t next_code_point(std::string_view text, size_t& position);
// The code point that ends before `position`, which is moved onto it. REQUIRES: position > 0.
char32_t previous_code_point(std::string_view text, size_t& position);
void append_utf8(std::string& out, char32_t code_point);
size_t utf8_length(char32_t code_point);
size_t count_code_points(std::string_view text);

// Bytes to UTF-8; each maximal invalid part becomes one U+FFFD.
std::string to_utf8_lossy(std::string_view bytes);

bool is_whitespace(char32_t c);   // White_Space
bool is_numeric(char32_t c);      // Nd, Nl, No
bool is_word(char32_t c);         // \w: alphabetic, marks, decimal digits, connectors, joiners
bool is_punctuation(char32_t c);  // ASCII punctuation and symbols, and P*
bool is_mark(char32_t c);         // Mn, Mc, Me
bool is_mark_nonspacing(char32_t c);
bool is_other(char32_t c);    // Cc, Cf, Co
bool is_chinese(char32_t c);  // the CJK ideograph blocks, as BERT counts them

// Appends the lowercase of one code point. No context: a final sigma stays σ.
void append_lowercase(std::vector<char32_t>& out, char32_t c);

enum class NormalForm { nfc, nfd, nfkc, nfkd };

// The offsets at which a new extended grapheme cluster begins, and text.size() at the end.
std::vector<size_t> grapheme_boundaries(std::string_view text);

}  // namespace ferry::text
