#include "ferry/quant/tensor_pool.h"

#include <ATen/core/Tensor.h>
#include <fmt/ranges.h>

#include "ferry/base/error.h"
#include "ferry/weights/binding.h"

namespace ferry::quant {

std::string read_bytes(const weights::StoredTensor& tensor) {
  at::Tensor bytes = weights::read_stored(tensor);
  return {static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()};
}

TensorPool::TensorPool(StoredWeights& weights)
    : weights_(weights), taken_(weights.plain.size(), false) {
  by_key_.reserve(weights.plain.size());
  for (size_t i = 0; i < weights.plain.size(); ++i) by_key_.emplace(weights.plain[i].key, i);
}

const weights::StoredTensor* TensorPool::find(const std::string& key) const {
  auto entry = by_key_.find(key);
  return entry == by_key_.end() ? nullptr : &weights_.plain[entry->second];
}

const weights::StoredTensor& TensorPool::get(const std::string& key,
                                             const std::string& parameter) const {
  const weights::StoredTensor* tensor = find(key);
  if (!tensor) {
    throw_error<FormatError>(
        "{}: quantized parameter '{}': its component '{}' is missing; the checkpoint is incomplete",
        where(key), parameter, key);
  }
  return *tensor;
}

void TensorPool::join(const std::string& parameter, std::shared_ptr<const QuantizedWeight> weight,
                      const std::vector<std::string>& keys) {
  StoredQuantized stored{weight, {}};
  for (size_t i = 0; i < keys.size(); ++i) {
    const Component& component = weight->components()[i];
    const weights::StoredTensor& tensor = get(keys[i], parameter);
    if (tensor.dtype != component.dtype || tensor.shape != component.shape) {
      throw_error<FormatError>(
          "{}: quantized parameter '{}' ({}, [{}]): component '{}' is {} [{}], expected {} [{}]",
          where(keys[i]), parameter, weight->scheme(), fmt::join(weight->shape(), ", "), keys[i],
          io::name(tensor.dtype), fmt::join(tensor.shape, ", "), io::name(component.dtype),
          fmt::join(component.shape, ", "));
    }
    stored.components.push_back(tensor);
  }
  if (!weights_.quantized.emplace(parameter, std::move(stored)).second) {
    throw_error<FormatError>("{}: parameter '{}' is described twice", where(keys.front()),
                             parameter);
  }
  for (const std::string& key : keys) drop(key);
}

void TensorPool::drop(const std::string& key) {
  auto entry = by_key_.find(key);
  if (entry != by_key_.end()) taken_[entry->second] = true;
}

void TensorPool::reshape(const std::string& key, const std::vector<int64_t>& shape) {
  auto entry = by_key_.find(key);
  if (entry != by_key_.end()) weights_.plain[entry->second].shape = shape;
}

void TensorPool::commit() {
  std::vector<weights::StoredTensor> kept;
  for (size_t i = 0; i < taken_.size(); ++i) {
    if (!taken_[i]) kept.push_back(std::move(weights_.plain[i]));
  }
  weights_.plain = std::move(kept);
  by_key_.clear();
  taken_.clear();
}

std::string TensorPool::where(const std::string& key) const {
  const weights::StoredTensor* tensor = find(key);
  if (tensor) return tensor->file ? tensor->file->path().string() : "checkpoint";
  // A key that is not there belongs to the checkpoint as a whole: its first file tells which.
  return weights_.plain.empty() || !weights_.plain.front().file
             ? "checkpoint"
             : weights_.plain.front().file->path().string();
}

void check_matrix(const std::vector<int64_t>& shape, const std::string& where,
                  const std::string& parameter) {
  constexpr int64_t kMaxExtent = int64_t{1} << 30;  // products of two, and their bytes, fit int64_t
  bool in_range = shape.size() == 2;
  for (int64_t extent : shape) in_range = in_range && extent >= 1 && extent <= kMaxExtent;
  if (!in_range) {
    throw_error<FormatError>(
        "{}: quantized parameter '{}' has shape [{}], expected a linear layer's [out, in]: ferry "
        "computes with quantized weights in linear layers only",
        where, parameter, fmt::join(shape, ", "));
  }
}

std::shared_ptr<const QuantizedWeight> make_weight(
    const std::string& where, const std::string& parameter,
    const std::function<std::shared_ptr<const QuantizedWeight>()>& make) {
  try {
    return make();
  } catch (const ArgumentError& error) {
    throw_error<FormatError>("{}: quantized parameter '{}': {}", where, parameter, error.what());
  }
}

}  // namespace ferry::quant
