#include "ferry/quant/torchao_int4_tile_packed.h"

#include <ATen/ATen.h>

#include "ferry/base/error.h"
#include "ferry/quant/rows.h"

namespace ferry::quant {

namespace {

int64_t padded_rows(int64_t rows) {
  return (rows + 7) / 8 * 8;
}
int64_t padded_columns(int64_t columns) {
  return (columns + 1023) / 1024 * 1024;
}

std::vector<Component> components_of(const std::vector<int64_t>& shape, int64_t group_size) {
  if (group_size < 1 || 1024 % group_size != 0) {
    throw_error<ArgumentError>(
        "tile-packed int4 weight: got groups of {}, expected a divisor of "
        "1024",
        group_size);
  }
  const int64_t n = padded_rows(shape[0]), k = padded_columns(shape[1]);
  return {{"qdata", io::Dtype::I32, {n / 8, k / 128, 32, 4}},
          {"scale_and_zero", io::Dtype::BF16, {k / group_size, n, 2}}};
}

}  // namespace

// Where value (n, k) is: tile [n / 8, k / 128]; lane 4 * (n % 8) + (k % 8) / 2; word (k % 128) /
// 32; in the word, even columns in the low half and odd ones in the high half, and there nibble (k
// % 32) / 8.

Int4TilePackedWeight::Int4TilePackedWeight(std::vector<int64_t> shape, int64_t group_size)
    : QuantizedWeight(shape, components_of(shape, group_size)), group_size_(group_size) {}

at::Tensor Int4TilePackedWeight::dequantize(ComponentTensors components,
                                            at::ScalarType dtype) const {
  const int64_t n = padded_rows(rows()), k = padded_columns(columns());
  at::Tensor shifts =
      at::arange(0, 32, 4, at::kInt).view({2, 4}).t().contiguous();  // [nibble, odd]
  at::Tensor values = components[0]
                          .view({n / 8, k / 128, 8, 4, 4, 1, 1})  // [.., n % 8, lane % 4, word]
                          .bitwise_right_shift(shifts.to(components[0].device()))
                          .bitwise_and(15);
  // -> [n / 8, n % 8, k / 128, word, nibble, lane % 4, odd]
  values = values.permute({0, 2, 1, 4, 5, 3, 6}).reshape({n, k / group_size_, group_size_});
  at::Tensor parameters = components[1].to(at::kFloat).transpose(0, 1);  // [n, groups, 2]
  values = (values - 8).to(at::kFloat) * parameters.select(2, 0).unsqueeze(2) +
           parameters.select(2, 1).unsqueeze(2);
  return values.view({n, k}).narrow(0, 0, rows()).narrow(1, 0, columns()).to(dtype).contiguous();
}

void Int4TilePackedWeight::dequantize_rows(ComponentTensors components, int64_t first,
                                           int64_t count, at::ScalarType dtype, void* into) const {
  const int64_t n = padded_rows(rows()), tiles = padded_columns(columns()) / 128;
  const auto* words = components[0].const_data_ptr<int32_t>();
  const auto* parameters = components[1].const_data_ptr<c10::BFloat16>();
  write_rows(first, count, columns(), dtype, into, [&](int64_t row, float* out) {
    for (int64_t k = 0; k < columns(); ++k) {
      const int64_t lane = row % 8 * 4 + k % 8 / 2;
      const int64_t word = ((row / 8 * tiles + k / 128) * 32 + lane) * 4 + k % 128 / 32;
      const int shift = static_cast<int>(k % 2 * 16 + k % 32 / 8 * 4);
      const int value = (words[word] >> shift & 15) - 8;
      const c10::BFloat16* group = parameters + (k / group_size_ * n + row) * 2;
      float product = static_cast<float>(value) * static_cast<float>(group[0]);
      out[k] = product + static_cast<float>(group[1]);
    }
  });
}

}  // namespace ferry::quant
