// Compiled for AVX-512 (F, BW, VL, DQ) where the compiler can; see CMakeLists.txt.
#include "ferry/quant/row_kernels_bytes.h"
#include "ferry/quant/row_kernels_loops.h"

namespace ferry::quant {
namespace {

struct Avx512 : X86Bytes {
  using F = __m512;
  using Table = __m512;
  using X86Bytes::sub;

  static F splat(float a) { return _mm512_set1_ps(a); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static float greatest(F a) { return _mm512_reduce_max_ps(a); }

  static F from_int8(Bytes a) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a)); }
  static F from(const int32_t* a) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(a)); }
  static F from(const float* a) { return _mm512_loadu_ps(a); }
  // Sign, four exponent bits and three of mantissa are those of a half of 2^-8 the value.
  static F from_e4m3(Bytes a) {
    __m256i wide = _mm256_slli_epi16(_mm256_cvtepu8_epi16(a), 7);
    __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x3F80));
    __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x4000)), 1);
    F value = mul(_mm512_cvtph_ps(_mm256_or_si256(magnitude, sign)), splat(256.0F));
    __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x3F80));
    return _mm512_mask_blend_ps(nan, value, splat(__builtin_nanf("")));
  }
  static F from_e5m2(Bytes a) {
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(a), 8));
  }

  static Table table(const float* values) { return _mm512_loadu_ps(values); }
  static F lookup(Table table, Bytes index) {
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index), table);
  }

  static __m512i bfloat16_bits(F a) {
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x7FC0));
  }
  static __m256i float16_bits(F a) {
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm256_mask_blend_epi16(nan, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT),
                                   _mm256_set1_epi16(0x7E00));
  }

  static void store(F a, float* out, F32) { _mm512_storeu_ps(out, a); }
  static void store(F a, uint16_t* out, BF16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(bfloat16_bits(a)));
  }
  static void store(F a, uint16_t* out, F16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), float16_bits(a));
  }
  static void store_int8(F a, int8_t* out) {
    a = _mm512_min_ps(_mm512_max_ps(a, splat(-128.0F)), splat(127.0F));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
  }

  static __m256i load_16(const uint16_t* x) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  }
  static F load(const float* x, F32) { return _mm512_loadu_ps(x); }
  static F load(const uint16_t* x, BF16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16(x)), 16));
  }
  static F load(const uint16_t* x, F16) { return _mm512_cvtph_ps(load_16(x)); }

  static F round(F a, F32) { return a; }
  static F round(F a, BF16) { return _mm512_castsi512_ps(_mm512_slli_epi32(bfloat16_bits(a), 16)); }
  static F round(F a, F16) { return _mm512_cvtph_ps(float16_bits(a)); }
  template <class Out>
  static float round_one(float a, Out out) {
    return _mm512_cvtss_f32(round(splat(a), out));
  }
};

}  // namespace

const RowKernelTables& avx512_row_kernels() {
  return row_kernel_tables<Avx512>();
}

}  // namespace ferry::quant
