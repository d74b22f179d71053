#include "ferry/hooks/recompute.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <mutex>

namespace ferry::hooks {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor generator_state() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  std::lock_guard lock(generator.mutex());
  return generator.get_state();
}

void set_generator_state(const at::Tensor& state) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  std::lock_guard lock(generator.mutex());
  generator.set_state(state);
}

struct Call : torch::CustomClassHolder {
  nn::RecomputeBody body;
  std::function<std::shared_ptr<void>()> hold;
  at::Tensor generator_state;
};

struct Recompute : torch::autograd::Function<Recompute> {
  // `inputs` end with a tensor that requires grad, so that there is a backward also where only
  // parameters want one.
  static variable_list forward(AutogradContext* context, at::TensorList inputs,
                               const c10::intrusive_ptr<Call>& call) {
    call->generator_state = generator_state();
    context->save_for_backward(inputs.vec());
    context->saved_data["call"] = c10::IValue::make_capsule(call);
    return call->body(inputs.slice(0, inputs.size() - 1).vec());
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto call =
        c10::static_intrusive_pointer_cast<Call>(context->saved_data["call"].toCapsule());
    const variable_list saved = context->get_saved_variables();
    const std::shared_ptr<void> held = call->hold();

    const at::Tensor now = generator_state();
    set_generator_state(call->generator_state);
    struct Restore {
      const at::Tensor& state;
      ~Restore() { set_generator_state(state); }
    } restore{now};

    at::AutoGradMode with_graph(true);
    variable_list inputs;
    for (size_t i = 0; i + 1 < saved.size(); ++i) {
      at::Tensor input = saved[i].detach();
      if (saved[i].requires_grad()) input.requires_grad_();
      inputs.push_back(input);
    }
    const variable_list outputs = call->body(inputs);
    variable_list roots, root_gradients;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!outputs[i].requires_grad() || !gradients[i].defined()) continue;
      roots.push_back(outputs[i]);
      root_gradients.push_back(gradients[i]);
    }
    if (!roots.empty()) torch::autograd::backward(roots, root_gradients);

    variable_list result;
    for (const at::Tensor& input : inputs)
      result.push_back(input.requires_grad() ? input.grad() : at::Tensor());
    result.emplace_back();  // the tensor that is there for its requires_grad
    result.emplace_back();  // the call
    return result;
  }
};

bool any_requires_grad(const std::vector<at::Tensor>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

}  // namespace

std::vector<at::Tensor> recompute_in_backward(const nn::Module& module,
                                              const std::vector<at::Tensor>& inputs,
                                              const nn::RecomputeBody& body,
                                              std::function<std::shared_ptr<void>()> hold) {
  if (!any_requires_grad(inputs) && !any_requires_grad(module.parameters())) return body(inputs);
  auto call = c10::make_intrusive<Call>();
  call->body = body;
  call->hold = std::move(hold);
  variable_list variables = inputs;
  variables.push_back(at::zeros({1}).requires_grad_());
  return Recompute::apply(at::TensorList(variables), call);
}

}  // namespace ferry::hooks
