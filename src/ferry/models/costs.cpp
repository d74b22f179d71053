#include "ferry/models/costs.h"

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <set>

#include "ferry/nn/embedding.h"
#include "ferry/nn/linear.h"
#include "ferry/weights/slot.h"

namespace ferry::models {

int64_t image_tokens(const Workload& workload) {
  const int64_t pixels = 2 * workload.vae_scale_factor;
  return (workload.height + pixels - 1) / pixels * ((workload.width + pixels - 1) / pixels);
}

Costs Model::costs(const Workload& workload) const {
  const auto tokens =
      static_cast<double>(workload.batch * (image_tokens(workload) + workload.text_tokens));
  int64_t widest = 1, largest = 0;
  for (const weights::Slot& slot : weights::collect_slots(*this)) {
    if (slot.shape().size() != 2 || slot.tensor.numel() <= largest) continue;
    largest = slot.tensor.numel();
    widest = std::min(slot.shape()[0], slot.shape()[1]);
  }
  return {.load =
              [tokens](const std::string&) {
                return LayerLoad{tokens, 0};
              },
          .values = 16.0 * static_cast<double>(widest) * tokens};
}

namespace {

uint64_t to_bytes(double values, const Workload& workload) {
  constexpr double kOddsAndEnds = 1.02;  // embeddings of timesteps, gates, norms' statistics
  return static_cast<uint64_t>(kOddsAndEnds * values *
                               static_cast<double>(c10::elementSize(workload.dtype)));
}

}  // namespace

std::map<std::string, double> layer_flops(const Model& model, const Workload& workload) {
  std::map<std::string, double> flops;
  const Costs costs = model.costs(workload);
  std::set<std::string> done;  // tables are looked up
  for (const auto& entry : model.named_modules("", /*include_self=*/false)) {
    if (dynamic_cast<const nn::Embedding*>(entry.value().get())) done.insert(entry.key());
    const auto* linear = dynamic_cast<const nn::Linear*>(entry.value().get());
    if (!linear || !linear->quantized_weight()) continue;
    done.insert(entry.key());
    const LayerLoad load = costs.load(entry.key());
    flops[entry.key()] =
        2.0 * load.rows * static_cast<double>(linear->in_features() * linear->out_features()) +
        load.attention_flops;
  }
  for (const weights::Slot& slot : weights::collect_slots(model)) {
    const size_t dot = slot.name().rfind('.');
    const std::string layer = dot == std::string::npos ? "" : slot.name().substr(0, dot);
    if (slot.shape().size() < 2 || done.contains(layer)) continue;  // vectors cost next to nothing
    const LayerLoad load = costs.load(layer);
    flops[layer] +=
        2.0 * load.rows * static_cast<double>(slot.tensor.numel()) + load.attention_flops;
  }
  return flops;
}

uint64_t activation_bytes(const Model& model, const Workload& workload) {
  return to_bytes(model.costs(workload).values, workload);
}

uint64_t held_bytes(const Model& model, const Workload& workload) {
  const Costs costs = model.costs(workload);
  return to_bytes(costs.held_values.value_or(costs.values), workload);
}

}  // namespace ferry::models
