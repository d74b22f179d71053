#include "ferry/quant/torchao_int8.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/ranges.h>

#include <cstddef>

#include "ferry/base/error.h"
#include "ferry/quant/row_kernels.h"
#include "ferry/tensor/dtype.h"

namespace ferry::quant {

namespace {

void check_blocks(at::IntArrayRef shape, at::IntArrayRef block) {
  bool pairs = shape.size() == 2 && block.size() == 2;
  for (size_t i = 0; pairs && i < 2; ++i) pairs = shape[i] > 0 && block[i] > 0;
  if (!pairs || shape[0] % block[0] != 0 || shape[1] % block[1] != 0) {
    throw_error<ArgumentError>(
        "int8 weight: got shape [{}] with block_size [{}], expected two dimensions and a block "
        "that divides them",
        fmt::join(shape, ", "), fmt::join(block, ", "));
  }
}

std::vector<Component> components_of(at::IntArrayRef shape, at::IntArrayRef block,
                                     bool has_zero_point, io::Dtype scale_dtype) {
  check_blocks(shape, block);
  std::vector<int64_t> blocks{shape[0] / block[0], shape[1] / block[1]};
  std::vector<Component> components{{"qdata", io::Dtype::I8, shape.vec()},
                                    {"scale", scale_dtype, blocks}};
  if (has_zero_point) components.push_back({"zero_point", io::Dtype::I8, blocks});
  return components;
}

// [out, in] as [out / b0, b0, in / b1, b1]: a block's values in dimensions 1 and 3.
at::Tensor by_blocks(const at::Tensor& tensor, at::IntArrayRef block) {
  return tensor.reshape({tensor.size(0) / block[0], block[0], tensor.size(1) / block[1], block[1]});
}

// A value a block, against by_blocks().
at::Tensor per_block(const at::Tensor& values) {
  return values.unsqueeze(1).unsqueeze(3);
}

// A scale a row, by the vectorised kernel: as fast as memory.
Int8Components quantize_rows(const at::Tensor& weight) {
  const RowKernels& kernels = row_kernels(weight.scalar_type());
  at::Tensor rows = weight.contiguous();
  const int64_t columns = rows.size(1), row_bytes = columns * static_cast<int64_t>(rows.itemsize());
  at::Tensor q = at::empty(rows.sizes(), rows.options().dtype(at::kChar).requires_grad(false));
  at::Tensor scale = at::empty({rows.size(0), 1}, q.options().dtype(at::kFloat));
  const auto* from = static_cast<const std::byte*>(rows.const_data_ptr());
  auto* into = q.mutable_data_ptr<int8_t>();
  auto* scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, rows.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scales[row] = kernels.quantize_int8(from + row * row_bytes, columns, into + row * columns);
    }
  });
  return {q, scale, at::zeros_like(scale, at::kChar)};
}

}  // namespace

Int8Weight::Int8Weight(std::vector<int64_t> shape, std::vector<int64_t> block_size,
                       bool has_zero_point, io::Dtype scale_dtype, Activation activation)
    : QuantizedWeight(shape, components_of(shape, block_size, has_zero_point, scale_dtype)),
      block_size_(std::move(block_size)),
      has_zero_point_(has_zero_point),
      activation_(activation) {
  at::ScalarType scale = tensor::to_torch(scale_dtype);
  if (scale != at::kFloat && scale != at::kBFloat16 && scale != at::kHalf) {
    throw_error<ArgumentError>("int8 weight: got scales of {}, expected F32, BF16 or F16",
                               io::name(scale_dtype));
  }
  if (activation != Activation::as_is && activation != Activation::int8_per_token) {
    throw_error<ArgumentError>("int8 weight: its input is quantized to int8 per token, or not");
  }
  if (activation == Activation::int8_per_token && block_size_[1] != columns()) {
    throw_error<ArgumentError>(
        "int8 weight: with a dynamically quantized input a scale spans the row; got blocks of {} "
        "of {} columns",
        block_size_[1], columns());
  }
}

std::string_view Int8Weight::scheme() const {
  return activation_ == Activation::as_is ? "TorchAO int8"
                                          : "TorchAO int8, int8 dynamic activation";
}

at::Tensor Int8Weight::dequantize(ComponentTensors components, at::ScalarType dtype) const {
  at::Tensor values = by_blocks(components[0].to(at::kFloat), block_size_);
  if (has_zero_point_) values = values - per_block(components[2].to(at::kFloat));
  values = values * per_block(components[1].to(at::kFloat));
  return values.view(shape()).to(dtype);
}

void Int8Weight::dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                                 at::ScalarType dtype, void* into) const {
  const RowKernels& kernels = row_kernels(dtype);
  const int64_t group = block_size_[1], groups = columns() / group;
  const int64_t first_block = first / block_size_[0];
  const int64_t blocks = (first + count - 1) / block_size_[0] - first_block + 1;
  at::Tensor qdata = components[0].contiguous();
  auto floats = [&](const at::Tensor& values) {
    return values.narrow(0, first_block, blocks).to(at::kFloat).contiguous();
  };
  at::Tensor scale = floats(components[1]);
  at::Tensor zero = has_zero_point_ ? floats(components[2]) : at::Tensor();
  const auto* q = qdata.const_data_ptr<int8_t>() + first * columns();
  auto* out = static_cast<std::byte*>(into);
  const auto row_bytes = static_cast<int64_t>(columns() * c10::elementSize(dtype));
  for (int64_t i = 0; i < count; ++i, q += columns(), out += row_bytes) {
    int64_t block = (first + i) / block_size_[0] - first_block;
    kernels.int8(q, scale.const_data_ptr<float>() + block * groups,
                 has_zero_point_ ? zero.const_data_ptr<float>() + block * groups : nullptr, group,
                 columns(), out);
  }
}

std::optional<ScaledMatrix> Int8Weight::as_scaled_matrix(ComponentTensors components) const {
  bool by_row = block_size_[0] == 1 || block_size_[0] == rows();
  // The zero points of a dynamically quantized layer are zeros; torchao's kernel ignores them too.
  if (!by_row || block_size_[1] != columns() || activation_ == Activation::as_is) return {};
  return ScaledMatrix{components[0], components[1].to(at::kFloat)};
}

std::shared_ptr<const QuantizedWeight> Int8Weight::with_rows(int64_t rows) const {
  std::vector<int64_t> block = block_size_;
  if (block[0] == this->rows() && block[1] == columns()) block[0] = rows;  // one scale in all
  if (block[0] != 1 && block[0] != rows) return nullptr;
  return std::make_shared<Int8Weight>(std::vector<int64_t>{rows, columns()}, std::move(block),
                                      has_zero_point_, QuantizedWeight::components()[1].dtype,
                                      activation_);
}

Int8Components quantize_int8(const at::Tensor& weight, at::IntArrayRef block_size) {
  check_blocks(weight.sizes(), block_size);
  if (weight.is_cpu() && block_size[0] == 1 && block_size[1] == weight.size(1)) {
    return quantize_rows(weight);
  }
  at::Tensor blocks = by_blocks(weight.detach(), block_size);
  // In the weight's own dtype, as torchao does: the scale of a bfloat16 weight is a bfloat16.
  at::Tensor scale = (blocks.abs().amax({1, 3}, /*keepdim=*/true) / 127.5).clamp_min(0x1p-23);
  scale = scale.to(at::kFloat);
  at::Tensor values = (blocks * scale.reciprocal()).round().clamp(-128, 127).to(at::kChar);
  scale = scale.squeeze(3).squeeze(1);
  return {values.reshape(weight.sizes()), scale, at::zeros_like(scale, at::kChar)};
}

}  // namespace ferry::quant
