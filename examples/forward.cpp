// The full library: streams one transformer under a budget and runs it on random inputs.
//   example_forward models/shapes/transformer 2MiB
#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/models/model.h"
#include "ferry/tensor/generator.h"

int main(int argc, char** argv) try {
  if (argc != 3) return fmt::print(stderr, "usage: {} TRANSFORMER_DIR BUDGET\n", argv[0]), 2;
  auto model = ferry::models::load_model(argv[1], {.dtype = at::kFloat});  // headers only
  auto engine = std::make_shared<ferry::offload::Engine>(
      ferry::offload::EngineOptions{.weights_memory_bytes = ferry::parse_bytes(argv[2])});
  auto offloading = ferry::hooks::apply_group_offloading(*model, model->binding(), engine);

  auto config = model->config_json();
  auto noise = [generator = ferry::tensor::Generator().manual_seed(0)](at::IntArrayRef shape) {
    return ferry::tensor::randn_tensor(shape, {generator});
  };
  ferry::models::NamedTensors inputs = {
      {"hidden_states",
       noise({1, 16, config["in_channels"].get<int64_t>()})},  // [batch, tokens, channels]
      {"encoder_hidden_states",
       noise({1, 8, config["joint_attention_dim"].get<int64_t>()})},  // [batch, words, channels]
      {"pooled_projections", noise({1, config["pooled_projection_dim"].get<int64_t>()})},
      {"timestep", at::full({1}, 0.5)},
      {"img_ids", at::zeros({16, 3})},
      {"txt_ids", at::zeros({8, 3})},
  };
  if (config["guidance_embeds"]) inputs["guidance"] = at::full({1}, 3.5);
  at::NoGradGuard no_grad;
  at::Tensor sample = model->forward_named("forward", inputs, {}).at("sample");
  fmt::print(
      "sample [{}], mean {:.4f}; {} read for {} of weights\n", fmt::join(sample.sizes(), ", "),
      sample.mean().item<float>(), ferry::format_bytes(engine->report().bytes_read),
      ferry::format_bytes(ferry::weights::total_bytes(ferry::weights::collect_slots(*model))));
} catch (const ferry::Error& error) {
  return fmt::print(stderr, "{}\n", error.what()), 1;
}
