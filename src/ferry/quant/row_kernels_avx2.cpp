// Compiled for AVX2 and F16C where the compiler can; see CMakeLists.txt.
#include "ferry/quant/row_kernels_bytes.h"
#include "ferry/quant/row_kernels_loops.h"

namespace ferry::quant {
namespace {

struct Avx2 : X86Bytes {
  struct F {
    __m256 a, b;
  };
  using Table = F;
  using X86Bytes::sub;

  static F splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F abs(F x) {
    __m256 sign = _mm256_set1_ps(-0.0F);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static float greatest(F x) {
    float all[8];
    _mm256_storeu_ps(all, _mm256_max_ps(x.a, x.b));
    float most = all[0];
    for (float value : all) most = value > most ? value : most;
    return most;
  }

  static F from_ints(__m256i a, __m256i b) {
    return {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)};
  }
  static F from_int8(Bytes x) {
    return from_ints(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)));
  }
  static F from(const int32_t* x) {
    const auto* at = reinterpret_cast<const __m256i*>(x);
    return from_ints(_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1));
  }
  static F from(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
  static F from_halves(__m256i x) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  }
  // Sign, four exponent bits and three of mantissa are those of a half of 2^-8 the value.
  static F from_e4m3(Bytes x) {
    __m256i wide = _mm256_slli_epi16(_mm256_cvtepu8_epi16(x), 7);
    __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x3F80));
    __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x4000)), 1);
    __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3F80));
    __m256i half = _mm256_or_si256(_mm256_or_si256(magnitude, sign),
                                   _mm256_and_si256(nan, _mm256_set1_epi16(0x7E00)));
    return mul(from_halves(half), splat(256.0F));
  }
  static F from_e5m2(Bytes x) { return from_halves(_mm256_slli_epi16(_mm256_cvtepu8_epi16(x), 8)); }

  static Table table(const float* values) { return from(values); }
  static __m256 lookup_8(Table table, __m256i index) {
    // The permutation looks at the low three bits; the fourth, as the sign, picks the half.
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.a, index),
                            _mm256_permutevar8x32_ps(table.b, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  static F lookup(Table table, Bytes index) {
    return {lookup_8(table, _mm256_cvtepu8_epi32(index)),
            lookup_8(table, _mm256_cvtepu8_epi32(_mm_srli_si128(index, 8)))};
  }

  static __m256i bfloat16_bits(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x7FC0), nan);
  }
  static __m128i float16_bits(__m256 x) {
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m128i nan16 = _mm_packs_epi32(_mm256_castsi256_si128(nan), _mm256_extracti128_si256(nan, 1));
    return _mm_blendv_epi8(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), _mm_set1_epi16(0x7E00),
                           nan16);
  }

  static void store(F x, float* out, F32) {
    _mm256_storeu_ps(out, x.a);
    _mm256_storeu_ps(out + 8, x.b);
  }
  static void store(F x, uint16_t* out, BF16) {
    // The packing works on halves of the registers.
    __m256i packed = _mm256_packus_epi32(bfloat16_bits(x.a), bfloat16_bits(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xD8));
  }
  static void store(F x, uint16_t* out, F16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), float16_bits(x.a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), float16_bits(x.b));
  }
  static void store_int8(F x, int8_t* out) {
    x = min(max(x, splat(-128.0F)), splat(127.0F));
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    words = _mm256_permute4x64_epi64(words, 0xD8);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out),
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }

  static __m256i load_16(const uint16_t* x) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  }
  static __m256 widen(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static F load(const float* x, F32) { return from(x); }
  static F load(const uint16_t* x, BF16) {
    __m256i all = load_16(x);
    return {widen(_mm256_castsi256_si128(all)), widen(_mm256_extracti128_si256(all, 1))};
  }
  static F load(const uint16_t* x, F16) { return from_halves(load_16(x)); }

  static F round(F x, F32) { return x; }
  static F round(F x, BF16) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bfloat16_bits(x.a), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(bfloat16_bits(x.b), 16))};
  }
  static F round(F x, F16) {
    return {_mm256_cvtph_ps(float16_bits(x.a)), _mm256_cvtph_ps(float16_bits(x.b))};
  }
  template <class Out>
  static float round_one(float value, Out out) {
    return _mm256_cvtss_f32(round(splat(value), out).a);
  }
};

}  // namespace

const RowKernelTables& avx2_row_kernels() {
  return row_kernel_tables<Avx2>();
}

}  // namespace ferry::quant
