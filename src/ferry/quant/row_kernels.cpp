#include "ferry/quant/row_kernels.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "ferry/base/error.h"
#include "ferry/quant/row_kernels_loops.h"

namespace ferry::quant {

namespace {

struct Scalar {
  using F = std::array<float, kLanes>;
  using Table = F;
  using Bytes = std::array<uint8_t, kLanes>;

  template <class Result, class Operation>
  static Result each(const Operation& operation) {
    Result result;
    for (int64_t i = 0; i < kLanes; ++i) result[i] = operation(i);
    return result;
  }

  static Bytes load_bytes(const uint8_t* from) {
    return each<Bytes>([&](int64_t i) { return from[i]; });
  }
  static Bytes load_8_bytes(const uint8_t* from) {
    return each<Bytes>([&](int64_t i) { return i < 8 ? from[i] : uint8_t{0}; });
  }
  static Bytes low_nibbles(const Bytes& a) {
    return each<Bytes>([&](int64_t i) { return a[i] & 15; });
  }
  static Bytes high_nibbles(const Bytes& a) {
    return each<Bytes>([&](int64_t i) { return a[i] >> 4; });
  }
  template <int shift>
  static Bytes two_bits(const Bytes& a) {
    return each<Bytes>([&](int64_t i) { return (a[i] >> shift & 3) << 4; });
  }
  static Bytes or_(const Bytes& a, const Bytes& b) {
    return each<Bytes>([&](int64_t i) { return a[i] | b[i]; });
  }
  static Bytes flip(const Bytes& a, uint8_t bits) {
    return each<Bytes>([&](int64_t i) { return a[i] ^ bits; });
  }
  static Bytes sub(const Bytes& a, uint8_t b) {
    return each<Bytes>([&](int64_t i) { return static_cast<uint8_t>(a[i] - b); });
  }
  static Bytes interleave(const Bytes& a, const Bytes& b) {
    return each<Bytes>([&](int64_t i) { return i % 2 == 0 ? a[i / 2] : b[i / 2]; });
  }
  static float half(const uint8_t* bytes) {
    return c10::Half(static_cast<uint16_t>(bytes[0] | bytes[1] << 8), c10::Half::from_bits());
  }

  static F splat(float a) {
    return each<F>([&](int64_t) { return a; });
  }
  static F mul(const F& a, const F& b) {
    return each<F>([&](int64_t i) { return a[i] * b[i]; });
  }
  static F add(const F& a, const F& b) {
    return each<F>([&](int64_t i) { return a[i] + b[i]; });
  }
  static F sub(const F& a, const F& b) {
    return each<F>([&](int64_t i) { return a[i] - b[i]; });
  }
  static F max(const F& a, const F& b) {
    return each<F>([&](int64_t i) { return a[i] > b[i] ? a[i] : b[i]; });
  }
  static F abs(const F& a) {
    return each<F>([&](int64_t i) { return std::fabs(a[i]); });
  }
  static float greatest(const F& a) { return *std::max_element(a.begin(), a.end()); }

  static F from_int8(const Bytes& a) {
    return each<F>([&](int64_t i) { return static_cast<float>(static_cast<int8_t>(a[i])); });
  }
  template <class Number>
  static F from(const Number* a) {
    return each<F>([&](int64_t i) { return static_cast<float>(a[i]); });
  }
  static F from_e4m3(const Bytes& a) {
    return each<F>([&](int64_t i) -> float {
      return c10::Float8_e4m3fn(a[i], c10::Float8_e4m3fn::from_bits());
    });
  }
  static F from_e5m2(const Bytes& a) {
    return each<F>(
        [&](int64_t i) -> float { return c10::Float8_e5m2(a[i], c10::Float8_e5m2::from_bits()); });
  }
  static Table table(const float* values) { return from(values); }
  static F lookup(const Table& table, const Bytes& index) {
    return each<F>([&](int64_t i) { return table[index[i]]; });
  }

  static uint16_t bits_of(float a, BF16) {
    if (std::isnan(a)) return 0x7FC0;
    return c10::BFloat16(a).x;
  }
  static uint16_t bits_of(float a, F16) {
    if (std::isnan(a)) return 0x7E00;
    return c10::Half(a).x;
  }
  static float value_of(uint16_t bits, BF16) {
    return c10::BFloat16(bits, c10::BFloat16::from_bits());
  }
  static float value_of(uint16_t bits, F16) { return c10::Half(bits, c10::Half::from_bits()); }

  static void store(const F& a, float* out, F32) { std::copy(a.begin(), a.end(), out); }
  template <class Out>
  static void store(const F& a, uint16_t* out, Out type) {
    for (int64_t i = 0; i < kLanes; ++i) out[i] = bits_of(a[i], type);
  }
  static void store_int8(const F& a, int8_t* out) {
    for (int64_t i = 0; i < kLanes; ++i) {
      float most = a[i] > -128.0F ? a[i] : -128.0F;  // also for NaN, as the wide kernels
      out[i] = static_cast<int8_t>(std::lrintf(most < 127.0F ? most : 127.0F));
    }
  }
  static F load(const float* x, F32) { return from(x); }
  template <class Out>
  static F load(const uint16_t* x, Out type) {
    return each<F>([&](int64_t i) { return value_of(x[i], type); });
  }
  static F round(const F& a, F32) { return a; }
  template <class Out>
  static F round(const F& a, Out type) {
    return each<F>([&](int64_t i) { return value_of(bits_of(a[i], type), type); });
  }
  static float round_one(float a, F32) { return a; }
  template <class Out>
  static float round_one(float a, Out type) {
    return value_of(bits_of(a, type), type);
  }
};

Simd find_best_simd() {
#ifdef FERRY_X86_ROW_KERNELS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Simd::avx512;
  }
  if (__builtin_cpu_supports("avx2")) return Simd::avx2;  // which no CPU has without F16C
#endif
  return Simd::scalar;
}

const RowKernelTables& tables_for(Simd simd) {
#ifdef FERRY_X86_ROW_KERNELS
  simd = std::min(simd, best_simd());
  if (simd == Simd::avx512) return avx512_row_kernels();
  if (simd == Simd::avx2) return avx2_row_kernels();
#endif
  return scalar_row_kernels();
}

}  // namespace

const RowKernelTables& scalar_row_kernels() {
  return row_kernel_tables<Scalar>();
}

Simd best_simd() {
  static const Simd best = find_best_simd();
  return best;
}

const RowKernels& row_kernels(at::ScalarType dtype, Simd simd) {
  const RowKernelTables& tables = tables_for(simd);
  switch (dtype) {
    case at::kFloat:
      return tables.float32;
    case at::kBFloat16:
      return tables.bfloat16;
    case at::kHalf:
      return tables.float16;
    default:
      throw_error<ArgumentError>("a packed weight as {}: expected float32, bfloat16 or float16",
                                 c10::toString(dtype));
  }
}

}  // namespace ferry::quant
