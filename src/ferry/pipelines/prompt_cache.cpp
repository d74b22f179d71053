#include "ferry/pipelines/prompt_cache.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace ferry::pipelines {

at::Tensor PromptCache::find(const PromptKey& key, at::Device device) {
  auto found = std::find_if(entries_.begin(), entries_.end(),
                            [&](const Entry& entry) { return entry.key == key; });
  if (found == entries_.end()) return {};
  entries_.splice(entries_.end(), entries_, found);
  return found->output.to(found->output.options().device(device), /*non_blocking=*/false,
                          /*copy=*/true);
}

void PromptCache::put(PromptKey key, const at::Tensor& output) {
  if (output.nbytes() > limit_bytes_) return;
  // What the encoder gave for these texts with weights that it has no more cannot be asked for.
  std::erase_if(entries_, [&](const Entry& entry) {
    const bool replaced = entry.key.encoder == key.encoder &&
                          (entry.key == key || !(entry.key.weights == key.weights));
    if (replaced) size_bytes_ -= entry.output.nbytes();
    return replaced;
  });
  at::Tensor kept = output.detach().to(output.options().device(at::kCPU), /*non_blocking=*/false,
                                       /*copy=*/true);
  size_bytes_ += kept.nbytes();
  entries_.push_back({std::move(key), std::move(kept)});
  drop_beyond_limit();
}

void PromptCache::set_limit(uint64_t limit_bytes) {
  limit_bytes_ = limit_bytes;
  drop_beyond_limit();
}

void PromptCache::drop_beyond_limit() {
  while (size_bytes_ > limit_bytes_) {
    size_bytes_ -= entries_.front().output.nbytes();
    entries_.pop_front();
  }
}

}  // namespace ferry::pipelines
