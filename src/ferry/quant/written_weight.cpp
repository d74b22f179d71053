#include "ferry/quant/written_weight.h"

#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "ferry/quant/bitsandbytes_4bit.h"
#include "ferry/quant/float8.h"
#include "ferry/quant/torchao_int4.h"
#include "ferry/quant/torchao_int8.h"
#include "ferry/tensor/dtype.h"

namespace ferry::quant {

namespace {

using Json = nlohmann::ordered_json;

Json dtype_json(const std::string& name) {
  return {{"_type", "torch.dtype"}, {"_data", name}};
}
Json enum_json(const char* type, const char* member) {
  return {{"_type", type}, {"_data", member}};
}
Json per_row_json() {
  return {{"_type", "PerRow"}, {"_data", {{"dim", -1}}}};
}

Json entry_json(const char* type, Json attributes, const std::vector<std::string>& components) {
  return {{"_type", type}, {"_data", std::move(attributes)}, {"_tensor_data_names", components}};
}

Json entry_of(const Int8Weight& weight, const std::string& dtype) {
  Json activation = nullptr;
  if (weight.activation() == Activation::int8_per_token) {
    activation = {{"_type", "QuantizeTensorToInt8Kwargs"},
                  {"_data",
                   {{"granularity", per_row_json()},
                    {"mapping_type", enum_json("MappingType", "SYMMETRIC")},
                    {"reduce_range", false}}}};
  }
  std::vector<std::string> components{"qdata", "scale"};
  if (weight.has_zero_point()) components.insert(components.begin(), "zero_point");
  return entry_json("Int8Tensor",
                    {{"act_quant_kwargs", activation},
                     {"reduce_range", false},
                     {"block_size", weight.block_size().vec()},
                     {"dtype", dtype_json(dtype)}},
                    components);
}

Json entry_of(const Float8Weight& weight, const std::string& dtype) {
  if (!weight.options().scale_shape || weight.options().scale_shape->size() != 2) {
    throw_error<ArgumentError>("{} without scales of two dimensions cannot be written as TorchAO's",
                               weight.scheme());
  }
  Json multiplication = nullptr, activation = nullptr;
  if (weight.activation() != Activation::as_is) {
    multiplication = {
        {"_type", "Float8MMConfig"},
        {"_data", {{"emulate", false}, {"use_fast_accum", true}, {"pad_inner_dim", false}}}};
    Json granularity = per_row_json();
    if (weight.activation() == Activation::float8_per_tensor)
      granularity = {{"_type", "PerTensor"}, {"_data", Json::object()}};
    activation = {{"_type", "QuantizeTensorToFloat8Kwargs"},
                  {"_data",
                   {{"float8_dtype", dtype_json("float8_e4m3fn")},
                    {"granularity", granularity},
                    {"mm_config", nullptr},
                    {"hp_value_lb", nullptr},
                    {"hp_value_ub", nullptr},
                    {"kernel_preference", enum_json("KernelPreference", "AUTO")}}}};
  }
  return entry_json("Float8Tensor",
                    {{"block_size", {weight.block_rows(), weight.block_columns()}},
                     {"mm_config", multiplication},
                     {"act_quant_kwargs", activation},
                     {"kernel_preference", enum_json("KernelPreference", "AUTO")},
                     {"dtype", dtype_json(dtype)}},
                    {"qdata", "scale"});
}

Json entry_of(const Int4Weight& weight) {
  const bool float8 = weight.activation() == Activation::float8_per_token;
  return entry_json("Int4Tensor",
                    {{"activation_dtype", dtype_json(float8 ? "float8_e4m3fn" : "bfloat16")},
                     {"block_size", {1, weight.group_size()}},
                     {"shape", {weight.rows(), weight.columns()}}},
                    {"qdata", "scale", "zero_point"});
}

WrittenWeight as_torchao(const std::string& parameter, const QuantizedWeight& weight,
                         const Json& entry) {
  const size_t dot = parameter.rfind('.');
  if (dot == std::string::npos) {
    throw_error<ArgumentError>("'{}': TorchAO cannot hold a quantized parameter of the root",
                               parameter);
  }
  const std::string prefix = parameter.substr(0, dot) + "._" + parameter.substr(dot + 1) + "_";
  WrittenWeight written;
  for (size_t i = 0; i < weight.components().size(); ++i) {
    const Component& component = weight.components()[i];
    written.tensors.push_back({prefix + component.name, component.dtype, component.shape, i});
  }
  written.metadata = entry.dump();
  return written;
}

WrittenWeight as_bitsandbytes(const std::string& parameter, const BitsAndBytes4bitWeight& weight,
                              const std::string& dtype) {
  const BitsAndBytes4bitWeight::Options& options = weight.options();
  if (options.nested) throw_error<ArgumentError>("{} with nesting is not written", weight.scheme());
  const Json state = {{"quant_type", options.quant_type},
                      {"blocksize", options.block_size},
                      {"dtype", dtype},
                      {"shape", {weight.rows(), weight.columns()}}};
  WrittenWeight written;
  for (size_t i = 0; i < weight.components().size(); ++i) {
    const Component& component = weight.components()[i];
    const std::string suffix = component.name == "qdata" ? "" : "." + component.name;
    written.tensors.push_back({parameter + suffix, component.dtype, component.shape, i});
  }
  const std::string text = state.dump();
  written.tensors.push_back({parameter + ".quant_state.bitsandbytes__" + options.quant_type,
                             io::Dtype::U8,
                             {static_cast<int64_t>(text.size())},
                             std::nullopt,
                             text});
  return written;
}

}  // namespace

WrittenWeight written_weight(const std::string& parameter, const QuantizedWeight& weight,
                             at::ScalarType dtype) {
  const std::string name = tensor::dtype_name(dtype);
  if (const auto* int8 = dynamic_cast<const Int8Weight*>(&weight))
    return as_torchao(parameter, weight, entry_of(*int8, name));
  if (const auto* float8 = dynamic_cast<const Float8Weight*>(&weight))
    return as_torchao(parameter, weight, entry_of(*float8, name));
  if (const auto* int4 = dynamic_cast<const Int4Weight*>(&weight))
    return as_torchao(parameter, weight, entry_of(*int4));
  if (const auto* codes = dynamic_cast<const BitsAndBytes4bitWeight*>(&weight))
    return as_bitsandbytes(parameter, *codes, name);
  throw_error<ArgumentError>("'{}': ferry does not write {}", parameter, weight.scheme());
}

std::map<std::string, std::string> torchao_metadata(
    const std::vector<std::pair<std::string, std::string>>& entries) {
  std::map<std::string, std::string> metadata{{"format", "pt"}};
  Json names = Json::array();
  for (const auto& [name, entry] : entries) {
    names.push_back(name);
    metadata[name] = entry.empty() ? R"({"_type": "Tensor"})" : entry;
  }
  metadata["tensor_names"] = names.dump();
  return metadata;
}

}  // namespace ferry::quant
