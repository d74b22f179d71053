#include "ferry/testing/fake_dispatch.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/InferenceMode.h>

#include <functional>
#include <limits>
#include <string>
#include <unordered_map>
#include <vector>

#include "ferry/testing/fake_generator.h"
#include "ferry/testing/fake_memory.h"
#include "ferry/testing/fake_shapes.h"
#include "ferry/testing/fake_streams.h"

namespace ferry::testing::fake {

namespace {

using torch::jit::Stack;

std::string full_name(const c10::OperatorHandle& op) {
  const c10::OperatorName& name = op.operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

void keep_wrapped_number(const at::Tensor& from, const at::Tensor& to) {
  if (from.unsafeGetTensorImpl()->is_wrapped_number())
    to.unsafeGetTensorImpl()->set_wrapped_number(true);
}

// The same tensor becomes the same tensor: kernels compare identities for overlap.
class TensorMap {
 public:
  explicit TensorMap(std::function<at::Tensor(const at::Tensor&)> convert)
      : convert_(std::move(convert)) {}

  at::Tensor operator()(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    auto [it, fresh] = seen_.try_emplace(tensor.unsafeGetTensorImpl());
    if (fresh) {
      it->second = convert_(tensor);
      keep_wrapped_number(tensor, it->second);
    }
    return it->second;
  }

  c10::IValue operator()(const c10::IValue& value) {
    if (value.isTensor()) return (*this)(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back((*this)(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorVector()) {
        if (tensor) tensor = (*this)(*tensor);
        list.push_back(std::move(tensor));
      }
      return list;
    }
    return value;
  }

  Stack operator()(const Stack& stack) {
    Stack out;
    for (const c10::IValue& value : stack) out.push_back((*this)(value));
    return out;
  }

 private:
  std::function<at::Tensor(const at::Tensor&)> convert_;
  std::unordered_map<const c10::TensorImpl*, at::Tensor> seen_;
};

at::Tensor to_meta(const at::Tensor& tensor) {
  // Under Python some meta kernels are Python's, which want numbers as numbers.
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number() && tensor.is_cpu()) return tensor;
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
}

// A host scalar is read when the operation is enqueued, as a GPU's launch does.
at::Tensor to_cpu(const at::Tensor& tensor) {
  return tensor.is_cpu() ? tensor.clone() : cpu_alias(tensor);
}

// Indices may be on the host, as for CUDA: they are copied.
void move_indices(const c10::OperatorHandle& op, Stack& arguments) {
  for (c10::IValue& value : arguments) {
    if (!value.isOptionalTensorList()) continue;
    c10::List<std::optional<at::Tensor>> list;
    for (std::optional<at::Tensor> index : value.toOptionalTensorVector()) {
      if (index && index->defined() && index->is_cpu())
        index = index->to(FakeAccelerator::device());
      list.push_back(std::move(index));
    }
    value = list;
  }
}

void check_devices(const c10::OperatorHandle& op, const Stack& arguments) {
  auto check = [&](const at::Tensor& tensor, size_t i) {
    if (!tensor.defined() || tensor.is_privateuseone()) return;
    if (tensor.is_cpu() && tensor.dim() == 0) return;
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but argument '",
                op.schema().arguments()[i].name(), "' of ", full_name(op), " is on ",
                tensor.device(), ", other tensors on ", FakeAccelerator::device());
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = arguments[i];
    if (value.isTensor()) check(value.toTensor(), i);
    if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) check(tensor, i);
    }
  }
}

bool writes(const c10::Argument& argument) {
  return argument.alias_info() && argument.alias_info()->isWrite();
}

// The CPU's kernels take the CPU's generators.
void take_cpu_generators(Stack& arguments) {
  for (c10::IValue& value : arguments) {
    if (value.isGenerator()) value = cpu_generator(value.toGenerator());
  }
}

// normal_, uniform_, random_, …: what is written depends on nothing but the generator.
bool draws(const c10::OperatorHandle& op, const Stack& arguments) {
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) return false;
  size_t tensors = 0;
  for (const c10::IValue& value : arguments) tensors += value.isTensor() ? 1 : 0;
  return tensors == 1 && op.schema().returns().size() == 1 && arguments[0].isTensor() &&
         writes(op.schema().arguments()[0]);
}

// The argument that a return is, for in-place and out= operations; -1: a new tensor.
int64_t returned_argument(const c10::OperatorHandle& op, size_t result) {
  const c10::AliasInfo* alias = op.schema().returns()[result].alias_info();
  if (!alias) return -1;
  TORCH_CHECK(alias->isWrite(), "fake accelerator: ", full_name(op),
              " gives a view, and has no kernel here; add one to fake_operators.cpp");
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (writes(arguments[i]) && arguments[i].alias_info()->beforeSets() == alias->beforeSets())
      return static_cast<int64_t>(i);
  }
  TORCH_CHECK(false, "fake accelerator: ", full_name(op), " returns an argument that it lacks");
}

at::Tensor empty_on_device(const at::Tensor& like) {
  return at::empty_strided(like.sizes(), like.strides(),
                           like.options().device(FakeAccelerator::device()).pinned_memory(false));
}

// Runs the CPU kernel; gives the results.
Stack run_on_cpu(const c10::OperatorHandle& op, const Stack& arguments) {
  Stack stack = arguments;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  return stack;
}

// ---- the shapes are known: enqueue ----

// out= arguments take the size that the shapes say.
void resize_written(const c10::OperatorHandle& op, const Stack& arguments, const Stack& metas) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!writes(op.schema().arguments()[i]) || !arguments[i].isTensor()) continue;
    at::Tensor real = arguments[i].toTensor(), meta = metas[i].toTensor();
    if (!real.defined() || real.sizes().equals(meta.sizes())) continue;
    real.resize_(meta.sizes());
    if (!real.strides().equals(meta.strides()))
      real.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes(), meta.strides());
  }
}

void check_result(const c10::OperatorHandle& op, const at::Tensor& result,
                  const at::Tensor& planned) {
  TORCH_CHECK(
      result.sizes().equals(planned.sizes()) && result.scalar_type() == planned.scalar_type(),
      "fake accelerator: ", full_name(op), " gave ", result.sizes(), " ", result.scalar_type(),
      " where ", planned.sizes(), " ", planned.scalar_type(),
      " was planned; correct fake_shapes.cpp");
}

Stack enqueue(const c10::OperatorHandle& op, const Stack& arguments, const Stack& metas,
              const Stack& results) {
  resize_written(op, arguments, metas);
  TensorMap aliases(to_cpu);
  Stack cpu_arguments = aliases(arguments), returned;
  // Result -> the CPU tensor over the device memory that takes it.
  std::vector<std::pair<size_t, at::Tensor>> targets;
  for (size_t i = 0; i < results.size(); ++i) {
    if (int64_t argument = returned_argument(op, i); argument >= 0) {
      returned.push_back(arguments[static_cast<size_t>(argument)]);
      continue;
    }
    at::Tensor fresh = results[i].toTensor();
    if (fresh.defined()) {
      fresh = empty_on_device(fresh);
      targets.emplace_back(i, cpu_alias(fresh));
    }
    returned.push_back(fresh);
  }
  Streams& streams = Streams::get();
  auto run = [op, cpu_arguments = std::move(cpu_arguments), targets = std::move(targets)] {
    Stack results = run_on_cpu(op, cpu_arguments);
    for (const auto& [i, target] : targets) {
      check_result(op, results[i].toTensor(), target);
      target.copy_(results[i].toTensor());
    }
  };
  streams.enqueue(streams.current(),
                  {.kind = JobKind::operation, .name = full_name(op), .run = std::move(run)});
  return returned;
}

// ---- the shapes depend on the data: the host waits ----

at::Tensor copy_to_device(const at::Tensor& cpu, at::Tensor into = {}) {
  if (!cpu.defined()) return cpu;
  if (!into.defined()) into = empty_on_device(cpu);
  if (!into.sizes().equals(cpu.sizes())) into.resize_(cpu.sizes());
  Streams& streams = Streams::get();
  streams.enqueue(streams.current(),
                  {.run = [cpu, target = cpu_alias(into)] { target.copy_(cpu); }});
  return into;
}

// Numbers are drawn at the call, as a GPU's launch takes its part of the sequence then: the next
// draw, and a new seed, may come from the host before the stream gets here.
Stack draw(const c10::OperatorHandle& op, const Stack& arguments) {
  at::Tensor written = arguments[0].toTensor();
  Stack cpu_arguments = arguments;
  cpu_arguments[0] = at::empty_strided(written.sizes(), written.strides(),
                                       written.options().device(at::kCPU).pinned_memory(false));
  Stack results = run_on_cpu(op, cpu_arguments);
  Streams& streams = Streams::get();
  streams.enqueue(streams.current(), {.kind = JobKind::operation,
                                      .name = full_name(op),
                                      .run = [cpu = results[0].toTensor(),
                                              target = cpu_alias(written)] { target.copy_(cpu); }});
  return {arguments[0]};
}

Stack run_synchronously(const c10::OperatorHandle& op, const Stack& arguments) {
  const auto& schema = op.schema();
  TensorMap aliases(to_cpu);
  Stack cpu_arguments = aliases(arguments);
  for (size_t i = 0; i < arguments.size(); ++i) {
    // A kernel cannot resize memory that is not its own.
    if (schema.arguments()[i].is_out() && arguments[i].isTensor())
      cpu_arguments[i] = at::empty({0}, arguments[i].toTensor().options().device(at::kCPU));
  }
  Stack results;
  Streams& streams = Streams::get();
  streams.enqueue(streams.current(), {.kind = JobKind::operation,
                                      .name = full_name(op),
                                      .run = [&] { results = run_on_cpu(op, cpu_arguments); }});
  streams.synchronize(streams.current(), full_name(op));

  Stack returned;
  for (size_t i = 0; i < results.size(); ++i) {
    if (int64_t argument = returned_argument(op, i); argument >= 0) {
      const auto at = static_cast<size_t>(argument);
      if (schema.arguments()[at].is_out() && arguments[at].isTensor())
        copy_to_device(cpu_arguments[at].toTensor(), arguments[at].toTensor());
      returned.push_back(arguments[at]);
    } else {
      TensorMap to_device([](const at::Tensor& tensor) { return copy_to_device(tensor); });
      returned.push_back(to_device(results[i]));
    }
  }
  return returned;
}

bool is_attention_without_dropout(const c10::OperatorHandle& op, const Stack& arguments) {
  const std::optional<int> index = op.schema().argumentIndexWithName("dropout_p");
  return index && arguments[static_cast<size_t>(*index)].toDouble() == 0;
}

Stack run(const c10::OperatorHandle& op, const Stack& arguments) {
  // Only in this order is what is drawn the CPU's sequence.
  if (op.hasTag(at::Tag::nondeterministic_seeded) && !is_attention_without_dropout(op, arguments))
    return run_synchronously(op, arguments);
  TensorMap meta(to_meta);
  const Stack metas = meta(arguments);
  std::optional<Stack> results = infer_results(op, metas);
  bool all_tensors = results.has_value();
  for (size_t i = 0; all_tensors && i < results->size(); ++i)
    all_tensors = (*results)[i].isTensor();
  return all_tensors ? enqueue(op, arguments, metas, *results) : run_synchronously(op, arguments);
}

// The composite asks the device for its fused kernels, of which this one has none.
void differentiable_attention(Stack& stack) {
  const Stack in = torch::jit::pop(stack, 8);
  at::Tensor query = in[0].toTensor();
  std::optional<at::Tensor> mask = in[3].toOptional<at::Tensor>();
  if (mask && mask->scalar_type() == at::kBool) {
    mask = at::zeros_like(*mask, query.options())
               .masked_fill_(mask->logical_not(), -std::numeric_limits<double>::infinity());
  }
  at::Tensor out = std::get<0>(at::_scaled_dot_product_attention_math(
      query, in[1].toTensor(), in[2].toTensor(), mask, in[4].toDouble(), in[5].toBool(), {},
      in[6].toOptional<double>(), in[7].toBool()));
  stack.push_back(std::move(out));
}

}  // namespace

at::Tensor cpu_alias(const at::Tensor& tensor) {
  // An ordinary tensor also in inference mode: the worker is not in it.
  c10::InferenceMode off(false);
  return at::from_blob(DeviceMemory::get().bytes(tensor.unsafeGetTensorImpl()->data()),
                       tensor.sizes(), tensor.strides(),
                       at::TensorOptions().dtype(tensor.scalar_type()));
}

void run_boxed(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  Stack arguments(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  move_indices(op, arguments);
  check_devices(op, arguments);
  take_cpu_generators(arguments);
  Stack returned;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    returned = draws(op, arguments) ? draw(op, arguments) : run(op, arguments);
  }
  torch::jit::drop(*stack, count);
  for (c10::IValue& value : returned) stack->push_back(std::move(value));
}

void run_boxed_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  bool gradient = false;
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (at::GradMode::is_enabled() && value.isTensor() && value.toTensor().defined())
      gradient = gradient || value.toTensor().requires_grad();
  }
  if (gradient && op.operator_name().name == "aten::scaled_dot_product_attention") {
    differentiable_attention(*stack);
  } else if (gradient) {
    op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, *stack);
  } else {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
}

}  // namespace ferry::testing::fake
