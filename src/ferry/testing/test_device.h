// Where tests that take a device compute: FERRY_TEST_DEVICE ("cuda"), else the CPU.
#pragma once

#include <ATen/Context.h>

#include <cstdlib>

#include "ferry/models/model.h"
#include "ferry/tensor/device.h"

namespace ferry::testing {

// Throws DeviceError for one that is not here: a test asked to run on a GPU never passes on the
// CPU.
inline at::Device test_device() {
  static const at::Device device = [] {
    const char* name = std::getenv("FERRY_TEST_DEVICE");
    at::Device found = tensor::parse_device(name && *name ? name : "cpu");
    // References are float32: no TF32 in convolutions, which torch allows by default.
    if (!found.is_cpu()) at::globalContext().setAllowTF32CuDNN(false);
    return found;
  }();
  return device;
}

inline models::NamedTensors to_device(models::NamedTensors tensors, at::Device device) {
  for (auto& [name, tensor] : tensors) tensor = tensor.to(device);
  return tensors;
}

}  // namespace ferry::testing
