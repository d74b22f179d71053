// How operations run on the fake accelerator: the CPU's kernels over the device's bytes, in the
// order of the current stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace ferry::testing::fake {

// A CPU tensor over the bytes of a device tensor, without ownership. For jobs: the host must not
// look into it.
at::Tensor cpu_alias(const at::Tensor& tensor);

// The kernel of every operation that has none of its own. Shapes come from fake_shapes.h and the
// work is enqueued; where a shape depends on data, the host waits.
void run_boxed(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack);
// The autograd kernel of composite operations that run_boxed takes whole: recorded through their
// parts where a gradient is wanted.
void run_boxed_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                        torch::jit::Stack* stack);

}  // namespace ferry::testing::fake
