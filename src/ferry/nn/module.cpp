#include "ferry/nn/module.h"

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/weights/stub.h"

namespace ferry::nn {

void Module::add_hook(const std::string& name, std::shared_ptr<ModuleHook> hook) {
  if (find_hook(name))
    throw_error<ArgumentError>("{}: a hook named '{}' is attached already", this->name(), name);
  hooks_.emplace_back(name, std::move(hook));
}

bool Module::remove_hook(const std::string& name) {
  return std::erase_if(hooks_, [&](const auto& entry) { return entry.first == name; }) > 0;
}

std::shared_ptr<ModuleHook> Module::find_hook(const std::string& name) const {
  for (const auto& [key, hook] : hooks_) {
    if (key == name) return hook;
  }
  return nullptr;
}

// Replaces the data of every own tensor; children go through their own virtual to().
void Module::convert_own_tensors(std::optional<at::Device> device,
                                 std::optional<at::ScalarType> dtype, bool non_blocking) {
  auto convert = [&](const std::string& name, at::Tensor& tensor) {
    if (!tensor.defined()) return;
    bool casts = dtype && at::isFloatingType(tensor.scalar_type()) && !keeps_dtype(name);
    at::ScalarType to_dtype = casts ? *dtype : tensor.scalar_type();
    at::Device to_device = device.value_or(tensor.device());
    if (weights::is_stub(tensor)) {
      tensor.set_data(weights::make_stub(tensor.sizes(), to_dtype, to_device));
    } else {
      tensor.set_data(tensor.to(to_device, to_dtype, non_blocking));
    }
  };
  for (auto& entry : named_parameters(/*recurse=*/false)) convert(entry.key(), entry.value());
  for (auto& entry : named_buffers(/*recurse=*/false)) convert(entry.key(), entry.value());
}

bool Module::weights_are_offloaded() const {
  return std::any_of(hooks_.begin(), hooks_.end(),
                     [](const auto& entry) { return entry.second->moves_weights(); });
}

std::shared_ptr<ModuleHook> Module::recompute_hook() const {
  if (hooks_.empty() || !at::GradMode::is_enabled() || c10::InferenceMode::is_enabled())
    return nullptr;
  for (const auto& entry : hooks_) {
    if (entry.second->wants_recompute()) return entry.second;
  }
  return nullptr;
}

bool Module::wants_retry(int failures) {
  // A copy: a hook may remove itself or others.
  const auto hooks = hooks_;
  return std::any_of(hooks.begin(), hooks.end(),
                     [&](const auto& entry) { return entry.second->retry(*this, failures); });
}

void Module::check_may_move() const {
  if (!weights_are_offloaded()) return;
  throw ArgumentError(
      "group offloading is on, so the weights move by themselves; remove it first, or load with "
      "the "
      "dtype and device that are wanted");
}

void Module::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  check_may_move();
  for (auto& child : children()) child->to(device, dtype, non_blocking);
  convert_own_tensors(device, dtype, non_blocking);
}

void Module::to(torch::Dtype dtype, bool non_blocking) {
  check_may_move();
  for (auto& child : children()) child->to(dtype, non_blocking);
  convert_own_tensors(std::nullopt, dtype, non_blocking);
}

void Module::to(torch::Device device, bool non_blocking) {
  check_may_move();
  for (auto& child : children()) child->to(device, non_blocking);
  convert_own_tensors(device, std::nullopt, non_blocking);
}

at::Tensor Module::stub_parameter(const std::string& name, at::IntArrayRef shape) {
  return register_parameter(name, weights::make_stub(shape, at::kFloat), /*requires_grad=*/false);
}

at::Tensor Module::stub_buffer(const std::string& name, at::IntArrayRef shape,
                               at::ScalarType dtype) {
  return register_buffer(name, weights::make_stub(shape, dtype));
}

void collect_tensors(const at::Tensor& value, std::vector<at::Tensor>& into) {
  if (value.defined()) into.push_back(value);
}

Module::HookScope::HookScope(Module& module) : module_(module) {
  hooks_.reserve(module.hooks_.size());
  for (const auto& entry : module.hooks_) hooks_.push_back(entry.second);
  try {
    for (; entered_ < hooks_.size(); ++entered_) hooks_[entered_]->before(module_);
  } catch (...) {
    while (entered_ > 0) hooks_[--entered_]->failed(module_);
    throw;
  }
}

Module::HookScope::~HookScope() {
  while (entered_ > 0) hooks_[--entered_]->failed(module_);
}

bool Module::HookScope::wants_outputs() const {
  return std::any_of(hooks_.begin(), hooks_.end(),
                     [](const auto& hook) { return hook->wants_outputs(); });
}

void Module::HookScope::outputs(const std::vector<at::Tensor>& tensors) {
  for (const auto& hook : hooks_) {
    if (hook->wants_outputs()) hook->outputs(module_, tensors);
  }
}

void Module::HookScope::finish() {
  while (entered_ > 0) {
    --entered_;  // first, so that a throwing after() is not followed by failed() of the same hook
    hooks_[entered_]->after(module_);
  }
}

}  // namespace ferry::nn
