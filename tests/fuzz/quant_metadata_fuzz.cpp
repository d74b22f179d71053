// What checkpoints say of their quantized weights, from anywhere: {"metadata": {name: text},
// "tensors": {key: [dtype, extents...]}, "texts": {key: text}} stands for a safetensors header and
// the tensors that describe others. Refused, or weights whose components are the tensors they
// claim.
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"
#include "ferry/quant/bitsandbytes.h"
#include "ferry/quant/comfy.h"
#include "ferry/quant/torchao.h"

namespace {

using namespace ferry;
using Json = nlohmann::json;

void check(bool holds) {
  if (!holds) std::abort();
}

const Json& member(const Json& json, const char* name) {
  static const Json none = Json::object();
  auto found = json.find(name);
  return found == json.end() || !found->is_object() ? none : *found;
}

std::map<std::string, std::string> texts(const Json& json) {
  std::map<std::string, std::string> texts;
  for (const auto& [key, text] : json.items()) {
    if (text.is_string()) texts[key] = text.get<std::string>();
  }
  return texts;
}

// What io::parse_safetensors_header would let through.
std::vector<weights::StoredTensor> tensors(const Json& json) {
  std::vector<weights::StoredTensor> tensors;
  for (const auto& [key, entry] : json.items()) {
    if (!entry.is_array() || entry.empty() || !entry[0].is_string()) continue;
    std::optional<io::Dtype> dtype = io::parse_dtype(entry[0].get<std::string>());
    if (!dtype) continue;
    weights::StoredTensor tensor{.key = key, .dtype = *dtype};
    int64_t bytes = io::item_size(*dtype);
    bool valid = true;
    for (size_t i = 1; i < entry.size(); ++i) {
      valid = valid && entry[i].is_number_unsigned() &&
              entry[i].get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX);
      if (!valid) break;
      tensor.shape.push_back(entry[i].get<int64_t>());
      valid = !__builtin_mul_overflow(bytes, tensor.shape.back(), &bytes);
    }
    tensor.size_bytes = bytes;
    if (valid) tensors.push_back(std::move(tensor));
  }
  return tensors;
}

void check_weights(const quant::StoredWeights& weights, size_t tensor_count) {
  size_t used = weights.plain.size();
  for (const auto& [name, stored] : weights.quantized) {
    const std::vector<quant::Component>& components = stored.weight->components();
    check(stored.weight->shape().size() == 2 && stored.weight->rows() > 0);
    check(components.size() == stored.components.size() && !components.empty());
    uint64_t bytes = 0;
    for (size_t i = 0; i < components.size(); ++i) {
      check(components[i].dtype == stored.components[i].dtype);
      check(components[i].shape == stored.components[i].shape);
      bytes += stored.components[i].size_bytes;
    }
    check(stored.weight->size_bytes() == bytes);
    used += components.size();
  }
  check(used <= tensor_count);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Json json;
  try {
    json = io::parse_json({reinterpret_cast<const char*>(data), size}, "input");
  } catch (const Error&) {
    return 0;
  }
  if (!json.is_object()) return 0;
  const std::map<std::string, std::string> metadata = texts(member(json, "metadata"));
  const std::map<std::string, std::string> described = texts(member(json, "texts"));
  const std::vector<weights::StoredTensor> stored = tensors(member(json, "tensors"));
  auto read_text = [&](const weights::StoredTensor& tensor) {
    auto found = described.find(tensor.key);
    return found == described.end() ? std::string() : found->second;
  };
  for (int format = 0; format < 3; ++format) {
    quant::StoredWeights weights{.plain = stored};
    try {
      if (format == 0) quant::read_torchao(metadata, weights);
      if (format == 1) quant::read_bitsandbytes(weights, read_text);
      if (format == 2) quant::read_comfy(metadata, weights, read_text);
      check_weights(weights, stored.size());
    } catch (const FormatError&) {
    }
  }
  return 0;
}
