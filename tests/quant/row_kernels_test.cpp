#include "ferry/quant/row_kernels.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "ferry/base/error.h"

namespace ferry::quant {
namespace {

using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;

Bytes random_bytes(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  Bytes bytes(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

Floats random_floats(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats floats(count);
  for (float& value : floats) value = normal(random);
  return floats;
}

float half_at(const uint8_t* bytes) {
  return c10::Half(static_cast<uint16_t>(bytes[0] | bytes[1] << 8), c10::Half::from_bits());
}

// Halves of a sensible size where the block's format has them.
void set_half(uint8_t* at, float value) {
  c10::Half half(value);
  std::memcpy(at, &half.x, 2);
}

using Kernel = std::function<void(const RowKernels&, void* out)>;

at::Tensor output(const Kernel& kernel, at::ScalarType dtype, Simd simd, int64_t count) {
  // Two elements more, to see that nothing is written there.
  at::Tensor out = at::full({count + 2}, 7, at::TensorOptions().dtype(dtype));
  kernel(row_kernels(dtype, simd), out.mutable_data_ptr());
  EXPECT_EQ(out[count].item<float>(), 7);
  EXPECT_EQ(out[count + 1].item<float>(), 7);
  return out.narrow(0, 0, count);
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0) return true;
  return a.scalar_type() == at::kFloat && at::allclose(a, b, 0, 0, /*equal_nan=*/true);
}

// Every level and dtype gives `expected`, rounded as torch rounds.
void expect_values(const Kernel& kernel, const Floats& expected, const std::string& what) {
  auto count = static_cast<int64_t>(expected.size());
  at::Tensor exact = at::tensor(expected);
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    at::Tensor scalar = output(kernel, dtype, Simd::scalar, count);
    EXPECT_TRUE(at::allclose(scalar, exact.to(dtype), 0, 0, /*equal_nan=*/true))
        << what << " as " << c10::toString(dtype) << ", " << count << " values";
    for (Simd simd : {Simd::avx2, Simd::avx512}) {
      EXPECT_TRUE(same_bits(output(kernel, dtype, simd, count), scalar))
          << what << " as " << c10::toString(dtype) << ", level " << static_cast<int>(simd) << ", "
          << count << " values";
    }
  }
}

TEST(RowKernels, Int8WithScalesAndZeroPoints) {
  for (int64_t count : {1, 15, 16, 17, 64, 100, 257}) {
    for (int64_t group : {count, int64_t{32}, int64_t{5}}) {
      Bytes bytes = random_bytes(count, 1);
      const auto* q = reinterpret_cast<const int8_t*>(bytes.data());
      Floats scale = random_floats(count, 2), zero = random_floats(count, 3);
      for (float& value : zero) value = std::round(value * 30);
      Floats plain, shifted;
      for (int64_t i = 0; i < count; ++i) {
        plain.push_back(static_cast<float>(q[i]) * scale[i / group]);
        shifted.push_back((static_cast<float>(q[i]) - zero[i / group]) * scale[i / group]);
      }
      expect_values([&](const RowKernels& kernels,
                        void* out) { kernels.int8(q, scale.data(), nullptr, group, count, out); },
                    plain, "int8");
      expect_values(
          [&](const RowKernels& kernels, void* out) {
            kernels.int8(q, scale.data(), zero.data(), group, count, out);
          },
          shifted, "int8 with zero points");
    }
  }
}

TEST(RowKernels, EveryFloat8Value) {
  Bytes bytes(256 + 7);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i);
  auto count = static_cast<int64_t>(bytes.size());
  Floats scale = random_floats(count, 4);
  for (int64_t group : {count, int64_t{48}}) {
    auto expected = [&](at::ScalarType type) {
      at::Tensor tensor = at::empty({count}, at::TensorOptions().dtype(type));
      std::memcpy(tensor.mutable_data_ptr(), bytes.data(), count);
      tensor = tensor.to(at::kFloat);
      Floats values;
      for (int64_t i = 0; i < count; ++i)
        values.push_back(tensor.const_data_ptr<float>()[i] * scale[i / group]);
      return values;
    };
    expect_values(
        [&](const RowKernels& kernels, void* out) {
          kernels.float8_e4m3(bytes.data(), scale.data(), group, count, out);
        },
        expected(at::kFloat8_e4m3fn), "float8 e4m3");
    expect_values(
        [&](const RowKernels& kernels, void* out) {
          kernels.float8_e5m2(bytes.data(), scale.data(), group, count, out);
        },
        expected(at::kFloat8_e5m2), "float8 e5m2");
  }
}

TEST(RowKernels, SignedNibblesLowFirst) {
  for (int64_t count : {2, 18, 64, 130, 256}) {
    for (int64_t group : {int64_t{32}, int64_t{128}, int64_t{6}}) {
      Bytes q = random_bytes(count / 2, 5);
      Floats scale = random_floats(count, 6), zero = random_floats(count, 7), plain, shifted;
      for (int64_t i = 0; i < count; ++i) {
        int value = i % 2 == 0 ? q[i / 2] & 15 : q[i / 2] >> 4;
        if (value > 7) value -= 16;
        float product = static_cast<float>(value) * scale[i / group];
        plain.push_back(product);
        shifted.push_back(product + zero[i / group]);
      }
      expect_values(
          [&](const RowKernels& kernels, void* out) {
            kernels.int4(q.data(), scale.data(), nullptr, group, count, out);
          },
          plain, "int4");
      expect_values(
          [&](const RowKernels& kernels, void* out) {
            kernels.int4(q.data(), scale.data(), zero.data(), group, count, out);
          },
          shifted, "int4 with zeros");
    }
  }
}

TEST(RowKernels, CodebookNibblesHighFirstFromAnyElement) {
  Bytes q = random_bytes(400, 8);
  Floats codebook = random_floats(16, 9), absmax = random_floats(100, 10);
  for (int64_t block : {int64_t{64}, int64_t{32}, int64_t{7}}) {
    for (int64_t first : {0, 1, 63, 64, 97}) {
      for (int64_t count : {1, 2, 31, 64, 200}) {
        Floats expected;
        for (int64_t i = first; i < first + count; ++i) {
          int nibble = i % 2 == 0 ? q[i / 2] >> 4 : q[i / 2] & 15;
          expected.push_back(codebook[nibble] * absmax[i / block]);
        }
        expect_values(
            [&](const RowKernels& kernels, void* out) {
              kernels.codebook4(q.data(), codebook.data(), absmax.data(), block, first, count, out);
            },
            expected, "codebook");
      }
    }
  }
}

// Random blocks of `bytes` bytes, halves at `halves`.
Bytes random_blocks(int64_t blocks, int64_t bytes, std::initializer_list<int> halves) {
  Bytes all = random_bytes(blocks * bytes, 11);
  Floats scales = random_floats(blocks * 2, 12);
  for (int64_t i = 0; i < blocks; ++i) {
    int k = 0;
    for (int at : halves) set_half(&all[i * bytes + at], scales[2 * i + k++] * 0.01F);
  }
  return all;
}

TEST(RowKernels, GgufBlocksOf32) {
  for (int64_t blocks : {1, 5}) {
    Bytes q8 = random_blocks(blocks, 34, {0}), q4 = random_blocks(blocks, 18, {0});
    Floats from_q8, from_q4;
    for (int64_t i = 0; i < blocks * 32; ++i) {
      const uint8_t *a = &q8[i / 32 * 34], *b = &q4[i / 32 * 18];
      int64_t j = i % 32;
      from_q8.push_back(half_at(a) * static_cast<float>(static_cast<int8_t>(a[2 + j])));
      int nibble = j < 16 ? b[2 + j] & 15 : b[2 + j - 16] >> 4;
      from_q4.push_back(half_at(b) * static_cast<float>(nibble - 8));
    }
    expect_values([&](const RowKernels& kernels,
                      void* out) { kernels.gguf_q8_0(q8.data(), blocks * 32, out); },
                  from_q8, "Q8_0");
    expect_values([&](const RowKernels& kernels,
                      void* out) { kernels.gguf_q4_0(q4.data(), blocks * 32, out); },
                  from_q4, "Q4_0");
  }
}

TEST(RowKernels, GgufKBlocks) {
  const int64_t blocks = 3;
  Bytes q4 = random_blocks(blocks, 144, {0, 2}), q6 = random_blocks(blocks, 210, {208});
  Floats from_q4, from_q6;
  for (int64_t i = 0; i < blocks * 256; ++i) {
    int64_t y = i % 256;
    {
      const uint8_t* b = &q4[i / 256 * 144];
      const uint8_t* s = b + 4;
      int64_t sub = y / 32;
      int scale = sub < 4 ? s[sub] & 63 : (s[sub + 4] & 15) | (s[sub - 4] >> 6) << 4;
      int least = sub < 4 ? s[sub + 4] & 63 : s[sub + 4] >> 4 | (s[sub] >> 6) << 4;
      uint8_t byte = b[16 + y / 64 * 32 + y % 32];
      int q = sub % 2 == 0 ? byte & 15 : byte >> 4;
      float product = half_at(b) * static_cast<float>(scale) * static_cast<float>(q);
      from_q4.push_back(product - half_at(b + 2) * static_cast<float>(least));
    }
    const uint8_t* b = &q6[i / 256 * 210];
    int64_t half = y / 128, part = y % 128 / 32, l = y % 32;
    uint8_t low = b[half * 64 + part % 2 * 32 + l], high = b[128 + half * 32 + l];
    int q = ((part < 2 ? low & 15 : low >> 4) | (high >> (2 * part) & 3) << 4) - 32;
    auto scale = static_cast<int8_t>(b[192 + half * 8 + l / 16 + part * 2]);
    from_q6.push_back(half_at(b + 208) * static_cast<float>(scale) * static_cast<float>(q));
  }
  expect_values([&](const RowKernels& kernels,
                    void* out) { kernels.gguf_q4_k(q4.data(), blocks * 256, out); },
                from_q4, "Q4_K");
  expect_values([&](const RowKernels& kernels,
                    void* out) { kernels.gguf_q6_k(q6.data(), blocks * 256, out); },
                from_q6, "Q6_K");
}

TEST(RowKernels, RoundTiesOverflowAndNan) {
  // bfloat16: 1 + 2^-8 lies half way; float16: 1 + 2^-11; too large a product; infinity times zero.
  const int8_t q[] = {1, 3, 127, -128, 0, -1};
  for (float scale : {1.0F + 0x1p-8F, 1.0F + 0x1.8p-7F, 1.0F + 0x1p-11F, 3e38F, 1e-40F, 0x1p-24F,
                      INFINITY, NAN}) {
    Floats expected;
    for (int8_t value : q) expected.push_back(static_cast<float>(value) * scale);
    expect_values(
        [&](const RowKernels& kernels, void* out) { kernels.int8(q, &scale, nullptr, 6, 6, out); },
        expected, "int8");
  }
}

TEST(RowKernels, QuantizedRowsAndTheirProductsAreTheSameAtEveryLevel) {
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (int64_t count : {1, 16, 77, 512}) {
      at::Tensor x = at::tensor(random_floats(count, 13)).to(dtype);
      Floats scales = random_floats(count, 14);
      std::mt19937 random(15);
      std::vector<int32_t> products(count);
      for (int32_t& product : products) product = static_cast<int32_t>(random()) >> 6;
      Floats float_products(products.begin(), products.end());
      auto run = [&](Simd simd) {
        const RowKernels& kernels = row_kernels(dtype, simd);
        at::Tensor q = at::full({count + 1}, 7, at::kChar);
        float scale =
            kernels.quantize_int8(x.const_data_ptr(), count, q.mutable_data_ptr<int8_t>());
        at::Tensor outs = at::empty({3, count}, x.options());
        kernels.scale_int32(products.data(), scale, scales.data(), nullptr, count,
                            outs[0].mutable_data_ptr());
        kernels.scale_int32(products.data(), scale, scales.data(), x.const_data_ptr(), count,
                            outs[1].mutable_data_ptr());
        kernels.scale_float(float_products.data(), scale, scales.data(), x.const_data_ptr(), count,
                            outs[2].mutable_data_ptr());
        return std::tuple(q, scale, outs);
      };
      auto [q, scale, outs] = run(Simd::scalar);
      EXPECT_EQ(q[count].item<int>(), 7);
      EXPECT_TRUE(at::equal(outs[1], outs[2]));
      // torchao's formulas (torchao_int8_test.cpp and quantized_linear_test.cpp hold its numbers).
      at::Tensor expected_scale = (x.abs().max() / 127.5).clamp_min(0x1p-23);
      EXPECT_EQ(scale, expected_scale.item<float>());
      at::Tensor expected_q = (x.to(at::kFloat) * (1.0F / scale)).round().clamp(-128, 127);
      EXPECT_TRUE(at::equal(q.narrow(0, 0, count), expected_q.to(at::kChar)));
      at::Tensor rounded = (at::tensor(products).to(at::kFloat) * scale).to(dtype).to(at::kFloat);
      at::Tensor expected = rounded * at::tensor(scales) + x.to(at::kFloat);
      EXPECT_TRUE(at::equal(outs[1], expected.to(dtype)));
      for (Simd simd : {Simd::avx2, Simd::avx512}) {
        auto [other_q, other_scale, other_outs] = run(simd);
        EXPECT_TRUE(at::equal(other_q, q));
        EXPECT_EQ(other_scale, scale);
        EXPECT_TRUE(at::equal(other_outs, outs));
      }
    }
  }
}

TEST(RowKernels, RefusesOtherDtypes) {
  EXPECT_THROW(row_kernels(at::kDouble), ArgumentError);
}

}  // namespace
}  // namespace ferry::quant
