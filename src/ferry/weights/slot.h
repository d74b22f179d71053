// Slots: every tensor of a module that a checkpoint fills, in order, plain and quantized alike.
// Whoever moves, saves, counts or compares weights works on slots and on nothing else.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <string>
#include <vector>

namespace ferry::weights {

struct Slot {
  // Dotted names below the root; more than one where parameters are tied.
  std::vector<std::string> names;
  // The registered tensor: swap its data with set_data(), never assign it.
  at::Tensor tensor;
  bool is_buffer = false;

  const std::string& name() const { return names.front(); }
  at::IntArrayRef shape() const { return tensor.sizes(); }
  at::ScalarType dtype() const { return tensor.scalar_type(); }
  // Bytes of the real weight, also while the slot holds a stub.
  uint64_t size_bytes() const { return tensor.numel() * tensor.element_size(); }
};

// The parameters and buffers of `root` in registration order, depth first (the order of Python's
// state_dict); tied tensors once. A module keeps tensors that no checkpoint holds (position ids,
// rotary frequencies) as plain members and does not register them.
std::vector<Slot> collect_slots(const torch::nn::Module& root);

// Counts changes in place of the tensor, or of what it shares its counter with. 0 always for a
// tensor that was made in inference mode: it has no counter, so that only other data is noticed.
uint32_t version_of(const at::Tensor& tensor);

// Sum of size_bytes().
uint64_t total_bytes(const std::vector<Slot>& slots);

}  // namespace ferry::weights
