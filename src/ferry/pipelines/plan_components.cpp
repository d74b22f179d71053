#include "ferry/pipelines/plan_components.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/io/json_file.h"
#include "ferry/models/autoencoders/autoencoder_kl.h"
#include "ferry/nn/embedding.h"
#include "ferry/offload/engine.h"
#include "ferry/pipelines/hub.h"
#include "ferry/weights/slot.h"

namespace ferry::pipelines {

namespace {

namespace fs = std::filesystem;

// What direct reads take of the arena beyond both ends of a group.
constexpr uint64_t kOverRead = 2 * 4096;
// Measured on bf16 weights of normal distribution: a lossless pack has 0.68 of the bytes.
constexpr double kPackRatio = 0.68;

std::string layer_of(const std::string& slot) {
  const size_t dot = slot.rfind('.');
  return dot == std::string::npos ? "" : slot.substr(0, dot);
}

}  // namespace

bool runs_every_step(const models::Model& model) {
  return model.class_name().find("Transformer2D") != std::string::npos ||
         model.class_name().find("UNet") != std::string::npos;
}

PlannedComponent describe_component(const std::string& name, std::shared_ptr<models::Model> model,
                                    std::optional<at::ScalarType> dtype,
                                    const PlanRequest& request) {
  PlannedComponent component;
  component.name = name.empty() ? model->class_name() : name;
  component.workload = request.workload;
  component.workload.on_cpu = request.hardware.link_bytes_per_s == 0;
  component.passes = runs_every_step(*model) ? std::max(1, request.steps) : 1;

  std::set<const c10::TensorImpl*> tables;
  for (const auto& module : model->modules()) {
    if (auto* embedding = dynamic_cast<const nn::Embedding*>(module.get()))
      tables.insert(embedding->weight.unsafeGetTensorImpl());
  }
  std::map<std::string, uint64_t> stored;  // bytes in the checkpoint, where they differ
  if (model->binding()) {
    for (const weights::BoundSlot& bound : model->binding()->slots)
      stored[bound.slot.name()] = bound.source.size_bytes;
  }
  const std::map<std::string, double> flops = models::layer_flops(*model, component.workload);
  const uint64_t small_slot = offload::EngineOptions().small_slot_bytes;
  std::map<std::string, size_t> group_of;
  for (const weights::Slot& slot : weights::collect_slots(*model)) {
    const uint64_t bytes = dtype && at::isFloatingType(slot.dtype())
                               ? slot.tensor.numel() * c10::elementSize(*dtype)
                               : slot.size_bytes();
    component.weight_bytes += bytes;
    const std::string layer = layer_of(slot.name());
    const auto operations = flops.find(layer);
    if (operations != flops.end() && operations->second == 0) {
      component.unused_bytes += bytes;
      continue;
    }
    if (bytes < small_slot) {
      component.small_bytes += bytes;
      continue;
    }
    if (tables.count(slot.tensor.unsafeGetTensorImpl())) {
      component.table_bytes += bytes;
      continue;
    }
    auto [place, added] = group_of.emplace(layer, component.groups.size());
    if (added) {
      component.groups.emplace_back();
      component.groups.back().name = layer.empty() ? "(root)" : layer;
      component.groups.back().arena_bytes = kOverRead;
    }
    offload::GroupCost& group = component.groups[place->second];
    const auto source = stored.find(slot.name());
    const uint64_t read = source == stored.end() ? bytes : source->second;
    group.size_bytes += bytes;
    group.disk_bytes += read;
    group.arena_bytes += bytes + (read == bytes ? 0 : read);  // a cast takes a second range
    if (request.packs)
      group.pack_bytes = static_cast<uint64_t>(kPackRatio * static_cast<double>(group.disk_bytes));
  }
  for (offload::GroupCost& group : component.groups) {
    const auto operations = flops.find(group.name);
    const double count = operations == flops.end() ? 0 : operations->second;
    group.compute_s = request.hardware.compute_s(count, group.size_bytes);
  }
  component.model = std::move(model);
  return component;
}

std::vector<PlannedComponent> components_of_folder(const std::string& path,
                                                   const PlanRequest& request) {
  const fs::path folder = resolve_folder(path);
  std::vector<PlannedComponent> components;
  if (fs::exists(folder / "config.json")) {
    components.push_back(describe_component("", models::load_model(folder), {}, request));
    return components;
  }
  if (!fs::exists(folder / "model_index.json")) {
    throw_error<IoError>("{}: neither a pipeline (model_index.json) nor a component (config.json)",
                         folder.string());
  }
  const nlohmann::json index = io::read_json_object(folder / "model_index.json");
  std::vector<std::pair<std::string, std::shared_ptr<models::Model>>> found;
  PlanRequest own = request;
  for (const auto& [name, value] : index.items()) {
    if (!value.is_array() || value.size() != 2 || !value[1].is_string()) continue;
    const std::string class_name = value[1].get<std::string>();
    const bool model =
        std::any_of(models::model_classes().begin(), models::model_classes().end(),
                    [&](const models::ModelClass& entry) { return entry.name == class_name; });
    if (!model) continue;  // tokenizers, schedulers
    found.emplace_back(name, models::load_model(folder / name, {}, class_name));
    if (const auto* vae = dynamic_cast<models::AutoencoderMixin*>(found.back().second.get()))
      own.workload.vae_scale_factor = vae->scale_factor();
  }
  for (auto& [name, model] : found)
    components.push_back(describe_component(name, std::move(model), {}, own));
  if (components.empty())
    throw_error<FormatError>("{}: no component with weights that ferry has", folder.string());
  // Text encoders, the denoiser, the autoencoder.
  auto rank = [](const PlannedComponent& c) {
    return c.name.starts_with("text_encoder") ? 0 : c.name.starts_with("vae") ? 2 : 1;
  };
  std::stable_sort(components.begin(), components.end(),
                   [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
  return components;
}

void plan_components(std::vector<PlannedComponent>& components, const PlanRequest& request) {
  uint64_t small = 0;
  for (const PlannedComponent& component : components) small += component.small_bytes;
  uint64_t host_left = request.host_memory_bytes;

  // The one that runs most often chooses its homes first.
  std::vector<PlannedComponent*> by_passes;
  for (PlannedComponent& component : components) by_passes.push_back(&component);
  std::stable_sort(by_passes.begin(), by_passes.end(),
                   [](const auto* a, const auto* b) { return a->passes > b->passes; });
  uint64_t least = 0;
  std::string least_of;
  for (PlannedComponent* component : by_passes) {
    const uint64_t least_weights = offload::smallest_budget(component->groups);
    auto reserved = [&] {
      return request.weights_memory_bytes
                 ? small
                 : small + component->activation_bytes + request.hardware.context_bytes;
    };
    const uint64_t budget = request.weights_memory_bytes ? *request.weights_memory_bytes
                            : request.memory_bytes       ? *request.memory_bytes
                                                         : request.hardware.memory_bytes;
    component->activation_bytes = models::activation_bytes(*component->model, component->workload);
    const bool autoencoder =
        dynamic_cast<const models::AutoencoderKL*>(component->model.get()) != nullptr;
    if (autoencoder && !request.weights_memory_bytes && budget < reserved() + least_weights) {
      component->workload.tiled = true;
      component->activation_bytes =
          models::activation_bytes(*component->model, component->workload);
      const auto flops = models::layer_flops(*component->model, component->workload);
      for (offload::GroupCost& group : component->groups) {
        const auto operations = flops.find(group.name);
        if (operations != flops.end())
          group.compute_s = request.hardware.compute_s(operations->second, group.size_bytes);
      }
    }
    if (reserved() + least_weights > least) {
      least = reserved() + least_weights;
      least_of = component->name;
    }
    if (budget < least) continue;

    offload::PlanOptions& options = component->options;
    options.budget_bytes = budget - reserved();
    options.host_budget_bytes = host_left;
    options.rates = request.hardware.rates();
    if (!request.packs) options.rates.decode_bytes_per_s = 0;
    options.wrap_around = component->passes > 1;
    options.passes = component->passes > 1 ? 0 : 1;
    component->plan = offload::make_plan(component->groups, options);
    component->peak_bytes = small + component->activation_bytes + request.hardware.context_bytes +
                            component->plan.peak_bytes();
    if (host_left > 0) {  // staging is shared, homes are not
      host_left -= std::min(host_left, component->plan.host_bytes);
      host_left = std::max(host_left, offload::smallest_host_budget());
    }
  }
  const uint64_t budget = request.weights_memory_bytes ? *request.weights_memory_bytes
                          : request.memory_bytes       ? *request.memory_bytes
                                                       : request.hardware.memory_bytes;
  if (budget < least) {
    throw_error<BudgetError>("{} {} is too small: {} needs {} ({})",
                             request.weights_memory_bytes ? "--weights-memory" : "--memory",
                             format_bytes(budget), least_of, format_bytes_up(least),
                             request.weights_memory_bytes
                                 ? "small tensors and the largest layer"
                                 : "activations, context, small tensors and the largest layer");
  }
}

const PlannedComponent& main_component(const std::vector<PlannedComponent>& components) {
  return *std::max_element(components.begin(), components.end(),
                           [](const auto& a, const auto& b) { return a.total_s() < b.total_s(); });
}

std::vector<NextGiB> next_gib(const std::vector<PlannedComponent>& components,
                              const PlanRequest& request) {
  constexpr uint64_t kGiB = 1ull << 30;
  const PlannedComponent& main = main_component(components);
  auto with = [&](const PlanRequest& more) {
    std::vector<PlannedComponent> again = components;
    plan_components(again, more);
    return std::find_if(again.begin(), again.end(),
                        [&](const PlannedComponent& c) { return c.name == main.name; })
        ->run_s();
  };
  std::vector<NextGiB> next;
  PlanRequest more = request;
  if (request.weights_memory_bytes) {
    *more.weights_memory_bytes += kGiB;
    next.push_back({"--weights-memory", with(more)});
  } else {
    more.memory_bytes = request.memory_bytes.value_or(request.hardware.memory_bytes) + kGiB;
    next.push_back({"--memory", with(more)});
  }
  if (request.hardware.link_bytes_per_s > 0) {
    more = request;
    // Without a budget there is staging alone: the first GiB that is given has to hold that too.
    more.host_memory_bytes =
        std::max(main.plan.host_peak_bytes(), request.host_memory_bytes) + kGiB;
    next.push_back({"--host-memory", with(more)});
  }
  return next;
}

}  // namespace ferry::pipelines
