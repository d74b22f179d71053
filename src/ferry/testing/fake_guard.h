// The parts of the fake accelerator (fake_accelerator.h) that libtorch calls for any device type.
#pragma once

namespace ferry::testing::fake {

// Device guard (current device and stream, events), accelerator hooks, allocators, the name "fake".
void register_device();
// Kernels and the fallback for all others (fake_operators.cpp).
void register_operators();

}  // namespace ferry::testing::fake
