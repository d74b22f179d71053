#include "ferry/io/plane_merge.h"

#include <bit>
#include <cstdlib>
#include <cstring>

#include "ferry/base/log.h"

#if defined(__x86_64__)
// gcc 12 takes the undefined operands in its own AVX-512 intrinsics for a mistake (bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace ferry::io {
namespace {

static_assert(std::endian::native == std::endian::little, "files are little-endian");

// ---- portable; also the ends that fill no vector ----

void merge2_from(const uint8_t* const* planes, size_t begin, size_t count, uint8_t* out) {
  for (size_t i = begin; i < count; ++i) {
    auto value = static_cast<uint16_t>(planes[0][i] << 8 | planes[1][i]);
    value = std::rotr(value, 1);
    std::memcpy(out + 2 * i, &value, 2);
  }
}

void merge4_from(const uint8_t* const* planes, size_t begin, size_t count, uint8_t* out) {
  for (size_t i = begin; i < count; ++i) {
    uint32_t value = static_cast<uint32_t>(planes[0][i]) << 24 |
                     static_cast<uint32_t>(planes[1][i]) << 16 |
                     static_cast<uint32_t>(planes[2][i]) << 8 | planes[3][i];
    value = std::rotr(value, 1);
    std::memcpy(out + 4 * i, &value, 4);
  }
}

void merge2_portable(const uint8_t* const* planes, size_t count, void* out) {
  merge2_from(planes, 0, count, static_cast<uint8_t*>(out));
}

void merge4_portable(const uint8_t* const* planes, size_t count, void* out) {
  merge4_from(planes, 0, count, static_cast<uint8_t*>(out));
}

constexpr PlaneMerge kPortable = {"portable", merge2_portable, merge4_portable};

#if defined(__x86_64__)

// ---- AVX2 ----

__attribute__((target("avx2"))) __m256i widen2_avx2(const uint8_t* bytes) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

__attribute__((target("avx2"))) __m256i widen4_avx2(const uint8_t* bytes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
}

__attribute__((target("avx2"))) void merge2_avx2(const uint8_t* const* planes, size_t count,
                                                 void* out) {
  auto* to = static_cast<uint8_t*>(out);
  const uint8_t *high = planes[0], *low = planes[1];
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    __m256i value =
        _mm256_or_si256(_mm256_slli_epi16(widen2_avx2(high + i), 8), widen2_avx2(low + i));
    value = _mm256_or_si256(_mm256_srli_epi16(value, 1), _mm256_slli_epi16(value, 15));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i), value);
  }
  merge2_from(planes, i, count, to);
}

__attribute__((target("avx2"))) void merge4_avx2(const uint8_t* const* planes, size_t count,
                                                 void* out) {
  auto* to = static_cast<uint8_t*>(out);
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256i upper = _mm256_or_si256(_mm256_slli_epi32(widen4_avx2(planes[0] + i), 24),
                                    _mm256_slli_epi32(widen4_avx2(planes[1] + i), 16));
    __m256i lower = _mm256_or_si256(_mm256_slli_epi32(widen4_avx2(planes[2] + i), 8),
                                    widen4_avx2(planes[3] + i));
    __m256i value = _mm256_or_si256(upper, lower);
    value = _mm256_or_si256(_mm256_srli_epi32(value, 1), _mm256_slli_epi32(value, 31));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * i), value);
  }
  merge4_from(planes, i, count, to);
}

constexpr PlaneMerge kAvx2 = {"avx2", merge2_avx2, merge4_avx2};

// ---- AVX-512 ----

#define FERRY_AVX512 __attribute__((target("avx512f,avx512bw")))

FERRY_AVX512 __m512i widen2_avx512(const uint8_t* bytes) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
}

FERRY_AVX512 __m512i widen4_avx512(const uint8_t* bytes) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

FERRY_AVX512 void merge2_avx512(const uint8_t* const* planes, size_t count, void* out) {
  auto* to = static_cast<uint8_t*>(out);
  const uint8_t *high = planes[0], *low = planes[1];
  size_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m512i value =
        _mm512_or_si512(_mm512_slli_epi16(widen2_avx512(high + i), 8), widen2_avx512(low + i));
    value = _mm512_or_si512(_mm512_srli_epi16(value, 1), _mm512_slli_epi16(value, 15));
    _mm512_storeu_si512(to + 2 * i, value);
  }
  merge2_from(planes, i, count, to);
}

FERRY_AVX512 void merge4_avx512(const uint8_t* const* planes, size_t count, void* out) {
  auto* to = static_cast<uint8_t*>(out);
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    __m512i upper = _mm512_or_si512(_mm512_slli_epi32(widen4_avx512(planes[0] + i), 24),
                                    _mm512_slli_epi32(widen4_avx512(planes[1] + i), 16));
    __m512i lower = _mm512_or_si512(_mm512_slli_epi32(widen4_avx512(planes[2] + i), 8),
                                    widen4_avx512(planes[3] + i));
    _mm512_storeu_si512(to + 4 * i, _mm512_ror_epi32(_mm512_or_si512(upper, lower), 1));
  }
  merge4_from(planes, i, count, to);
}

constexpr PlaneMerge kAvx512 = {"avx512bw", merge2_avx512, merge4_avx512};

#endif  // __x86_64__

const PlaneMerge& choose() {
  if (const char* name = std::getenv("FERRY_PLANE_MERGE")) {
    if (const PlaneMerge* merge = find_plane_merge(name)) return *merge;
    log::warn("FERRY_PLANE_MERGE={}: this CPU or build has no such merge; taking the fastest",
              name);
  }
  for (const char* name : {"avx512bw", "avx2"}) {
    if (const PlaneMerge* merge = find_plane_merge(name)) return *merge;
  }
  return kPortable;
}

}  // namespace

const PlaneMerge* find_plane_merge(std::string_view name) {
#if defined(__x86_64__)
  if (name == kAvx512.name && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw"))
    return &kAvx512;
  if (name == kAvx2.name && __builtin_cpu_supports("avx2")) return &kAvx2;
#endif
  return name == kPortable.name ? &kPortable : nullptr;
}

const PlaneMerge& best_plane_merge() {
  static const PlaneMerge& best = choose();
  return best;
}

}  // namespace ferry::io
