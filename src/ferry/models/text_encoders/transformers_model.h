// What the models of Hugging Face transformers have in common here: the spelling of config.json,
// masks, hidden states.
#pragma once

#include <string>
#include <vector>

#include "ferry/models/model.h"

namespace ferry::models {

// What is wanted of a text encoder's outputs. Layers above what they need are not run, nor are
// norms and heads that none of them needs: weights that are streamed are not read for them.
struct TextOutputs {
  bool last_hidden_state = true;
  // The pooled output, or with a projection the projected one.
  bool pooled = true;
  bool all_hidden_states = false;  // transformers' output_hidden_states
  // Single entries of hidden_states; from the end where they are negative: -2 is the output of the
  // last layer but one.
  std::vector<int64_t> hidden_states = {};
};

// Keeps the hidden states that are wanted, as the layers give them.
class HiddenStateTap {
 public:
  // Of `count` states. Throws ArgumentError for an entry that there is not.
  HiddenStateTap(const TextOutputs& wanted, int64_t count);
  // The last that is wanted; -1 for none.
  int64_t last_entry() const;
  void offer(int64_t entry, const at::Tensor& state);
  // In the order in which they are wanted.
  std::vector<at::Tensor> take() { return std::move(states_); }

 private:
  std::vector<int64_t> entries_;
  std::vector<at::Tensor> states_;
};

// An encoder of `tokens` tokens a text, for planning.
struct EncoderSizes {
  int64_t tokens, dim;
  int64_t attention_dim;  // of all heads
  int64_t ff, heads;
  // Tensors of the feed-forward's inner width that are alive at once.
  double wide;
};
Costs encoder_costs(const EncoderSizes& sizes, const Workload& workload);

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
    TextOutputs wanted;
  };
  // Throws ArgumentError for an unknown method, input or output, and for missing ids if they are
  // required.
  TextInputs text_inputs(const std::string& method, const NamedTensors& inputs,
                         const nlohmann::json& arguments, const std::string& other,
                         bool ids_are_required) const;
  // The names of the outputs besides hidden states: the last hidden state's, the pooled one's.
  virtual std::vector<std::string> output_names() const = 0;
  // What the arguments `outputs` (a list of names; all of output_names() by default) and
  // `output_hidden_states` ask for. Throws ArgumentError.
  TextOutputs wanted_outputs(const nlohmann::json& arguments) const;

  // Adds "hidden_states.0", … as transformers' tuple, or the entries that were asked for under the
  // names by which they were.
  static void add_hidden_states(NamedTensors& outputs, const TextOutputs& wanted,
                                const std::vector<at::Tensor>& hidden_states);
};

// [batch, tokens] (1 or true: attend) or [batch, 1, query tokens, key tokens] -> bool,
// broadcastable to [batch, heads, query tokens, key tokens]. An undefined mask stays undefined.
// Throws ArgumentError.
at::Tensor expand_attention_mask(const at::Tensor& attention_mask, int64_t tokens);

}  // namespace ferry::models
