// Shapes of the results of operations on the fake accelerator, without computing them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <optional>

namespace ferry::testing::fake {

// The results of `op` for `arguments`, whose tensors are on the meta device: one IValue a return,
// each a meta tensor of the size, strides and dtype that the CPU kernel would give. Written
// arguments of `arguments` may be resized, as out= arguments are. nullopt: depends on the data, or
// nobody knows.
std::optional<torch::jit::Stack> infer_results(const c10::OperatorHandle& op,
                                               const torch::jit::Stack& arguments);

}  // namespace ferry::testing::fake
