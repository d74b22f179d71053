#include "ferry/models/text_encoders/transformers_model.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "ferry/base/error.h"
#include "ferry/models/costs.h"
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

HiddenStateTap::HiddenStateTap(const TextOutputs& wanted, int64_t count) {
  if (wanted.all_hidden_states) {
    entries_.resize(count);
    std::iota(entries_.begin(), entries_.end(), 0);
  } else {
    for (int64_t entry : wanted.hidden_states) {
      if (entry < -count || entry >= count) {
        throw_error<ArgumentError>("hidden_states.{}: there are {}, expected {} to {}", entry,
                                   count, -count, count - 1);
      }
      entries_.push_back(entry < 0 ? count + entry : entry);
    }
  }
  states_.resize(entries_.size());
}

int64_t HiddenStateTap::last_entry() const {
  return entries_.empty() ? -1 : *std::max_element(entries_.begin(), entries_.end());
}

void HiddenStateTap::offer(int64_t entry, const at::Tensor& state) {
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i] == entry) states_[i] = state;
  }
}

TextOutputs TransformersModel::wanted_outputs(const nlohmann::json& arguments) const {
  const NamedTensors none;
  NamedInputs in(class_name(), none, arguments);
  TextOutputs wanted;
  wanted.all_hidden_states = in.argument("output_hidden_states", false);
  const std::vector<std::string> names = output_names();
  const auto outputs = in.argument("outputs", names);
  wanted.last_hidden_state = wanted.pooled = false;
  const std::string state = "hidden_states.";
  for (const std::string& name : outputs) {
    char* end = nullptr;
    if (name == names[0]) {
      wanted.last_hidden_state = true;
    } else if (names.size() > 1 && name == names[1]) {
      wanted.pooled = true;
    } else if (const int64_t entry = std::strtoll(name.c_str() + state.size(), &end, 10);
               name.starts_with(state) && name.size() > state.size() && *end == 0) {
      wanted.hidden_states.push_back(entry);
    } else {
      throw_error<ArgumentError>("{}: there is no output \"{}\"; there are {} and hidden_states.N",
                                 class_name(), name, fmt::join(names, ", "));
    }
  }
  return wanted;
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
  found.wanted = wanted_outputs(arguments);
  for (const char* known : {"output_hidden_states", "outputs", "return_dict"})
    in.argument(known, nlohmann::json());
  in.finish();
  return found;
}

void TransformersModel::add_hidden_states(NamedTensors& outputs, const TextOutputs& wanted,
                                          const std::vector<at::Tensor>& hidden_states) {
  for (size_t i = 0; i < hidden_states.size(); ++i) {
    const int64_t entry =
        wanted.all_hidden_states ? static_cast<int64_t>(i) : wanted.hidden_states[i];
    outputs["hidden_states." + std::to_string(entry)] = hidden_states[i];
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

Costs encoder_costs(const EncoderSizes& s, const Workload& w) {
  const auto rows = static_cast<double>(w.batch * s.tokens);
  auto load = [=](const std::string& layer) {
    const bool after_attention = layer.ends_with(".o") || layer.ends_with("out_proj");
    const double products = 4.0 * rows * static_cast<double>(s.tokens * s.attention_dim);
    return LayerLoad{rows, after_attention ? products : 0};
  };
  // Masks and position biases, also while they are added up.
  const double scores = 2.0 * static_cast<double>(s.heads * s.tokens * s.tokens);
  const double layer = rows * (5 * static_cast<double>(s.dim) + s.wide * static_cast<double>(s.ff));
  return {.load = load, .values = scores + layer};
}

}  // namespace ferry::models
