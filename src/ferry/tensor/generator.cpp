#include "ferry/tensor/generator.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <mutex>

#include "ferry/base/error.h"

namespace ferry::tensor {

namespace {

at::Generator new_generator(at::Device device) {
  if (device.is_cpu()) return at::make_generator<at::CPUGeneratorImpl>();
  try {
    return at::globalContext()
        .getAcceleratorHooksInterface(device.type())
        .getNewGenerator(device.index());
  } catch (const c10::Error& error) {
    throw_error<DeviceError>("a random generator on {}: {}", device.str(),
                             error.what_without_backtrace());
  }
}

}  // namespace

Generator::Generator(at::Device device) : impl_(new_generator(device)) {}

Generator& Generator::manual_seed(uint64_t seed) {
  std::lock_guard lock(impl_.mutex());
  impl_.set_current_seed(seed);
  return *this;
}

uint64_t Generator::seed() {
  std::lock_guard lock(impl_.mutex());
  return impl_.seed();
}

uint64_t Generator::initial_seed() const {
  at::Generator shared = impl_;  // current_seed() is not const
  return shared.current_seed();
}

at::Tensor Generator::get_state() const {
  at::Generator shared = impl_;  // nor is mutex()
  std::lock_guard lock(shared.mutex());
  return shared.get_state();
}

void Generator::set_state(const at::Tensor& state) {
  std::lock_guard lock(impl_.mutex());
  try {
    impl_.set_state(state);
  } catch (const c10::Error& error) {
    throw_error<ArgumentError>("Generator::set_state: {}", error.what_without_backtrace());
  }
}

at::Tensor randn_tensor(at::IntArrayRef shape, const std::vector<Generator>& generators,
                        at::ScalarType dtype, at::Device device) {
  at::Device draw_device = device;
  if (!generators.empty()) {
    at::Device have = generators.front().device();
    if (have.type() != device.type()) {
      if (!have.is_cpu()) {
        throw_error<ArgumentError>(
            "randn_tensor: cannot make a tensor on {} with a generator on {}; use one on the "
            "CPU, or one on {}",
            device.str(), have.str(), device.str());
      }
      draw_device = have;
    }
  }
  auto options = at::TensorOptions().dtype(dtype).device(draw_device);
  if (generators.size() < 2) {
    std::optional<at::Generator> generator;
    if (!generators.empty()) generator = generators.front().impl();
    return at::randn(shape, generator, options).to(device);
  }
  if (shape.empty() || static_cast<int64_t>(generators.size()) < shape[0]) {
    throw_error<ArgumentError>(
        "randn_tensor: got {} generators for a batch of {}; pass one generator, or one for each "
        "sample",
        generators.size(), shape.empty() ? 0 : shape[0]);
  }
  std::vector<int64_t> sample_shape = shape.vec();
  sample_shape[0] = 1;
  std::vector<at::Tensor> samples;
  for (int64_t i = 0; i < shape[0]; ++i)
    samples.push_back(at::randn(sample_shape, generators[i].impl(), options));
  if (samples.empty()) return at::empty(shape, options).to(device);
  return at::cat(samples, 0).to(device);
}

}  // namespace ferry::tensor
