// The rotation of apply_rotary_emb in one pass over memory, for CPUs.
#pragma once

#include <ATen/core/Tensor.h>

namespace ferry::nn {

// x [batch, ...] of 4 dimensions with dense rows of `dim` channels; cos, sin [tokens, dim] float32,
// contiguous, on the CPU. No autograd. Rounds as the separate operations do, so the result is
// bit-equal to theirs (the file is compiled without fused multiply-add). Returns a contiguous
// tensor.
at::Tensor rotate_on_cpu(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                         int64_t sequence_dim, bool neighbours);

}  // namespace ferry::nn
