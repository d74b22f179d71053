// The base of all ferry modules: a torch::nn::Module that owns the call point, so that hooks run
// around every forward. libtorch's own ModuleHolder calls forward() directly and knows no hooks.
#pragma once

#include <torch/nn/module.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace ferry::nn {

class Module;

// A module's forward as a function of the tensors among its arguments, to run it again.
using RecomputeBody = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

// What attaches to a module. Sees the module only, never its arguments, so no signature is erased.
class ModuleHook {
 public:
  virtual ~ModuleHook() = default;
  // Before the module's body runs. May throw; then the body does not run, and only the hooks whose
  // before() returned get failed().
  virtual void before(Module& module) {}
  // After the body returned; in the reverse order of before().
  virtual void after(Module& module) {}
  // Instead of after() when the body, or a later hook's before(), threw.
  virtual void failed(Module& module) noexcept {}
  // Called after failed() of all hooks while the exception is in flight: whether to enter the
  // hooks and run the body once more. May throw another exception in its place. `failures` counts
  // those of this call, from 1.
  virtual bool retry(Module& module, int failures) { return false; }
  // The tensors that the body returned, in order; called before after(), if wants_outputs().
  virtual void outputs(Module& module, const std::vector<at::Tensor>& tensors) {}
  virtual bool wants_outputs() const { return false; }
  // With grad mode on, a call through Ptr goes through recompute() of the hook that wants it: the
  // weights that the body reads will not be there any more when autograd wants them.
  virtual bool wants_recompute() const { return false; }
  virtual std::vector<at::Tensor> recompute(Module& module, const std::vector<at::Tensor>& inputs,
                                            const RecomputeBody& body) {
    return body(inputs);
  }
  // The module's weights come and go by this hook: to() must not touch them, nor anyone load them.
  virtual bool moves_weights() const { return false; }
};

// Ownership: modules are held by shared_ptr (Ptr below) and registered with their parent, as in
// libtorch. Constructors allocate no memory for weights: parameters start as stubs (weights/stub.h)
// in float32, and loading gives them data and dtype through set_data().
// Thread-safety: as torch's modules; one forward at a time where hooks are attached.
class Module : public torch::nn::Module {
 public:
  using torch::nn::Module::Module;

  // Adds a hook at the end of the list. Throws ArgumentError if the name is taken.
  void add_hook(const std::string& name, std::shared_ptr<ModuleHook> hook);
  // Returns whether there was one.
  bool remove_hook(const std::string& name);
  std::shared_ptr<ModuleHook> find_hook(const std::string& name) const;
  // Whether a hook here moves the weights.
  bool weights_are_offloaded() const;
  // The hook through which calls go while gradients are wanted; null otherwise.
  std::shared_ptr<ModuleHook> recompute_hook() const;

  // The call point: runs the hooks around `body`. Every public entry of a module goes through it,
  // forward() by way of Ptr's operator(), others (encode, decode) by calling it themselves. A hook
  // may have the body run again after it failed, so it must not use up what it captured.
  template <class Body>
  std::invoke_result_t<Body> call(Body&& body);

  // As torch::nn::Module::to, but a stub stays a stub (of the new dtype and device). Throws
  // ArgumentError while a hook moves the weights.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

 protected:
  // Registers a parameter without memory and returns it for the typed member:
  //   weight = stub_parameter("weight", {out, in});
  at::Tensor stub_parameter(const std::string& name, at::IntArrayRef shape);
  at::Tensor stub_buffer(const std::string& name, at::IntArrayRef shape,
                         at::ScalarType dtype = at::kFloat);

  // Whether to(dtype) leaves an own tensor alone: it is not the values that it holds.
  virtual bool keeps_dtype(const std::string& tensor) const { return false; }

 private:
  class HookScope;
  void convert_own_tensors(std::optional<at::Device> device, std::optional<at::ScalarType> dtype,
                           bool non_blocking);
  template <class Body>
  std::invoke_result_t<Body&> call_hooked(Body& body);
  bool wants_retry(int failures);
  void check_may_move() const;
  std::vector<std::pair<std::string, std::shared_ptr<ModuleHook>>> hooks_;
};

// A module handle whose call runs hooks and forward(): `nn::Ptr<Linear> to_q; to_q(x)`.
template <class M>
class Ptr : public std::shared_ptr<M> {
 public:
  using std::shared_ptr<M>::shared_ptr;
  Ptr(std::shared_ptr<M> module) : std::shared_ptr<M>(std::move(module)) {}

  template <class... Args>
  auto operator()(Args&&... args) const {
    M* module = this->get();
    if (std::shared_ptr<ModuleHook> hook = module->recompute_hook())
      return recompute(*module, *hook, std::forward<Args>(args)...);
    return module->call([&] { return module->forward(args...); });
  }

 private:
  template <class... Args>
  static auto recompute(M& module, ModuleHook& hook, Args&&... args);
};

template <class M, class... Args>
Ptr<M> make(Args&&... args) {
  return Ptr<M>(std::make_shared<M>(std::forward<Args>(args)...));
}

// Lets hooks find the lists of blocks without knowing the type of the blocks.
class ModuleListBase : public Module {};

// Children of one type under the names "0", "1", … (torch.nn.ModuleList).
template <class M>
class ModuleList : public ModuleListBase {
 public:
  void push_back(Ptr<M> module) {
    register_module(std::to_string(items_.size()), module);
    items_.push_back(std::move(module));
  }
  auto begin() const { return items_.begin(); }
  auto end() const { return items_.end(); }
  size_t size() const { return items_.size(); }
  bool empty() const { return items_.empty(); }
  const Ptr<M>& operator[](size_t index) const { return items_[index]; }
  const Ptr<M>& back() const { return items_.back(); }

 private:
  std::vector<Ptr<M>> items_;
};

// A named level of the hierarchy that holds children of any type and has no forward of its own
// (torch.nn.Sequential and ModuleList with mixed members; the owner keeps the typed pointers).
class Container : public Module {
 public:
  template <class M>
  Ptr<M> add(const std::string& name, Ptr<M> module) {
    register_module(name, module);
    return module;
  }
};

// ---- implementation ----

// The tensors inside what a forward returns: a tensor, optional, pair, tuple or vector of such, or
// a struct with `std::vector<at::Tensor> tensors() const`.
void collect_tensors(const at::Tensor& value, std::vector<at::Tensor>& into);
template <class T>
void collect_tensors(const std::optional<T>& value, std::vector<at::Tensor>& into) {
  if (value) collect_tensors(*value, into);
}
template <class T>
void collect_tensors(const std::vector<T>& values, std::vector<at::Tensor>& into) {
  for (const T& value : values) collect_tensors(value, into);
}
template <class A, class B>
void collect_tensors(const std::pair<A, B>& value, std::vector<at::Tensor>& into) {
  collect_tensors(value.first, into);
  collect_tensors(value.second, into);
}
template <class... Ts>
void collect_tensors(const std::tuple<Ts...>& value, std::vector<at::Tensor>& into) {
  std::apply([&](const auto&... items) { (collect_tensors(items, into), ...); }, value);
}
template <class T>
requires requires(const T& value) {
  value.tensors();
}
void collect_tensors(const T& value, std::vector<at::Tensor>& into) {
  for (const at::Tensor& tensor : value.tensors()) collect_tensors(tensor, into);
}

// Every tensor inside a value, to read or replace: as above, and structs with
// `template <class F> void each_tensor(F&& f)` that calls f on all of theirs. Values of other types
// hold none that gradients flow through.
template <class F>
void each_tensor(at::Tensor& value, F&& f) {
  if (value.defined()) f(value);
}
template <class T, class F>
void each_tensor(std::optional<T>& value, F&& f);
template <class T, class F>
void each_tensor(std::vector<T>& values, F&& f);
template <class... Ts, class F>
void each_tensor(std::tuple<Ts...>& values, F&& f);
template <class A, class B, class F>
void each_tensor(std::pair<A, B>& value, F&& f);
template <class T, class F>
void each_tensor(T& value, F&& f) {
  if constexpr (requires { value.each_tensor(f); }) value.each_tensor(f);
}
template <class T, class F>
void each_tensor(std::optional<T>& value, F&& f) {
  if (value) each_tensor(*value, f);
}
template <class T, class F>
void each_tensor(std::vector<T>& values, F&& f) {
  for (T& value : values) each_tensor(value, f);
}
template <class... Ts, class F>
void each_tensor(std::tuple<Ts...>& values, F&& f) {
  std::apply([&](auto&... items) { (each_tensor(items, f), ...); }, values);
}
template <class A, class B, class F>
void each_tensor(std::pair<A, B>& value, F&& f) {
  each_tensor(value.first, f);
  each_tensor(value.second, f);
}

template <class M>
template <class... Args>
auto Ptr<M>::recompute(M& module, ModuleHook& hook, Args&&... args) {
  using Result = std::decay_t<decltype(module.forward(std::forward<Args>(args)...))>;
  using Arguments = std::tuple<std::decay_t<Args>...>;
  Arguments arguments(std::forward<Args>(args)...);
  std::vector<at::Tensor> inputs;
  each_tensor(arguments, [&](at::Tensor& tensor) { inputs.push_back(tensor); });
  // The result's other members, of the first run. Not owned by the body, which lives in the graph
  // that the result's tensors are the end of.
  auto result = std::make_shared<std::optional<Result>>();
  RecomputeBody body = [&module, arguments,
                        sink = std::weak_ptr(result)](const std::vector<at::Tensor>& given) {
    Arguments own = arguments;
    size_t next = 0;
    each_tensor(own, [&](at::Tensor& tensor) { tensor = given[next++]; });
    Result out = std::apply(
        [&](auto&... items) { return module.call([&] { return module.forward(items...); }); }, own);
    std::vector<at::Tensor> tensors;
    each_tensor(out, [&](at::Tensor& tensor) { tensors.push_back(tensor); });
    if (auto first = sink.lock(); first && !*first) *first = std::move(out);
    return tensors;
  };
  std::vector<at::Tensor> outputs = hook.recompute(module, inputs, body);
  Result out = std::move(**result);
  size_t next = 0;
  each_tensor(out, [&](at::Tensor& tensor) { tensor = outputs[next++]; });
  return out;
}

// Runs before() at construction, and failed() at destruction unless finish() was called.
class Module::HookScope {
 public:
  explicit HookScope(Module& module);
  ~HookScope();
  bool wants_outputs() const;
  void outputs(const std::vector<at::Tensor>& tensors);
  void finish();

 private:
  Module& module_;
  // A copy: a hook may remove itself or others while it runs.
  std::vector<std::shared_ptr<ModuleHook>> hooks_;
  size_t entered_ = 0;
};

template <class Body>
std::invoke_result_t<Body> Module::call(Body&& body) {
  if (hooks_.empty()) return std::forward<Body>(body)();
  for (int failures = 1;; ++failures) {
    try {
      return call_hooked(body);
    } catch (...) {
      if (!wants_retry(failures)) throw;
    }
  }
}

template <class Body>
std::invoke_result_t<Body&> Module::call_hooked(Body& body) {
  HookScope scope(*this);
  if constexpr (std::is_void_v<std::invoke_result_t<Body&>>) {
    body();
    scope.finish();
  } else {
    std::invoke_result_t<Body&> result = body();
    if (scope.wants_outputs()) {
      std::vector<at::Tensor> tensors;
      collect_tensors(result, tensors);
      scope.outputs(tensors);
    }
    scope.finish();
    return result;
  }
}

}  // namespace ferry::nn
