#include "ferry/testing/fake_shapes.h"

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <array>
#include <string_view>
#include <utility>

namespace ferry::testing::fake {

namespace {

using torch::jit::Stack;

at::Tensor optional_tensor(const c10::IValue& value) {
  return value.isTensor() ? value.toTensor() : at::Tensor();
}

at::Tensor contiguous_like(const at::Tensor& like, at::IntArrayRef shape) {
  return at::empty(shape, like.options());
}

// The CPU norms compute their statistics in float32 for half precision with float32 weights.
at::TensorOptions statistics_options(const at::Tensor& input, const at::Tensor& weight) {
  bool mixed = weight.defined() && at::isReducedFloatingType(input.scalar_type()) &&
               weight.scalar_type() == at::kFloat;
  return mixed ? input.options().dtype(at::kFloat) : input.options();
}

Stack layer_norm(const Stack& in) {
  at::Tensor input = in[0].toTensor();
  return {contiguous_like(input, input.sizes())};
}

Stack native_layer_norm(const Stack& in) {
  at::Tensor input = in[0].toTensor();
  std::vector<int64_t> shape = input.sizes().vec();
  const auto axes = static_cast<int64_t>(in[1].toIntVector().size());
  for (int64_t i = input.dim() - axes; i < input.dim(); ++i) shape[static_cast<size_t>(i)] = 1;
  at::Tensor mean = at::empty(shape, statistics_options(input, optional_tensor(in[2])));
  return {contiguous_like(input, input.sizes()), mean, at::empty_like(mean)};
}

at::Tensor group_norm_output(const at::Tensor& input) {
  return at::empty(input.sizes(), input.options(), input.suggest_memory_format());
}

Stack group_norm(const Stack& in) {
  return {group_norm_output(in[0].toTensor())};
}

Stack native_group_norm(const Stack& in) {
  at::Tensor input = in[0].toTensor();
  at::Tensor mean =
      at::empty({in[3].toInt(), in[6].toInt()}, statistics_options(input, optional_tensor(in[1])));
  return {group_norm_output(input), mean, at::empty_like(mean)};
}

int64_t item(const std::vector<int64_t>& values, size_t i) {
  return values.size() == 1 ? values[0] : values[i];
}

// input [batch, in, spatial...], weight [out, in / groups, kernel...]; unbatched inputs lack batch.
at::Tensor convolution_output(const at::Tensor& input, const at::Tensor& weight,
                              const std::vector<int64_t>& stride,
                              const std::vector<int64_t>& padding,
                              const std::vector<int64_t>& dilation, bool transposed,
                              const std::vector<int64_t>& output_padding, int64_t groups) {
  const int64_t spatial = weight.dim() - 2;
  std::vector<int64_t> shape;
  if (input.dim() == weight.dim()) shape.push_back(input.size(0));
  shape.push_back(transposed ? weight.size(1) * groups : weight.size(0));
  for (int64_t d = 0; d < spatial; ++d) {
    const auto i = static_cast<size_t>(d);
    const int64_t size = input.size(input.dim() - spatial + d);
    const int64_t reach = item(dilation, i) * (weight.size(2 + d) - 1);
    shape.push_back(transposed ? (size - 1) * item(stride, i) - 2 * item(padding, i) + reach +
                                     item(output_padding, i) + 1
                               : (size + 2 * item(padding, i) - reach - 1) / item(stride, i) + 1);
  }
  bool channels_last =
      input.dim() == 4 && (input.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                           weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
  return at::empty(shape, input.options(),
                   channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

Stack conv2d(const Stack& in) {
  return {convolution_output(in[0].toTensor(), in[1].toTensor(), in[3].toIntVector(),
                             in[4].toIntVector(), in[5].toIntVector(), false, {0}, in[6].toInt())};
}

Stack convolution(const Stack& in) {
  return {convolution_output(in[0].toTensor(), in[1].toTensor(), in[3].toIntVector(),
                             in[4].toIntVector(), in[5].toIntVector(), in[6].toBool(),
                             in[7].toIntVector(), in[8].toInt())};
}

// The CPU's flash kernel writes [batch, tokens, heads, head_dim].
Stack attention(const Stack& in) {
  at::Tensor query = in[0].toTensor(), value = in[2].toTensor();
  std::vector<int64_t> shape = query.sizes().vec();
  shape.back() = value.size(-1);
  if (query.dim() != 4) return {contiguous_like(query, shape)};
  std::swap(shape[1], shape[2]);
  return {contiguous_like(query, shape).transpose(1, 2)};
}

Stack attention_math(const Stack& in) {
  at::Tensor query = in[0].toTensor(), key = in[1].toTensor(), value = in[2].toTensor();
  std::vector<int64_t> shape = query.sizes().vec(), weights = shape;
  shape.back() = value.size(-1);
  weights.back() = key.size(-2);
  return {contiguous_like(query, shape), contiguous_like(query, weights)};
}

Stack index_select(const Stack& in) {
  at::Tensor self = in[0].toTensor();
  if (self.dim() == 0) return {contiguous_like(self, {})};
  std::vector<int64_t> shape = self.sizes().vec();
  const int64_t dim = in[1].toInt();
  shape[static_cast<size_t>(dim < 0 ? dim + self.dim() : dim)] = in[2].toTensor().numel();
  return {contiguous_like(self, shape)};
}

at::Tensor broadcast(const std::vector<at::Tensor>& inputs, at::ScalarType dtype) {
  at::TensorIteratorConfig config;
  const at::Tensor fresh;
  config.set_check_mem_overlap(false).check_all_same_dtype(false).allow_cpu_scalars(true);
  config.add_owned_output(fresh);
  for (const at::Tensor& input : inputs) config.add_const_input(input);
  return config.declare_static_dtype_and_device(dtype, at::kMeta).build().output();
}

Stack where(const Stack& in) {
  at::Tensor self = in[1].toTensor(), other = in[2].toTensor();
  return {broadcast({in[0].toTensor(), self, other}, at::result_type(self, other))};
}

Stack isnan(const Stack& in) {
  return {broadcast({in[0].toTensor()}, at::kBool)};
}

Stack int_mm(const Stack& in) {
  at::Tensor self = in[0].toTensor(), other = in[1].toTensor();
  return {at::empty({self.size(0), other.size(1)}, self.options().dtype(at::kInt))};
}

Stack in_place(const Stack& in) {
  return {in[0]};
}

Stack like_first(const Stack& in) {
  return {at::empty_like(in[0].toTensor())};
}

// Where the meta device has no kernel in C++, or one that is not the CPU's.
constexpr std::array<std::pair<std::string_view, Stack (*)(const Stack&)>, 17> kRules{{
    {"aten::layer_norm", layer_norm},
    {"aten::native_layer_norm", native_layer_norm},
    {"aten::group_norm", group_norm},
    {"aten::native_group_norm", native_group_norm},
    {"aten::conv2d", conv2d},
    {"aten::convolution", convolution},
    {"aten::scaled_dot_product_attention", attention},
    {"aten::_scaled_dot_product_attention_math", attention_math},
    {"aten::index_select", index_select},
    {"aten::where.self", where},
    {"aten::isnan", isnan},
    {"aten::flip", like_first},
    {"aten::relu", like_first},
    {"aten::masked_fill_.Scalar", in_place},
    {"aten::masked_fill_.Tensor", in_place},
    {"aten::_index_put_impl_", in_place},
    {"aten::_int_mm", int_mm},
}};

// Elementwise out= and in-place forms: the result's size is that of the inputs together.
std::optional<Stack> pointwise(const c10::OperatorHandle& op, const Stack& in) {
  if (!op.hasTag(at::Tag::pointwise) || op.schema().returns().size() != 1) return std::nullopt;
  std::vector<at::Tensor> inputs;
  at::Tensor written;
  bool out = false;
  for (size_t i = 0; i < in.size(); ++i) {
    if (!in[i].isTensor() || !in[i].toTensor().defined()) continue;
    const c10::Argument& argument = op.schema().arguments()[i];
    if (argument.alias_info() && argument.alias_info()->isWrite()) {
      if (written.defined()) return std::nullopt;
      written = in[i].toTensor();
      out = argument.is_out();
    } else {
      inputs.push_back(in[i].toTensor());
    }
  }
  if (!written.defined() || (out && inputs.empty())) return std::nullopt;
  if (out) {
    at::Tensor result = broadcast(inputs, written.scalar_type());
    if (!result.sizes().equals(written.sizes())) written.set_(result);
  }
  return Stack{written};
}

// Boolean masks index by their values.
bool indexes_by_mask(const Stack& in) {
  for (const c10::IValue& value : in) {
    if (!value.isOptionalTensorList()) continue;
    for (const std::optional<at::Tensor>& index : value.toOptionalTensorVector()) {
      if (index && index->defined() &&
          (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte))
        return true;
    }
  }
  return false;
}

}  // namespace

std::optional<Stack> infer_results(const c10::OperatorHandle& op, const Stack& arguments) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::OperatorName& name = op.operator_name();
  std::string full = name.name;
  if (!name.overload_name.empty()) full += "." + name.overload_name;
  if (indexes_by_mask(arguments) || op.hasTag(at::Tag::dynamic_output_shape)) return std::nullopt;
  for (const auto& [known, rule] : kRules) {
    if (known == full) return rule(arguments);
  }
  if (op.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta)) {
    // A kernel of several out= arguments returns references into the stack that is gone by then.
    const Stack keep = arguments;
    Stack stack = arguments;
    try {
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
      return stack;
    } catch (const c10::NotImplementedError&) {
      // Only the fallback that says so: the kernel proper is Python's.
    }
  }
  return pointwise(op, arguments);
}

}  // namespace ferry::testing::fake
