// Checkpoints that real libraries wrote (tools/parity/quant_fixtures.py), read and dequantized.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "ferry/quant/stored_weights.h"
#include "ferry/weights/binding.h"

namespace ferry::quant {

inline std::filesystem::path fixture(const std::string& name) {
  return std::filesystem::path(FERRY_FIXTURES) / "quant" / name;
}

inline std::vector<at::Tensor> read_components(const StoredQuantized& stored) {
  std::vector<at::Tensor> components;
  for (const weights::StoredTensor& tensor : stored.components)
    components.push_back(weights::read_stored(tensor));
  return components;
}

inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         std::memcmp(a.contiguous().const_data_ptr(), b.contiguous().const_data_ptr(),
                     a.nbytes()) == 0;
}

// The rows of `weight` by dequantize_rows(), `step` at a time.
inline at::Tensor by_rows(const QuantizedWeight& weight, ComponentTensors components,
                          at::ScalarType dtype, int64_t step) {
  at::Tensor rows = at::empty(weight.shape(), dtype);
  for (int64_t first = 0; first < weight.rows(); first += step) {
    int64_t count = std::min(step, weight.rows() - first);
    weight.dequantize_rows(components, first, count, dtype, rows[first].data_ptr());
  }
  return rows;
}

// float32 equal to `expected` bit for bit; other dtypes that, rounded once; rows equal to the
// whole.
inline void expect_dequantizes(const StoredQuantized& stored, const at::Tensor& expected) {
  std::vector<at::Tensor> components = read_components(stored);
  ASSERT_EQ(stored.weight->shape(), expected.sizes());
  EXPECT_TRUE(same_bits(stored.weight->dequantize(components, at::kFloat), expected));
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    SCOPED_TRACE(c10::toString(dtype));
    at::Tensor rounded = expected.to(dtype);
    EXPECT_TRUE(same_bits(stored.weight->dequantize(components, dtype), rounded));
    EXPECT_TRUE(same_bits(by_rows(*stored.weight, components, dtype, 1), rounded));
    EXPECT_TRUE(same_bits(by_rows(*stored.weight, components, dtype, 7), rounded));
  }
}

// The quantized weights of `checkpoint` are the parameters of `<name>.expected.safetensors`.
inline StoredWeights expect_fixture(const weights::Checkpoint& checkpoint, const std::string& name,
                                    const nlohmann::ordered_json& config = nullptr) {
  StoredWeights weights = read_weights(checkpoint, config);
  auto expected = weights::Checkpoint::open_file(fixture(name + ".expected.safetensors"));
  EXPECT_EQ(weights.quantized.size(), expected->tensors().size());
  for (const weights::StoredTensor& tensor : expected->tensors()) {
    SCOPED_TRACE(tensor.key);
    auto found = weights.quantized.find(tensor.key);
    if (found == weights.quantized.end()) {
      ADD_FAILURE() << "not read as quantized";
      continue;
    }
    expect_dequantizes(found->second, weights::read_stored(tensor));
  }
  return weights;
}

inline StoredWeights expect_fixture(const std::string& name,
                                    const nlohmann::ordered_json& config = nullptr) {
  return expect_fixture(*weights::Checkpoint::open_file(fixture(name + ".safetensors")), name,
                        config);
}

inline std::vector<std::string> plain_names(const StoredWeights& weights) {
  std::vector<std::string> names;
  for (const weights::StoredTensor& tensor : weights.plain) names.push_back(tensor.key);
  return names;
}

// A checkpoint's description, to be damaged.
struct Damaged {
  explicit Damaged(const std::string& name) {
    auto checkpoint = weights::Checkpoint::open_file(fixture(name + ".safetensors"));
    metadata = checkpoint->metadata();
    weights.plain = checkpoint->tensors();
  }
  weights::StoredTensor& tensor(const std::string& key) {
    for (weights::StoredTensor& tensor : weights.plain) {
      if (tensor.key == key) return tensor;
    }
    throw std::runtime_error("no tensor " + key);
  }
  void remove(const std::string& key) {
    std::erase_if(weights.plain, [&](const auto& tensor) { return tensor.key == key; });
  }
  // In the text of a metadata entry.
  void replace(const std::string& key, const std::string& from, const std::string& to) {
    std::string& text = metadata.at(key);
    size_t at = text.find(from);
    if (at == std::string::npos) throw std::runtime_error("no " + from + " in " + text);
    text.replace(at, from.size(), to);
  }

  std::map<std::string, std::string> metadata;
  StoredWeights weights;
};

}  // namespace ferry::quant
