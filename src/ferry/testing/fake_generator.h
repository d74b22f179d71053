// Generators of the fake accelerator (fake_accelerator.h): at::Generator("fake"). They draw the
// CPU's sequence: a seed gives on the device what it gives on the CPU.
#pragma once

#include <ATen/core/Generator.h>

namespace ferry::testing::fake {

at::Generator new_generator();
// The CPU generator behind one of these; any other is returned as it is.
at::Generator cpu_generator(const at::Generator& generator);

}  // namespace ferry::testing::fake
