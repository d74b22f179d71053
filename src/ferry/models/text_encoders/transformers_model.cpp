#include "ferry/models/text_encoders/transformers_model.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include "ferry/base/error.h"
#include "ferry/models/named_inputs.h"
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

TransformersModel::TextInputs TransformersModel::text_inputs(const std::string& method,
                                                             const NamedTensors& inputs,
                                                             const nlohmann::json& arguments,
                                                             const std::string& other,
                                                             bool ids_are_required) const {
  check_method(method);
  NamedInputs in(class_name(), inputs, arguments);
  TextInputs found;
  found.input_ids = ids_are_required ? in.required("input_ids") : in.optional("input_ids");
  found.attention_mask = in.optional("attention_mask");
  found.other = in.optional(other);
  found.output_hidden_states = in.argument("output_hidden_states", false);
  in.argument("return_dict", true);
  in.finish();
  return found;
}

void TransformersModel::add_hidden_states(NamedTensors& outputs,
                                          const std::vector<at::Tensor>& hidden_states) {
  for (size_t i = 0; i < hidden_states.size(); ++i) {
    outputs["hidden_states." + std::to_string(i)] = hidden_states[i];
  }
}

at::Tensor expand_attention_mask(const at::Tensor& attention_mask, int64_t tokens) {
  if (!attention_mask.defined()) return attention_mask;
  bool fits =
      (attention_mask.dim() == 2 || attention_mask.dim() == 4) && attention_mask.size(-1) == tokens;
  if (!fits) {
    throw_error<ArgumentError>("attention_mask: got [{}], expected [batch, {}]",
                               fmt::join(attention_mask.sizes(), ", "), tokens);
  }
  at::Tensor mask = attention_mask.to(at::kBool);
  return mask.dim() == 2 ? mask.unsqueeze(1).unsqueeze(1) : mask;  // [batch, 1, 1, tokens]
}

}  // namespace ferry::models
