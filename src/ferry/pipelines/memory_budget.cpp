#include "ferry/pipelines/memory_budget.h"

#include <ATen/DeviceAccelerator.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/system_info.h"
#include "ferry/base/units.h"
#include "ferry/models/autoencoders/autoencoder.h"
#include "ferry/models/costs.h"
#include "ferry/pipelines/plan_components.h"
#include "ferry/weights/slot.h"

namespace ferry::pipelines {

namespace {

// What a device's runtime takes beside tensors: context, loaded kernels, workspaces of libraries.
constexpr uint64_t kDeviceContext = 600ull << 20;
// What comes to the program on a CPU while it computes: generated code and scratch of oneDNN,
// stacks of threads, what the allocator keeps. Seen: 90 MiB beside a decode of 256 x 256 pixels.
constexpr uint64_t kLibraries = 64ull << 20;

// One way to run a component: what it holds, and what the weights need at least meanwhile.
struct Way {
  uint64_t activation_bytes = 0;
  uint64_t weights_bytes = 0;
  bool sliced = false, tiled = false;
  int64_t pictures_per_pass = 0;
  hooks::LockstepTurn turn = hooks::LockstepTurn::group;
};

// A component and its ways, each with less activations than the one before.
struct Ways {
  std::string name;
  std::vector<Way> ways;
  size_t chosen = 0;

  const Way& way() const { return ways[chosen]; }
  void add(Way way) {
    if (ways.empty() || way.activation_bytes < ways.back().activation_bytes) ways.push_back(way);
  }
};

// The largest number of bytes of a block, by the slots' names: "transformer_blocks.3.attn…".
uint64_t largest_block(const models::Model& model) {
  std::map<std::string, uint64_t> blocks;
  uint64_t largest = 0;
  for (const weights::Slot& slot : weights::collect_slots(model)) {
    const std::string& name = slot.name();
    size_t digit = name.find('.');
    while (digit != std::string::npos && !std::isdigit(name[digit + 1]))
      digit = name.find('.', digit + 1);
    if (digit == std::string::npos) continue;
    uint64_t& bytes = blocks[name.substr(0, name.find('.', digit + 1))];
    largest = std::max(largest, bytes += slot.size_bytes());
  }
  return largest;
}

Ways ways_of_autoencoder(const models::Model& model, models::Workload workload, uint64_t least) {
  Ways ways;
  ways.add({.activation_bytes = models::activation_bytes(model, workload), .weights_bytes = least});
  // Pictures that are finished wait for the others.
  const auto finished =
      static_cast<uint64_t>(3 * workload.batch * workload.height * workload.width *
                            static_cast<int64_t>(c10::elementSize(workload.dtype)));
  const bool sliced = workload.batch > 1;
  workload.batch = 1;
  for (bool tiled : {false, true}) {
    workload.tiled = tiled;
    ways.add(
        {.activation_bytes = models::activation_bytes(model, workload) + (sliced ? finished : 0),
         .weights_bytes = least,
         .sliced = sliced,
         .tiled = tiled});
  }
  return ways;
}

// The whole batch at once, both predictions of true CFG taking turns at each group; then fewer and
// fewer pictures a pass, with turns at blocks.
Ways ways_of_denoiser(const models::Model& model, models::Workload workload, bool true_cfg,
                      uint64_t least) {
  Ways ways;
  const int64_t batch = workload.batch, predictions = true_cfg ? 2 : 1;
  workload.batch = batch * predictions;
  ways.add({.activation_bytes = models::activation_bytes(model, workload), .weights_bytes = least});
  const uint64_t block = std::max(least, largest_block(model) + largest_block(model) / 4);
  for (int64_t pictures = batch; pictures > 0; --pictures) {
    const int64_t passes = predictions * ((batch + pictures - 1) / pictures);
    if (passes == 1) continue;
    workload.batch = pictures;
    ways.add({.activation_bytes =
                  models::activation_bytes(model, workload) +
                  static_cast<uint64_t>(passes - 1) * models::held_bytes(model, workload),
              .weights_bytes = block,
              .pictures_per_pass = pictures == batch ? 0 : pictures,
              .turn = hooks::LockstepTurn::block});
  }
  return ways;
}

std::vector<Ways> ways_of(const DiffusionPipeline& pipeline, const GenerationSize& size,
                          at::Device device, uint64_t least) {
  std::vector<Ways> all;
  for (const auto& [name, component] : pipeline.components()) {
    if (!component.model) continue;
    const models::Model& model = *component.model;
    models::Workload workload = workload_of(model, size, device);
    if (dynamic_cast<const models::AutoencoderMixin*>(&model)) {
      all.push_back(ways_of_autoencoder(model, workload, least));
    } else if (runs_every_step(model)) {
      all.push_back(ways_of_denoiser(model, workload, size.true_cfg, least));
    } else {
      workload.batch = size.prompts * (size.true_cfg ? 2 : 1);
      all.emplace_back();
      all.back().add(
          {.activation_bytes = models::activation_bytes(model, workload), .weights_bytes = least});
    }
    all.back().name = name;
  }
  return all;
}

}  // namespace

models::Workload workload_of(const models::Model& model, const GenerationSize& size,
                             at::Device device) {
  models::Workload workload;
  workload.vae_scale_factor = size.vae_scale_factor;
  if (size.height > 0) workload.height = size.height;
  if (size.width > 0) workload.width = size.width;
  workload.batch = size.batch;
  workload.text_tokens = size.text_tokens;
  workload.dtype = model.dtype();
  workload.on_cpu = device.is_cpu();
  return workload;
}

GenerationSize generation_size(const DiffusionPipeline& pipeline,
                               const TextToImageArguments& arguments) {
  GenerationSize size;
  size.width = arguments.width.value_or(0);
  size.height = arguments.height.value_or(0);
  for (const auto& [name, component] : pipeline.components()) {
    const auto* vae = dynamic_cast<models::AutoencoderMixin*>(component.model.get());
    if (!vae) continue;
    size.vae_scale_factor = vae->scale_factor();
    const auto trained = component.model->config_json().value("sample_size", int64_t{0});
    if (size.width == 0) size.width = trained;
    if (size.height == 0) size.height = trained;
  }
  size.prompts = arguments.prompt_embeds ? arguments.prompt_embeds->size(0)
                                         : static_cast<int64_t>(arguments.prompt.size());
  size.batch = size.prompts * arguments.num_images_per_prompt;
  size.text_tokens = arguments.prompt_embeds ? arguments.prompt_embeds->size(1)
                                             : arguments.max_sequence_length.value_or(512);
  size.true_cfg = (arguments.negative_prompt || arguments.negative_prompt_embeds) &&
                  arguments.true_cfg_scale.value_or(1) > 1;
  return size;
}

std::string MemorySplit::describe() const {
  std::string how;
  if (tile_vae) how += ", decoding in tiles";
  if (slice_vae && !tile_vae) how += ", decoding one by one";
  if (pictures_per_pass > 0)
    how +=
        fmt::format(", {} picture{} a pass", pictures_per_pass, pictures_per_pass == 1 ? "" : "s");
  return fmt::format(
      "{}: {}{} for the program, {} for activations ({}{}), {} for weights of {}",
      format_bytes(total_bytes),
      reserve_bytes > 0 ? format_bytes(reserve_bytes) + " reserved, " : std::string(),
      format_bytes(program_bytes), format_bytes(activation_bytes), largest, how,
      format_bytes(std::min(weights_bytes, all_weights_bytes)), format_bytes(all_weights_bytes));
}

MemorySplit split_memory(const DiffusionPipeline& pipeline, const GenerationSize& size,
                         at::Device device, const MemoryRequest& request) {
  MemorySplit split;
  split.total_bytes = request.memory_bytes.value();
  split.reserve_bytes = request.reserve_bytes;
  split.program_bytes = request.program_bytes.value_or(
      device.is_cpu() ? current_rss_bytes() + kLibraries : kDeviceContext);
  for (const auto& [name, component] : pipeline.components()) {
    if (component.model)
      split.all_weights_bytes += weights::total_bytes(weights::collect_slots(*component.model));
  }
  const uint64_t least = std::min(request.least_weights_bytes, split.all_weights_bytes);
  std::vector<Ways> components = ways_of(pipeline, size, device, least);
  auto largest = [&] {
    return std::max_element(components.begin(), components.end(), [](const auto& a, const auto& b) {
      return a.way().activation_bytes < b.way().activation_bytes;
    });
  };
  const uint64_t taken = split.reserve_bytes + split.program_bytes;
  uint64_t weights = 0;
  for (;;) {
    weights = least;
    for (const Ways& component : components) {
      // What is all there needs no room for more.
      weights = std::max(weights, std::min(component.way().weights_bytes, split.all_weights_bytes));
    }
    const auto most = largest();
    split.activation_bytes = most->way().activation_bytes;
    split.largest = most->name;
    if (taken + split.activation_bytes + weights <= split.total_bytes) break;
    if (most->chosen + 1 < most->ways.size()) {
      ++most->chosen;
      continue;
    }
    throw_error<BudgetError>(
        "a memory budget of {} is too small for {}x{}: {}{} for the program, {} for activations "
        "({}) and {} for weights; give at least {}, or make a smaller picture",
        format_bytes(split.total_bytes), size.width, size.height,
        split.reserve_bytes > 0 ? format_bytes(split.reserve_bytes) + " reserved, " : std::string(),
        format_bytes(split.program_bytes), format_bytes(split.activation_bytes), split.largest,
        format_bytes(weights), format_bytes_up(taken + split.activation_bytes + weights));
  }
  split.weights_bytes = split.total_bytes - taken - split.activation_bytes;
  for (const Ways& component : components) {
    const Way& way = component.way();
    split.slice_vae |= way.sliced;
    split.tile_vae |= way.tiled;
    if (way.turn != hooks::LockstepTurn::block) continue;
    split.pictures_per_pass = way.pictures_per_pass;
    split.lockstep_turn = way.turn;
    split.arena_bytes = way.weights_bytes;
  }
  return split;
}

FreeMemory usable_memory(at::Device device) {
  constexpr uint64_t kLeastHeadroom = 512ull << 20;
  uint64_t free = 0, held = 0;
  if (device.is_cpu()) {
    free = memory_info().usable_bytes();
    held = current_rss_bytes();
  } else {
    const auto [device_free, device_total] = at::accelerator::getMemoryInfo(device.index());
    free = std::min<uint64_t>(device_free, device_total);
  }
  FreeMemory result;
  result.headroom_bytes = std::max(free / 10, std::min(kLeastHeadroom, free / 2));
  result.usable_bytes = held + free - result.headroom_bytes;
  return result;
}

std::optional<uint64_t> parse_memory(const std::string& text, std::string_view what) {
  if (text == "auto") return std::nullopt;
  return parse_bytes(text, what);
}

std::string MemoryChoice::describe() const {
  std::string text = split.describe();
  if (headroom_bytes)
    text += fmt::format(", {} left to other programs", format_bytes(*headroom_bytes));
  return text;
}

MemoryChoice choose_memory(const DiffusionPipeline& pipeline, const GenerationSize& size,
                           at::Device device, const MemoryRequest& request) {
  MemoryChoice choice;
  MemoryRequest definite = request;
  if (!request.memory_bytes) {
    const FreeMemory free = usable_memory(device);
    definite.memory_bytes = free.usable_bytes;
    choice.headroom_bytes = free.headroom_bytes;
  }
  choice.split = split_memory(pipeline, size, device, definite);
  return choice;
}

void apply_memory(DiffusionPipeline& pipeline, const MemoryChoice& choice,
                  offload::EngineOptions engine) {
  const MemorySplit& split = choice.split;
  for (const auto& [name, component] : pipeline.components()) {
    auto* vae = dynamic_cast<models::AutoencoderMixin*>(component.model.get());
    if (!vae) continue;
    split.slice_vae ? vae->enable_slicing() : vae->disable_slicing();
    split.tile_vae ? vae->enable_tiling() : vae->disable_tiling();
  }
  pipeline.set_pictures_per_pass(split.pictures_per_pass);
  pipeline.set_lockstep_turn(split.lockstep_turn);
  if (split.pictures_per_pass > 0) {
    log::info(
        "the activations of the whole batch do not fit: {} picture{} a pass, the passes of a step "
        "{}",
        split.pictures_per_pass, split.pictures_per_pass == 1 ? "" : "s",
        choice.weights_memory_bytes() ? "in lockstep" : "one after the other");
  }
  const std::shared_ptr<offload::Engine>& now = pipeline.engine();
  if (now && now->options().preferred_arena_bytes == split.arena_bytes) {
    if (now->options().weights_memory_bytes != split.weights_bytes)
      now->set_weights_memory(split.weights_bytes);
  } else if (choice.weights_memory_bytes()) {
    engine.weights_memory_bytes = split.weights_bytes;
    engine.preferred_arena_bytes = split.arena_bytes;
    pipeline.enable_group_offload(std::make_shared<offload::Engine>(engine));
  } else {
    pipeline.disable_group_offload();
    pipeline.to(engine.device);
  }
}

}  // namespace ferry::pipelines
