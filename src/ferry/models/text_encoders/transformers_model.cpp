#include "ferry/models/text_encoders/transformers_model.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/tensor/dtype.h"

namespace ferry::models {

nlohmann::ordered_json TransformersModel::finish_config(nlohmann::ordered_json json,
                                                        const std::string& model_type) const {
  json["architectures"] = {class_name()};
  json["model_type"] = model_type;
  // transformers loads in the dtype that is written here; before version 5 the key was torch_dtype.
  json[json.contains("torch_dtype") ? "torch_dtype" : "dtype"] = tensor::dtype_name(dtype());
  return json;
}

void TransformersModel::check_call(const std::string& method, const NamedTensors& inputs,
                                   const nlohmann::json& arguments, std::initializer_list<const char*> required,
                                   std::initializer_list<const char*> optional) const {
  if (method != "forward") {
    throw_error<ArgumentError>("{}: unknown method \"{}\"; it has: forward", class_name(), method);
  }
  std::vector<std::string> known(required.begin(), required.end());
  known.insert(known.end(), optional.begin(), optional.end());
  for (const char* name : required) {
    if (!inputs.contains(name)) {
      throw_error<ArgumentError>("{}: the input \"{}\" is missing; it takes {}", class_name(), name,
                                 fmt::join(known, ", "));
    }
  }
  for (const auto& [name, tensor] : inputs) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw_error<ArgumentError>("{}: unknown input \"{}\"; it takes {}", class_name(), name, fmt::join(known, ", "));
    }
  }
  if (!arguments.is_null() && !arguments.is_object()) {
    throw_error<ArgumentError>("{}: arguments: got {}, expected an object", class_name(), arguments.dump());
  }
  for (const auto& [name, value] : arguments.items()) {
    if (name != "output_hidden_states" && name != "return_dict" && name != "use_cache") {
      throw_error<ArgumentError>("{}: unknown argument \"{}\"; it takes output_hidden_states", class_name(), name);
    }
    if (!value.is_boolean() && !value.is_null()) {
      throw_error<ArgumentError>("{}: argument \"{}\": got {}, expected true or false", class_name(), name,
                                 value.dump());
    }
  }
}

at::Tensor TransformersModel::find_input(const NamedTensors& inputs, const char* name) {
  auto it = inputs.find(name);
  return it == inputs.end() ? at::Tensor() : it->second;
}

bool TransformersModel::wants_hidden_states(const nlohmann::json& arguments) {
  if (!arguments.is_object()) return false;
  auto it = arguments.find("output_hidden_states");
  return it != arguments.end() && it->is_boolean() && it->get<bool>();
}

void TransformersModel::add_hidden_states(NamedTensors& outputs, const std::vector<at::Tensor>& hidden_states) {
  for (size_t i = 0; i < hidden_states.size(); ++i) {
    outputs["hidden_states." + std::to_string(i)] = hidden_states[i];
  }
}

at::Tensor expand_attention_mask(const at::Tensor& attention_mask, int64_t tokens) {
  if (!attention_mask.defined()) return attention_mask;
  bool fits = (attention_mask.dim() == 2 || attention_mask.dim() == 4) && attention_mask.size(-1) == tokens;
  if (!fits) {
    throw_error<ArgumentError>("attention_mask: got [{}], expected [batch, {}]", fmt::join(attention_mask.sizes(), ", "),
                               tokens);
  }
  at::Tensor mask = attention_mask.to(at::kBool);
  return mask.dim() == 2 ? mask.unsqueeze(1).unsqueeze(1) : mask;  // [batch, 1, 1, tokens]
}

}  // namespace ferry::models
