#include "ferry/pipelines/memory_budget.h"

#include <ATen/DeviceAccelerator.h>

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/base/system_info.h"
#include "ferry/base/units.h"
#include "ferry/models/autoencoders/autoencoder.h"
#include "ferry/models/costs.h"
#include "ferry/weights/slot.h"

namespace ferry::pipelines {

namespace {

// What a device's runtime takes beside tensors: context, loaded kernels, workspaces of libraries.
constexpr uint64_t kDeviceContext = 600ull << 20;

}  // namespace

std::string MemorySplit::describe() const {
  return fmt::format("{}: {} for the program, {} for activations ({}{}), {} for weights of {}",
                     format_bytes(total_bytes), format_bytes(program_bytes),
                     format_bytes(activation_bytes), largest, tile_vae ? ", decoding in tiles" : "",
                     format_bytes(std::min(weights_bytes, all_weights_bytes)),
                     format_bytes(all_weights_bytes));
}

MemorySplit split_memory(const DiffusionPipeline& pipeline, const GenerationSize& size,
                         uint64_t total_bytes, at::Device device, uint64_t least_weights_bytes) {
  MemorySplit split;
  split.total_bytes = total_bytes;
  split.program_bytes = device.is_cpu() ? current_rss_bytes() : kDeviceContext;
  uint64_t with_tiles = 0;  // activations, if the autoencoder decodes in tiles
  std::string largest_with_tiles;
  for (const auto& [name, component] : pipeline.components()) {
    if (!component.model) continue;
    split.all_weights_bytes += weights::total_bytes(weights::collect_slots(*component.model));
    models::Workload workload;
    if (size.height > 0) workload.height = size.height;
    if (size.width > 0) workload.width = size.width;
    workload.batch = size.batch;
    workload.text_tokens = size.text_tokens;
    workload.dtype = component.model->dtype();
    workload.on_cpu = device.is_cpu();
    const bool autoencoder =
        dynamic_cast<const models::AutoencoderMixin*>(component.model.get()) != nullptr;
    // Both predictions of true CFG are under way at once (hooks/lockstep.h).
    if (size.true_cfg && !autoencoder) workload.batch *= 2;
    const uint64_t whole = models::activation_bytes(*component.model, workload);
    uint64_t tiled = whole;
    if (autoencoder) {
      workload.tiled = true;
      tiled = std::min(whole, models::activation_bytes(*component.model, workload));
    }
    if (whole > split.activation_bytes) {
      split.activation_bytes = whole;
      split.largest = name;
    }
    if (tiled > with_tiles) {
      with_tiles = tiled;
      largest_with_tiles = name;
    }
  }
  least_weights_bytes = std::min(least_weights_bytes, split.all_weights_bytes);
  auto left = [&](uint64_t activations) -> std::optional<uint64_t> {
    const uint64_t taken = split.program_bytes + activations + least_weights_bytes;
    if (total_bytes < taken) return std::nullopt;
    return total_bytes - split.program_bytes - activations;
  };
  std::optional<uint64_t> weights = left(split.activation_bytes);
  if (!weights && with_tiles < split.activation_bytes) {
    split.tile_vae = true;
    split.activation_bytes = with_tiles;
    split.largest = largest_with_tiles;
    weights = left(with_tiles);
  }
  if (!weights) {
    throw_error<BudgetError>(
        "a memory budget of {} is too small for {}x{}: {} for the program, {} for activations ({}) "
        "and {} for weights; give at least {}, or make a smaller picture",
        format_bytes(total_bytes), size.width, size.height, format_bytes(split.program_bytes),
        format_bytes(split.activation_bytes), split.largest, format_bytes(least_weights_bytes),
        format_bytes_up(split.program_bytes + split.activation_bytes + least_weights_bytes));
  }
  split.weights_bytes = *weights;
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

}  // namespace ferry::pipelines
