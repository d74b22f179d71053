// The loops of row_kernels.h, written once for 16 values at a time and compiled for each
// instruction set: V is a struct of operations on them. Included by row_kernels*.cpp alone, which
// are compiled with flags of their own: nothing inline of the standard library may be used here,
// since the linker might keep the wide version for every CPU.
#pragma once

#include <cstdint>

#include "ferry/quant/row_kernels.h"

namespace ferry::quant {

// One table a dtype: float32, bfloat16, float16.
struct RowKernelTables {
  RowKernels float32, bfloat16, float16;
};
const RowKernelTables& scalar_row_kernels();
const RowKernelTables& avx2_row_kernels();
const RowKernelTables& avx512_row_kernels();

namespace {  // NOLINT: each including file needs its own copy

struct F32 {
  using Element = float;
};
struct BF16 {
  using Element = uint16_t;
};
struct F16 {
  using Element = uint16_t;
};

constexpr int64_t kLanes = 16;

template <class T>
void copy_elements(const T* from, T* into, int64_t count) {
  for (int64_t i = 0; i < count; ++i) into[i] = from[i];
}

// V::store for fewer than 16.
template <class V, class Out>
void store_some(typename V::F values, typename Out::Element* out, int64_t count) {
  typename Out::Element all[kLanes];
  V::store(values, all, Out{});
  copy_elements(all, out, count);
}

template <class V>
typename V::Bytes load_some(const uint8_t* from, int64_t count) {
  uint8_t all[kLanes] = {};
  copy_elements(from, all, count);
  return V::load_bytes(all);
}

// Calls value(bytes) for 16 bytes at a time of `count` that lie at `q`.
template <class V, class Out, class Value>
void each_byte(const uint8_t* q, int64_t count, typename Out::Element* out, const Value& value) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) V::store(value(V::load_bytes(q + i)), out + i, Out{});
  if (i < count) {
    store_some<V, Out>(value(load_some<V>(q + i, count - i)), out + i, count - i);
  }
}

// As each_byte, for values of half a byte.
template <class V, class Out, bool low_first, class Value>
void each_nibble(const uint8_t* q, int64_t count, typename Out::Element* out, const Value& value) {
  auto spread = [](typename V::Bytes bytes) {
    typename V::Bytes low = V::low_nibbles(bytes), high = V::high_nibbles(bytes);
    return low_first ? V::interleave(low, high) : V::interleave(high, low);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    V::store(value(spread(V::load_8_bytes(q + i / 2))), out + i, Out{});
  }
  if (i < count) {
    auto bytes = load_some<V>(q + i / 2, (count - i + 1) / 2);
    store_some<V, Out>(value(spread(bytes)), out + i, count - i);
  }
}

template <class V, class Out>
struct Loops {
  using Element = typename Out::Element;
  using F = typename V::F;
  using Bytes = typename V::Bytes;

  static int64_t shorter(int64_t a, int64_t b) { return a < b ? a : b; }

  static void int8(const int8_t* q, const float* scale, const float* zero, int64_t group,
                   int64_t count, void* out) {
    for (int64_t begin = 0; begin < count; begin += group, ++scale) {
      F factor = V::splat(*scale), offset = V::splat(zero ? *zero++ : 0.0F);
      each_byte<V, Out>(reinterpret_cast<const uint8_t*>(q) + begin, shorter(group, count - begin),
                        static_cast<Element*>(out) + begin, [&](Bytes bytes) {
                          return V::mul(V::sub(V::from_int8(bytes), offset), factor);
                        });
    }
  }

  static void float8_e4m3(const uint8_t* q, const float* scale, int64_t group, int64_t count,
                          void* out) {
    for (int64_t begin = 0; begin < count; begin += group, ++scale) {
      F factor = V::splat(*scale);
      each_byte<V, Out>(q + begin, shorter(group, count - begin),
                        static_cast<Element*>(out) + begin,
                        [&](Bytes bytes) { return V::mul(V::from_e4m3(bytes), factor); });
    }
  }

  static void float8_e5m2(const uint8_t* q, const float* scale, int64_t group, int64_t count,
                          void* out) {
    for (int64_t begin = 0; begin < count; begin += group, ++scale) {
      F factor = V::splat(*scale);
      each_byte<V, Out>(q + begin, shorter(group, count - begin),
                        static_cast<Element*>(out) + begin,
                        [&](Bytes bytes) { return V::mul(V::from_e5m2(bytes), factor); });
    }
  }

  static void int4(const uint8_t* q, const float* scale, const float* zero, int64_t group,
                   int64_t count, void* out) {
    for (int64_t begin = 0; begin < count; begin += group, ++scale) {
      F factor = V::splat(*scale), offset = V::splat(zero ? *zero++ : 0.0F);
      bool with_zero = zero != nullptr;
      each_nibble<V, Out, true>(q + begin / 2, shorter(group, count - begin),
                                static_cast<Element*>(out) + begin, [&](Bytes nibbles) {
                                  // 8..15 stand for -8..-1.
                                  F values = V::from_int8(V::sub(V::flip(nibbles, 8), 8));
                                  values = V::mul(values, factor);
                                  return with_zero ? V::add(values, offset) : values;
                                });
    }
  }

  static void codebook4(const uint8_t* q, const float* codebook, const float* absmax, int64_t block,
                        int64_t first, int64_t count, void* out) {
    typename V::Table table = V::table(codebook);
    auto* into = static_cast<Element*>(out);
    for (int64_t i = first, end = first + count; i < end;) {
      int64_t here = shorter(block - i % block, end - i);
      F factor = V::splat(absmax[i / block]);
      if (i % 2 == 1) {  // the low half of a byte, alone
        uint8_t nibble = q[i / 2] & 15;
        F value = V::mul(V::lookup(table, load_some<V>(&nibble, 1)), factor);
        store_some<V, Out>(value, into++, 1);
        ++i, --here;
      }
      each_nibble<V, Out, false>(q + i / 2, here, into, [&](Bytes nibbles) {
        return V::mul(V::lookup(table, nibbles), factor);
      });
      into += here;
      i += here;
    }
  }

  static void gguf_q8_0(const void* blocks, int64_t count, void* out) {
    const auto* block = static_cast<const uint8_t*>(blocks);
    auto* into = static_cast<Element*>(out);
    for (int64_t i = 0; i < count; i += 32, block += 34, into += 32) {
      F d = V::splat(V::half(block));
      for (int j = 0; j < 32; j += kLanes) {
        V::store(V::mul(d, V::from_int8(V::load_bytes(block + 2 + j))), into + j, Out{});
      }
    }
  }

  static void gguf_q4_0(const void* blocks, int64_t count, void* out) {
    const auto* block = static_cast<const uint8_t*>(blocks);
    auto* into = static_cast<Element*>(out);
    for (int64_t i = 0; i < count; i += 32, block += 18, into += 32) {
      F d = V::splat(V::half(block));
      Bytes q = V::load_bytes(block + 2);
      V::store(V::mul(d, V::from_int8(V::sub(V::low_nibbles(q), 8))), into, Out{});
      V::store(V::mul(d, V::from_int8(V::sub(V::high_nibbles(q), 8))), into + 16, Out{});
    }
  }

  // Scale and minimum of sub-block j, six bits each, in 12 bytes.
  static uint8_t k_scale(const uint8_t* s, int j) {
    return j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6 << 4);
  }
  static uint8_t k_min(const uint8_t* s, int j) {
    return j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6 << 4);
  }

  static void gguf_q4_k(const void* blocks, int64_t count, void* out) {
    const auto* block = static_cast<const uint8_t*>(blocks);
    auto* into = static_cast<Element*>(out);
    for (int64_t i = 0; i < count; i += 256, block += 144, into += 256) {
      float d = V::half(block), d_min = V::half(block + 2);
      const uint8_t* q = block + 16;
      for (int j = 0; j < 8; j += 2) {
        F low_scale = V::splat(d * static_cast<float>(k_scale(block + 4, j)));
        F low_min = V::splat(d_min * static_cast<float>(k_min(block + 4, j)));
        F high_scale = V::splat(d * static_cast<float>(k_scale(block + 4, j + 1)));
        F high_min = V::splat(d_min * static_cast<float>(k_min(block + 4, j + 1)));
        for (int l = 0; l < 32; l += kLanes) {
          Bytes bytes = V::load_bytes(q + 16 * j + l);
          F low = V::from_int8(V::low_nibbles(bytes)), high = V::from_int8(V::high_nibbles(bytes));
          V::store(V::sub(V::mul(low_scale, low), low_min), into + 32 * j + l, Out{});
          V::store(V::sub(V::mul(high_scale, high), high_min), into + 32 * j + 32 + l, Out{});
        }
      }
    }
  }

  static void gguf_q6_k(const void* blocks, int64_t count, void* out) {
    const auto* block = static_cast<const uint8_t*>(blocks);
    auto* into = static_cast<Element*>(out);
    for (int64_t i = 0; i < count; i += 256, block += 210, into += 256) {
      float d = V::half(block + 208);
      const auto* scales = reinterpret_cast<const int8_t*>(block + 192);
      for (int half = 0; half < 2; ++half) {
        const uint8_t *low = block + 64 * half, *high = block + 128 + 32 * half;
        for (int l = 0; l < 32; l += kLanes) {
          Bytes a = V::load_bytes(low + l), b = V::load_bytes(low + 32 + l);
          Bytes h = V::load_bytes(high + l);
          Bytes q[4] = {V::or_(V::low_nibbles(a), V::template two_bits<0>(h)),
                        V::or_(V::low_nibbles(b), V::template two_bits<2>(h)),
                        V::or_(V::high_nibbles(a), V::template two_bits<4>(h)),
                        V::or_(V::high_nibbles(b), V::template two_bits<6>(h))};
          for (int part = 0; part < 4; ++part) {
            F scale = V::splat(d * static_cast<float>(scales[8 * half + l / 16 + 2 * part]));
            V::store(V::mul(scale, V::from_int8(V::sub(q[part], 32))),
                     into + 128 * half + 32 * part + l, Out{});
          }
        }
      }
    }
  }

  static F load(const Element* x, int64_t count) {
    if (count >= kLanes) return V::load(x, Out{});
    Element all[kLanes] = {};
    copy_elements(x, all, count);
    return V::load(all, Out{});
  }

  static float quantize_int8(const void* row, int64_t count, int8_t* q) {
    const auto* x = static_cast<const Element*>(row);
    F greatest = V::splat(0.0F);
    for (int64_t i = 0; i < count; i += kLanes) {
      greatest = V::max(greatest, V::abs(load(x + i, count - i)));
    }
    float scale = V::round_one(V::greatest(greatest) / 127.5F, Out{});
    if (!(scale > 0x1p-23F)) scale = 0x1p-23F;
    F inverse = V::splat(1.0F / scale);
    for (int64_t i = 0; i < count; i += kLanes) {
      F values = V::mul(load(x + i, count - i), inverse);
      if (count - i >= kLanes) {
        V::store_int8(values, q + i);
      } else {
        int8_t all[kLanes];
        V::store_int8(values, all);
        copy_elements(all, q + i, count - i);
      }
    }
    return scale;
  }

  template <class Product>
  static void scale_products(const Product* products, float x_scale, const float* scales,
                             const void* bias, int64_t count, void* out) {
    const auto* offsets = static_cast<const Element*>(bias);
    auto* into = static_cast<Element*>(out);
    F factor = V::splat(x_scale);
    auto value = [&](const Product* product, const float* scale, const Element* offset) {
      F rounded = V::round(V::mul(V::from(product), factor), Out{});
      F scaled = V::mul(rounded, V::load(scale, F32{}));
      return offset ? V::add(scaled, V::load(offset, Out{})) : scaled;
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      V::store(value(products + i, scales + i, offsets ? offsets + i : nullptr), into + i, Out{});
    }
    if (i < count) {
      Product product[kLanes] = {};
      float scale[kLanes] = {};
      Element offset[kLanes] = {};
      copy_elements(products + i, product, count - i);
      copy_elements(scales + i, scale, count - i);
      if (offsets) copy_elements(offsets + i, offset, count - i);
      store_some<V, Out>(value(product, scale, offsets ? offset : nullptr), into + i, count - i);
    }
  }

  static constexpr RowKernels kernels() {
    return {int8,
            float8_e4m3,
            float8_e5m2,
            int4,
            codebook4,
            gguf_q8_0,
            gguf_q4_0,
            gguf_q4_k,
            gguf_q6_k,
            quantize_int8,
            scale_products<int32_t>,
            scale_products<float>};
  }
};

template <class V>
const RowKernelTables& row_kernel_tables() {
  static constexpr RowKernelTables tables{Loops<V, F32>::kernels(), Loops<V, BF16>::kernels(),
                                          Loops<V, F16>::kernels()};
  return tables;
}

}  // namespace
}  // namespace ferry::quant
