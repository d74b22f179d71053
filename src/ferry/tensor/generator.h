// Random numbers with torch.Generator's semantics, so that a seed gives Python's noise.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace ferry::tensor {

// torch.Generator. Copies share one state, as references in Python do. Each method is thread-safe;
// the order of draws of several threads is not defined.
class Generator {
 public:
  // With torch.Generator's fixed default seed. Throws DeviceError for a device without generators.
  explicit Generator(at::Device device = at::Device(at::kCPU));
  explicit Generator(at::Generator generator) : impl_(std::move(generator)) {}

  // Python's negative seeds are their two's complement: manual_seed(-1) is manual_seed(2^64 - 1).
  Generator& manual_seed(uint64_t seed);
  // Seeds from the system's randomness and returns the seed.
  uint64_t seed();
  uint64_t initial_seed() const;
  // A byte tensor, interchangeable with Python's get_state() of the same torch version.
  at::Tensor get_state() const;
  // Throws ArgumentError for a state of another kind of generator.
  void set_state(const at::Tensor& state);
  at::Device device() const { return impl_.device(); }

  const at::Generator& impl() const { return impl_; }

 private:
  at::Generator impl_;
};

// diffusers.utils.torch_utils.randn_tensor: normal numbers of `shape` ([batch, ...]) and `dtype` on
// `device`. No generator draws from torch's default one; one draws the whole batch; a longer list
// draws one sample of the batch from each. CPU generators draw on the CPU and the result is moved,
// so a seed gives the same noise on every device. Throws ArgumentError for a list shorter than the
// batch, or a generator of another accelerator.
at::Tensor randn_tensor(at::IntArrayRef shape, const std::vector<Generator>& generators = {},
                        at::ScalarType dtype = at::kFloat,
                        at::Device device = at::Device(at::kCPU));

}  // namespace ferry::tensor
