// How long a generation will take: planned with the times that earlier ones on this machine showed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "ferry/offload/measurements.h"
#include "ferry/pipelines/memory_budget.h"

namespace ferry::pipelines {

struct TimeEstimate {
  int64_t steps = 0;
  // Of the denoiser's steps, once they are in steady state. Unset: not known.
  std::optional<double> step_s = {};
  // What is missing for it: this model has not run here at this size, or weights are to be read and
  // no run has read enough of them to show how fast the disk is.
  enum class Unknown { computing, reading } unknown = Unknown::computing;
  offload::Bound bound = offload::Bound::compute;
  uint64_t streamed_bytes = 0;  // a step
  // With 1 GiB more for weights; unset where it would not help, or nobody knows.
  std::optional<double> next_gib_step_s = {};

  // "28 steps in about 2:20 (5.0 s each), limited by the disk; with 1 GiB more 4.2 s each"
  std::string describe() const;
};

// Plans the denoiser's steps under the budget for weights (unset: all stay). `steps` unset: the
// pipeline's default. `rate_limit_bytes_per_s`: of reads; 0 is none.
TimeEstimate estimate_time(const DiffusionPipeline& pipeline, const GenerationSize& size,
                           std::optional<int64_t> steps, at::Device device,
                           std::optional<uint64_t> weights_memory_bytes,
                           uint64_t rate_limit_bytes_per_s,
                           const offload::Measurements& measurements);

// Keeps what the runs since the pipeline's clear_compute_times() showed. Nothing on an accelerator:
// the host does not see what its computing takes. A folder that cannot be written is only logged.
void remember_times(const DiffusionPipeline& pipeline, const GenerationSize& size,
                    at::Device device, const offload::Measurements& measurements);

}  // namespace ferry::pipelines
