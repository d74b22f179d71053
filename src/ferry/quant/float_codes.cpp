#include "ferry/quant/float_codes.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "ferry/base/error.h"

namespace ferry::quant {

namespace {

using Table = std::array<float, 256>;

template <class Float8>
Table table_of() {
  Table table;
  for (int byte = 0; byte < 256; ++byte)
    table[byte] = static_cast<float>(Float8(static_cast<uint8_t>(byte), Float8::from_bits()));
  return table;
}

Table exponents() {
  Table table;
  for (int byte = 0; byte < 255; ++byte) table[byte] = std::ldexp(1.0f, byte - 127);
  table[255] = std::numeric_limits<float>::quiet_NaN();
  return table;
}

}  // namespace

std::span<const float, 256> byte_values(io::Dtype dtype) {
  static const Table e4m3 = table_of<c10::Float8_e4m3fn>();
  static const Table e5m2 = table_of<c10::Float8_e5m2>();
  static const Table e8m0 = exponents();
  switch (dtype) {
    case io::Dtype::F8_E4M3:
      return e4m3;
    case io::Dtype::F8_E5M2:
      return e5m2;
    case io::Dtype::F8_E8M0:
      return e8m0;
    default:
      throw_error<ArgumentError>("got {}, expected F8_E4M3, F8_E5M2 or F8_E8M0", io::name(dtype));
  }
}

std::span<const float, 16> e2m1_values() {
  static constexpr std::array<float, 16> values = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,
                                                   4.0f,  6.0f,  -0.0f, -0.5f, -1.0f, -1.5f,
                                                   -2.0f, -3.0f, -4.0f, -6.0f};
  return values;
}

at::Tensor look_up(const at::Tensor& codes, std::span<const float> table) {
  at::Tensor values = at::empty({static_cast<int64_t>(table.size())}, at::kFloat);
  std::copy(table.begin(), table.end(), values.mutable_data_ptr<float>());
  return values.to(codes.device())
      .index_select(0, codes.flatten().to(at::kInt))
      .view(codes.sizes());
}

at::Tensor unpack_nibbles(const at::Tensor& bytes, bool high_first) {
  at::Tensor low = bytes.bitwise_and(15), high = bytes.bitwise_right_shift(4);
  std::vector<int64_t> shape = bytes.sizes().vec();
  shape.back() *= 2;
  return at::stack({high_first ? high : low, high_first ? low : high}, -1).view(shape);
}

at::Tensor expand_blocks(const at::Tensor& values, int64_t rows, int64_t columns) {
  const int64_t a = values.size(0), b = values.size(1);
  return values.view({a, 1, b, 1}).expand({a, rows / a, b, columns / b}).reshape({rows, columns});
}

}  // namespace ferry::quant
