// A stub stands for a weight that is not here: right shape and dtype, a few bytes of memory.
#pragma once

#include <ATen/core/Tensor.h>

namespace ferry::weights {

// One NaN element (a poison value for integers: the lowest; true for bool), expanded to `shape`.
// NaN, because a kernel that reads a stub must never give a plausible result. Takes set_data() both
// ways. Any dtype; on the CPU unless `device` says otherwise.
at::Tensor make_stub(at::IntArrayRef shape, at::ScalarType dtype,
                     at::Device device = at::Device(at::kCPU));

// True for a tensor from make_stub, also after set_data. (A real weight of one element is no stub:
// stubs carry a mark in their storage, not in their strides.)
bool is_stub(const at::Tensor& tensor);

}  // namespace ferry::weights
