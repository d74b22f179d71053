#include "ferry/quant/torchao_int4.h"

#include <ATen/ATen.h>

#include "ferry/base/error.h"
#include "ferry/quant/row_kernels.h"
#include "ferry/quant/rows.h"
#include "ferry/tensor/dtype.h"

namespace ferry::quant {

namespace {

void check_groups(at::IntArrayRef shape, int64_t group_size) {
  if (shape.size() != 2 || shape[1] % 2 != 0 || group_size < 2 || group_size % 2 != 0 ||
      shape[1] % group_size != 0) {
    throw_error<ArgumentError>(
        "int4 weight: got {} columns in groups of {}, expected an even number of columns and "
        "groups that divide it",
        shape.size() == 2 ? shape[1] : 0, group_size);
  }
}

std::vector<Component> components_of(const std::vector<int64_t>& shape, int64_t group_size,
                                     io::Dtype scale_dtype) {
  check_groups(shape, group_size);
  std::vector<int64_t> groups{shape[1] / group_size, shape[0]};
  return {{"qdata", io::Dtype::I8, {shape[0], shape[1] / 2}},
          {"scale", scale_dtype, groups},
          {"zero_point", scale_dtype, groups}};
}

}  // namespace

Int4Weight::Int4Weight(std::vector<int64_t> shape, int64_t group_size, io::Dtype scale_dtype,
                       Activation activation)
    : QuantizedWeight(shape, components_of(shape, group_size, scale_dtype)),
      group_size_(group_size),
      activation_(activation) {
  at::ScalarType scale = tensor::to_torch(scale_dtype);
  if (scale != at::kFloat && scale != at::kBFloat16 && scale != at::kHalf) {
    throw_error<ArgumentError>("int4 weight: got scales of {}, expected F32, BF16 or F16",
                               io::name(scale_dtype));
  }
  if (activation != Activation::as_is && activation != Activation::float8_per_token)
    throw_error<ArgumentError>("int4 weight: its input is quantized to float8 per token, or not");
}

at::Tensor Int4Weight::dequantize(ComponentTensors components, at::ScalarType dtype) const {
  const at::Tensor& packed = components[0];
  at::Tensor low = packed.bitwise_and(15).bitwise_xor(8).sub(8);  // the sign is bit 3
  at::Tensor high = packed.bitwise_right_shift(4);                // of int8, so it keeps its sign
  const int64_t groups = columns() / group_size_;
  at::Tensor values = at::stack({low, high}, 2).view({rows(), groups, group_size_}).to(at::kFloat);
  auto of_group = [](const at::Tensor& parameter) {
    return parameter.to(at::kFloat).t().unsqueeze(2);
  };
  values = values * of_group(components[1]) + of_group(components[2]);
  return values.view(shape()).to(dtype);
}

void Int4Weight::dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                                 at::ScalarType dtype, void* into) const {
  const RowKernels& kernels = row_kernels(dtype);
  const auto* packed = static_cast<const uint8_t*>(components[0].const_data_ptr());
  const FloatView scales(components[1]), zeros(components[2]);
  const int64_t groups = columns() / group_size_;
  std::vector<float> scale(groups), zero(groups);
  auto* out = static_cast<std::byte*>(into);
  for (int64_t row = first; row < first + count; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      scale[group] = scales[group * rows() + row];
      zero[group] = zeros[group * rows() + row];
    }
    kernels.int4(packed + row * columns() / 2, scale.data(), zero.data(), group_size_, columns(),
                 out);
    out += columns() * c10::elementSize(dtype);
  }
}

Int4Components quantize_int4(const at::Tensor& weight, int64_t group_size) {
  check_groups(weight.sizes(), group_size);
  const int64_t rows = weight.size(0), columns = weight.size(1), groups = columns / group_size;
  at::Tensor values = weight.detach().to(at::kFloat).reshape({rows * groups, group_size});
  at::Tensor least = values.amin(1, /*keepdim=*/true);
  at::Tensor scale = (values.amax(1, /*keepdim=*/true) - least).clamp_min(1e-6) / 15;
  at::Tensor zero_point = least + scale * 8;
  at::Tensor codes = ((values - least) / scale).round().clamp(0, 15) - 8;
  codes = codes.to(at::kChar).view({rows, columns / 2, 2});
  at::Tensor packed =
      codes.select(2, 0).bitwise_and(15).bitwise_or(codes.select(2, 1).bitwise_left_shift(4));
  auto transposed = [&](const at::Tensor& parameter) {
    return parameter.view({rows, groups}).t().contiguous().to(weight.scalar_type());
  };
  return {packed, transposed(scale), transposed(zero_point)};
}

}  // namespace ferry::quant
