// What the models of Hugging Face transformers have in common here: the spelling of config.json,
// masks, hidden states.
#pragma once

#include <string>

#include "ferry/models/model.h"

namespace ferry::models {

// A model whose config.json names it under `architectures`.
class TransformersModel : public Model {
 public:
  std::string library() const override { return "transformers"; }

 protected:
  // Adds `architectures`, `model_type` and `dtype` as transformers writes them.
  nlohmann::ordered_json finish_config(nlohmann::ordered_json json,
                                       const std::string& model_type) const;

  // What forward_named() of a text encoder takes; tensors that were not given are undefined.
  struct TextInputs {
    at::Tensor input_ids;       // [batch, tokens]
    at::Tensor attention_mask;  // [batch, tokens]
    at::Tensor other;           // the class's own: position_ids, inputs_embeds
    bool output_hidden_states = false;
  };
  // Throws ArgumentError for an unknown method or input, and for missing ids if they are required.
  TextInputs text_inputs(const std::string& method, const NamedTensors& inputs,
                         const nlohmann::json& arguments, const std::string& other,
                         bool ids_are_required) const;

  // Adds "hidden_states.0", … as transformers' tuple.
  static void add_hidden_states(NamedTensors& outputs,
                                const std::vector<at::Tensor>& hidden_states);
};

// [batch, tokens] (1 or true: attend) or [batch, 1, query tokens, key tokens] -> bool,
// broadcastable to [batch, heads, query tokens, key tokens]. An undefined mask stays undefined.
// Throws ArgumentError.
at::Tensor expand_attention_mask(const at::Tensor& attention_mask, int64_t tokens);

}  // namespace ferry::models
