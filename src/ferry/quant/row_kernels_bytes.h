// Operations on 16 bytes, the same for AVX2 and AVX-512. Included by their row_kernels files alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ferry::quant {
namespace {  // NOLINT: each including file needs its own copy

struct X86Bytes {
  using Bytes = __m128i;

  static Bytes load_bytes(const uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
  static Bytes load_8_bytes(const uint8_t* from) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  }
  static Bytes low_nibbles(Bytes a) { return _mm_and_si128(a, _mm_set1_epi8(15)); }
  static Bytes high_nibbles(Bytes a) { return low_nibbles(_mm_srli_epi16(a, 4)); }
  // Bits `shift` and the next of each byte, as bits 4 and 5.
  template <int shift>
  static Bytes two_bits(Bytes a) {
    return _mm_slli_epi16(_mm_and_si128(_mm_srli_epi16(a, shift), _mm_set1_epi8(3)), 4);
  }
  static Bytes or_(Bytes a, Bytes b) { return _mm_or_si128(a, b); }
  static Bytes flip(Bytes a, int8_t bits) { return _mm_xor_si128(a, _mm_set1_epi8(bits)); }
  static Bytes sub(Bytes a, int8_t b) { return _mm_sub_epi8(a, _mm_set1_epi8(b)); }
  // The first 8 of each: a0 b0 a1 b1 ...
  static Bytes interleave(Bytes a, Bytes b) { return _mm_unpacklo_epi8(a, b); }

  static float half(const uint8_t* bytes) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bytes[0] | bytes[1] << 8)));
  }
};

}  // namespace
}  // namespace ferry::quant
