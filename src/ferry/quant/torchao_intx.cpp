#include "ferry/quant/torchao_intx.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include "ferry/base/error.h"
#include "ferry/quant/float_codes.h"
#include "ferry/quant/rows.h"

namespace ferry::quant {

namespace {

bool is_float(io::Dtype dtype) {
  return dtype == io::Dtype::F32 || dtype == io::Dtype::BF16 || dtype == io::Dtype::F16;
}

std::vector<Component> components_of(const std::vector<int64_t>& shape,
                                     const std::vector<int64_t>& block, io::Dtype scale_dtype,
                                     io::Dtype zero_point_dtype) {
  if (block.size() != 2 || block[0] < 1 || block[1] < 1 || shape[0] % block[0] != 0 ||
      shape[1] % block[1] != 0) {
    throw_error<ArgumentError>("intx weight: blocks of [{}] do not divide [{}]",
                               fmt::join(block, ", "), fmt::join(shape, ", "));
  }
  if (!is_float(scale_dtype) ||
      (!is_float(zero_point_dtype) && zero_point_dtype != io::Dtype::I8)) {
    throw_error<ArgumentError>(
        "intx weight: got scales of {} and zero points of {}, expected F32, BF16 or F16, zero "
        "points also I8",
        io::name(scale_dtype), io::name(zero_point_dtype));
  }
  std::vector<int64_t> blocks{shape[0] / block[0], shape[1] / block[1]};
  return {{"qdata", io::Dtype::I8, shape},
          {"scale", scale_dtype, blocks},
          {"zero_point", zero_point_dtype, blocks}};
}

}  // namespace

IntxWeight::IntxWeight(std::vector<int64_t> shape, std::vector<int64_t> block_size,
                       io::Dtype scale_dtype, io::Dtype zero_point_dtype)
    : QuantizedWeight(shape, components_of(shape, block_size, scale_dtype, zero_point_dtype)),
      block_size_(std::move(block_size)) {}

at::Tensor IntxWeight::dequantize(ComponentTensors components, at::ScalarType dtype) const {
  auto of_elements = [&](const at::Tensor& parameter) {
    return expand_blocks(parameter.to(at::kFloat), rows(), columns());
  };
  at::Tensor values = components[0].to(at::kFloat) - of_elements(components[2]);
  return (values * of_elements(components[1])).to(dtype);
}

void IntxWeight::dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                                 at::ScalarType dtype, void* into) const {
  const auto* values = components[0].const_data_ptr<int8_t>();
  const FloatView scales(components[1]), zeros(components[2]);
  const int64_t width = block_size_[1];
  write_rows(first, count, columns(), dtype, into, [&](int64_t row, float* out) {
    const int8_t* in = values + row * columns();
    for (int64_t begin = 0; begin < columns(); begin += width) {
      const int64_t block = row / block_size_[0] * (columns() / width) + begin / width;
      const float scale = scales[block], zero = zeros[block];
      for (int64_t k = begin; k < begin + width; ++k)
        out[k] = (static_cast<float>(in[k]) - zero) * scale;
    }
  });
}

std::shared_ptr<const QuantizedWeight> IntxWeight::with_rows(int64_t rows) const {
  if (block_size_[0] != 1) return nullptr;
  const std::vector<Component>& all = QuantizedWeight::components();
  return std::make_shared<IntxWeight>(std::vector<int64_t>{rows, columns()}, block_size_,
                                      all[1].dtype, all[2].dtype);
}

}  // namespace ferry::quant
