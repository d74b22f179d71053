// Compiled with -ffp-contract=off: a fused multiply-add rounds once where the reference rounds
// twice.
#include "ferry/quant/gguf_blocks.h"

#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ferry::quant {
namespace {

const uint8_t* bytes_of(const std::byte* block) {
  return reinterpret_cast<const uint8_t*>(block);
}

float half_at(const uint8_t* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
}

void put_half(uint8_t* bytes, float value) {
  c10::Half half(value);
  std::memcpy(bytes, &half.x, sizeof(half.x));
}

// Calls `one(block, out)` for each block.
template <class F>
void each_block(io::GgmlType type, const std::byte* blocks, int64_t count, float* out,
                const F& one) {
  const int64_t bytes = io::block_bytes(type), elements = io::block_elements(type);
  for (int64_t i = 0; i < count; ++i) one(bytes_of(blocks + i * bytes), out + i * elements);
}

// The fifth bit of element j, in 32 bits of a little-endian number.
int high_bit(const uint8_t* bits, int j) {
  return (bits[j / 8] >> (j % 8) & 1) << 4;
}

// The eight six-bit scales and minimums that Q4_K and Q5_K pack into twelve bytes: 0 to 3 have
// their six bits in bytes 0 to 3 (scales) and 4 to 7 (minimums), 4 to 7 have four of them in bytes
// 8 to 11 and the other two above those six.
struct SixBitScales {
  float scale[8], minimum[8];

  SixBitScales(const uint8_t* packed, float d, float dmin) {
    for (int j = 0; j < 4; ++j) {
      scale[j] = d * static_cast<float>(packed[j] & 63);
      minimum[j] = dmin * static_cast<float>(packed[j + 4] & 63);
      scale[j + 4] = d * static_cast<float>((packed[j + 8] & 15) | (packed[j] >> 6) << 4);
      minimum[j + 4] = dmin * static_cast<float>(packed[j + 8] >> 4 | (packed[j + 4] >> 6) << 4);
    }
  }
};

}  // namespace

// 32 elements, 34 bytes: half d; int8 q[32].
void dequantize_q8_0(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::Q8_0, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const float d = half_at(block);
    for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(static_cast<int8_t>(block[2 + j])) * d;
  });
}

// 32 elements, 18 bytes: half d; q[16]: low nibbles are elements 0 to 15, high ones 16 to 31.
void dequantize_q4_0(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::Q4_0, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const float d = half_at(block);
    const uint8_t* q = block + 2;
    for (int j = 0; j < 16; ++j) {
      y[j] = d * static_cast<float>((q[j] & 15) - 8);
      y[j + 16] = d * static_cast<float>((q[j] >> 4) - 8);
    }
  });
}

// 32 elements, 20 bytes: half d, m; q[16] as in Q4_0.
void dequantize_q4_1(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::Q4_1, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const float d = half_at(block), m = half_at(block + 2);
    const uint8_t* q = block + 4;
    for (int j = 0; j < 16; ++j) {
      y[j] = d * static_cast<float>(q[j] & 15) + m;
      y[j + 16] = d * static_cast<float>(q[j] >> 4) + m;
    }
  });
}

// 32 elements, 22 bytes: half d; 32 fifth bits; q[16].
void dequantize_q5_0(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::Q5_0, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const float d = half_at(block);
    const uint8_t *high = block + 2, *q = block + 6;
    for (int j = 0; j < 16; ++j) {
      y[j] = d * static_cast<float>(((q[j] & 15) | high_bit(high, j)) - 16);
      y[j + 16] = d * static_cast<float>((q[j] >> 4 | high_bit(high, j + 16)) - 16);
    }
  });
}

// 32 elements, 24 bytes: half d, m; 32 fifth bits; q[16].
void dequantize_q5_1(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::Q5_1, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const float d = half_at(block), m = half_at(block + 2);
    const uint8_t *high = block + 4, *q = block + 8;
    for (int j = 0; j < 16; ++j) {
      y[j] = d * static_cast<float>((q[j] & 15) | high_bit(high, j)) + m;
      y[j + 16] = d * static_cast<float>(q[j] >> 4 | high_bit(high, j + 16)) + m;
    }
  });
}

// 256 elements, 84 bytes: scales[16] (low nibble scale, high nibble minimum, one a group of 16);
// q[64]; half d, dmin. Each half of the block has 32 bytes: bits 0 and 1 are its first 32 elements.
void dequantize_q2_k(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::Q2_K, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const uint8_t *scales = block, *q = block + 16;
    const float d = half_at(block + 80), dmin = half_at(block + 82);
    for (int group = 0; group < 16; ++group) {
      const float scale = d * static_cast<float>(scales[group] & 15);
      const float minimum = dmin * static_cast<float>(scales[group] >> 4);
      const uint8_t* from = q + group / 8 * 32 + group % 2 * 16;
      const int shift = group % 8 / 2 * 2;
      for (int l = 0; l < 16; ++l)
        *y++ = scale * static_cast<float>(from[l] >> shift & 3) - minimum;
    }
  });
}

// 256 elements, 110 bytes: mask[32] (bit g of byte l: the third bit of element 32 g + l); q[64] as
// in Q2_K; twelve bytes of 16 six-bit scales; half d. A third bit that is not set takes 4 away.
void dequantize_q3_k(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::Q3_K, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const uint8_t *mask = block, *q = block + 32, *packed = block + 96;
    const float d = half_at(block + 108);
    for (int group = 0; group < 16; ++group) {
      const int low = packed[group % 8] >> (group / 8 * 4) & 15;
      const int high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
      const float scale = d * static_cast<float>((low | high << 4) - 32);
      const uint8_t* from = q + group / 8 * 32 + group % 2 * 16;
      const uint8_t* mask_from = mask + group % 2 * 16;
      const int shift = group % 8 / 2 * 2, bit = group / 2;
      for (int l = 0; l < 16; ++l) {
        const int third = mask_from[l] >> bit & 1;
        *y++ = scale * static_cast<float>((from[l] >> shift & 3) - (third ? 0 : 4));
      }
    }
  });
}

// 256 elements, 144 bytes: half d, dmin; twelve bytes of scales and minimums, one a group of 32;
// q[128]: of each 32 bytes the low nibbles are a group, the high ones the next.
void dequantize_q4_k(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::Q4_K, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const SixBitScales scales(block + 4, half_at(block), half_at(block + 2));
    const uint8_t* q = block + 16;
    for (int group = 0; group < 8; ++group) {
      const uint8_t* from = q + group / 2 * 32;
      const int shift = group % 2 * 4;
      const float scale = scales.scale[group], minimum = scales.minimum[group];
      for (int l = 0; l < 32; ++l)
        *y++ = scale * static_cast<float>(from[l] >> shift & 15) - minimum;
    }
  });
}

// 256 elements, 176 bytes: as Q4_K, with high[32] before q: bit g of byte l is the fifth bit of
// element 32 g + l.
void dequantize_q5_k(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::Q5_K, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const SixBitScales scales(block + 4, half_at(block), half_at(block + 2));
    const uint8_t *high = block + 16, *q = block + 48;
    for (int group = 0; group < 8; ++group) {
      const uint8_t* from = q + group / 2 * 32;
      const int shift = group % 2 * 4;
      const float scale = scales.scale[group], minimum = scales.minimum[group];
      for (int l = 0; l < 32; ++l) {
        const int value = (from[l] >> shift & 15) | (high[l] >> group & 1) << 4;
        *y++ = scale * static_cast<float>(value) - minimum;
      }
    }
  });
}

// 256 elements, 210 bytes: low[128], high[64], int8 scales[16] (one a group of 16), half d. Each
// half of the block has 64 low bytes, whose low nibbles are its first 64 elements, and 32 high
// bytes with two bits for each of its four runs of 32.
void dequantize_q6_k(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::Q6_K, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const uint8_t *low = block, *high = block + 128, *scales = block + 192;
    const float d = half_at(block + 208);
    for (int run = 0; run < 8; ++run) {
      const uint8_t* low_from = low + run / 4 * 64 + run % 2 * 32;
      const uint8_t* high_from = high + run / 4 * 32;
      const int low_shift = run % 4 / 2 * 4, high_shift = run % 4 * 2;
      for (int l = 0; l < 32; ++l) {
        const float scale = d * static_cast<float>(static_cast<int8_t>(scales[run * 2 + l / 16]));
        const int value = (low_from[l] >> low_shift & 15) | (high_from[l] >> high_shift & 3) << 4;
        *y++ = scale * static_cast<float>(value - 32);
      }
    }
  });
}

// 32 elements, 18 bytes: as Q4_0, but nibbles choose from a table.
void dequantize_iq4_nl(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::IQ4_NL, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const float d = half_at(block);
    const uint8_t* q = block + 2;
    for (int j = 0; j < 16; ++j) {
      y[j] = d * kIq4Values[q[j] & 15];
      y[j + 16] = d * kIq4Values[q[j] >> 4];
    }
  });
}

// 256 elements, 136 bytes: half d; two upper bits of eight scales in 16 bits; their four lower bits
// in four bytes; q[128]: groups of 32 in 16 bytes each, as in IQ4_NL.
void dequantize_iq4_xs(const std::byte* blocks, int64_t block_count, float* out) {
  each_block(io::GgmlType::IQ4_XS, blocks, block_count, out, [](const uint8_t* block, float* y) {
    const float d = half_at(block);
    const int upper = block[2] | block[3] << 8;
    const uint8_t *lower = block + 4, *q = block + 8;
    for (int group = 0; group < 8; ++group) {
      const int low = lower[group / 2] >> (group % 2 * 4) & 15;
      const float scale = d * static_cast<float>((low | (upper >> (2 * group) & 3) << 4) - 32);
      for (int j = 0; j < 16; ++j) {
        y[j] = scale * kIq4Values[q[j] & 15];
        y[j + 16] = scale * kIq4Values[q[j] >> 4];
      }
      y += 32;
      q += 16;
    }
  });
}

namespace {

constexpr int kBlock = 32;  // elements of the types that are written

float inverse(float d) {
  return d == 0 ? 0.0f : 1.0f / d;
}

// As numpy's astype(uint8) of a truncated float on x86, and its clip(): what is no number or too
// large for an int becomes 0.
int truncated(float value, int most) {
  if (!(std::abs(value) < 2147483648.0f)) return 0;
  return std::min(static_cast<int>(static_cast<uint8_t>(static_cast<int>(value))), most);
}

// The value of greatest magnitude, the first of several.
float extreme(const float* x) {
  return *std::max_element(x, x + kBlock,
                           [](float a, float b) { return std::abs(a) < std::abs(b); });
}

// Two elements a byte: j in the low nibble, j + 16 in the high one.
void put_nibbles(const int* q, uint8_t* out) {
  for (int j = 0; j < kBlock / 2; ++j)
    out[j] = static_cast<uint8_t>((q[j] & 15) | (q[j + kBlock / 2] & 15) << 4);
}

void put_high_bits(const int* q, uint8_t* out) {
  std::fill_n(out, kBlock / 8, uint8_t{0});
  for (int j = 0; j < kBlock; ++j) out[j / 8] |= static_cast<uint8_t>((q[j] >> 4 & 1) << (j % 8));
}

// Signed types: the value of greatest magnitude becomes -`steps`.
void quantize_signed(const float* x, int steps, float& d, int* q) {
  d = extreme(x) / static_cast<float>(-steps);
  const float inverse_d = inverse(d);
  for (int j = 0; j < kBlock; ++j)
    q[j] =
        truncated(std::trunc(x[j] * inverse_d + (static_cast<float>(steps) + 0.5f)), 2 * steps - 1);
}

// Types with a minimum: it becomes 0, the maximum `steps`.
void quantize_from_minimum(const float* x, int steps, float& d, float& minimum, int* q) {
  auto [least, most] = std::minmax_element(x, x + kBlock);
  minimum = *least;
  d = (*most - minimum) / static_cast<float>(steps);
  const float inverse_d = inverse(d);
  for (int j = 0; j < kBlock; ++j)
    q[j] = truncated(std::trunc((x[j] - minimum) * inverse_d + 0.5f), steps);
}

template <class F>
void each_written(io::GgmlType type, const float* values, int64_t count, std::byte* out,
                  const F& one) {
  const int64_t bytes = io::block_bytes(type);
  for (int64_t i = 0; i < count; ++i)
    one(values + i * kBlock, reinterpret_cast<uint8_t*>(out + i * bytes));
}

}  // namespace

void quantize_q8_0(const float* values, int64_t block_count, std::byte* out) {
  each_written(io::GgmlType::Q8_0, values, block_count, out, [](const float* x, uint8_t* block) {
    const float d = std::abs(extreme(x)) / 127.0f;
    const float inverse_d = inverse(d);
    put_half(block, d);
    for (int j = 0; j < kBlock; ++j) {
      // Halves go away from zero.
      const float value = x[j] * inverse_d;
      const float whole = std::floor(std::abs(value));
      const float rounded = whole + std::floor(2 * (std::abs(value) - whole));
      const float q = value < 0 ? -rounded : rounded;
      block[2 + j] = std::abs(q) <= 127 ? static_cast<uint8_t>(static_cast<int8_t>(q)) : 0;
    }
  });
}

void quantize_q4_0(const float* values, int64_t block_count, std::byte* out) {
  each_written(io::GgmlType::Q4_0, values, block_count, out, [](const float* x, uint8_t* block) {
    float d;
    int q[kBlock];
    quantize_signed(x, 8, d, q);
    put_half(block, d);
    put_nibbles(q, block + 2);
  });
}

void quantize_q4_1(const float* values, int64_t block_count, std::byte* out) {
  each_written(io::GgmlType::Q4_1, values, block_count, out, [](const float* x, uint8_t* block) {
    float d, minimum;
    int q[kBlock];
    quantize_from_minimum(x, 15, d, minimum, q);
    put_half(block, d);
    put_half(block + 2, minimum);
    put_nibbles(q, block + 4);
  });
}

void quantize_q5_0(const float* values, int64_t block_count, std::byte* out) {
  each_written(io::GgmlType::Q5_0, values, block_count, out, [](const float* x, uint8_t* block) {
    float d;
    int q[kBlock];
    quantize_signed(x, 16, d, q);
    put_half(block, d);
    put_high_bits(q, block + 2);
    put_nibbles(q, block + 6);
  });
}

void quantize_q5_1(const float* values, int64_t block_count, std::byte* out) {
  each_written(io::GgmlType::Q5_1, values, block_count, out, [](const float* x, uint8_t* block) {
    float d, minimum;
    int q[kBlock];
    quantize_from_minimum(x, 31, d, minimum, q);
    put_half(block, d);
    put_half(block + 2, minimum);
    put_high_bits(q, block + 4);
    put_nibbles(q, block + 8);
  });
}

DequantizeBlocks find_dequantize(io::GgmlType type) {
  switch (type) {
    case io::GgmlType::Q8_0:
      return dequantize_q8_0;
    case io::GgmlType::Q6_K:
      return dequantize_q6_k;
    case io::GgmlType::Q5_K:
      return dequantize_q5_k;
    case io::GgmlType::Q4_K:
      return dequantize_q4_k;
    case io::GgmlType::Q3_K:
      return dequantize_q3_k;
    case io::GgmlType::Q2_K:
      return dequantize_q2_k;
    case io::GgmlType::Q5_1:
      return dequantize_q5_1;
    case io::GgmlType::Q5_0:
      return dequantize_q5_0;
    case io::GgmlType::Q4_1:
      return dequantize_q4_1;
    case io::GgmlType::Q4_0:
      return dequantize_q4_0;
    case io::GgmlType::IQ4_NL:
      return dequantize_iq4_nl;
    case io::GgmlType::IQ4_XS:
      return dequantize_iq4_xs;
    default:
      return nullptr;
  }
}

QuantizeBlocks find_quantize(io::GgmlType type) {
  switch (type) {
    case io::GgmlType::Q8_0:
      return quantize_q8_0;
    case io::GgmlType::Q5_1:
      return quantize_q5_1;
    case io::GgmlType::Q5_0:
      return quantize_q5_0;
    case io::GgmlType::Q4_1:
      return quantize_q4_1;
    case io::GgmlType::Q4_0:
      return quantize_q4_0;
    default:
      return nullptr;
  }
}

}  // namespace ferry::quant
