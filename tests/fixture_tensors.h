// Tensors of a safetensors fixture, read with as little code as possible: fixtures are trusted.
#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace ferry::testing {

inline nlohmann::ordered_json read_fixture_json(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("no fixture " + path);
  return nlohmann::ordered_json::parse(file);
}

inline std::map<std::string, at::Tensor> read_fixture_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("no fixture " + path);
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  static const std::map<std::string, at::ScalarType> dtypes = {
      {"F32", at::kFloat}, {"F64", at::kDouble}, {"BF16", at::kBFloat16},
      {"F16", at::kHalf},  {"I64", at::kLong},   {"I32", at::kInt},
      {"I8", at::kChar},   {"U8", at::kByte},    {"BOOL", at::kBool}};
  std::map<std::string, at::Tensor> tensors;
  const nlohmann::json header = nlohmann::json::parse(bytes.substr(8, length));
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    at::Tensor tensor =
        at::empty(entry["shape"].get<std::vector<int64_t>>(), dtypes.at(entry["dtype"]));
    std::memcpy(tensor.data_ptr(),
                bytes.data() + 8 + length + entry["data_offsets"][0].get<size_t>(),
                tensor.nbytes());
    tensors[name] = tensor;
  }
  return tensors;
}

// The greatest difference, relative to the expected tensor's greatest magnitude.
inline double relative_error(const at::Tensor& got, const at::Tensor& expected) {
  if (got.sizes() != expected.sizes()) return 1e30;
  if (expected.numel() == 0) return 0.0;
  double scale = expected.to(at::kDouble).abs().max().item<double>();
  double error = (got.to(at::kDouble) - expected.to(at::kDouble)).abs().max().item<double>();
  return error / (scale > 0 ? scale : 1.0);
}

}  // namespace ferry::testing
