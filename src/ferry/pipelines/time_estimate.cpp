#include "ferry/pipelines/time_estimate.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/units.h"
#include "ferry/io/checksum.h"
#include "ferry/models/autoencoders/autoencoder.h"
#include "ferry/pipelines/plan_components.h"
#include "ferry/tensor/dtype.h"

namespace ferry::pipelines {

namespace {

// Of the shapes, and of where the weights lie: times and read rates hold for both.
std::string fingerprint(const models::Model& model) {
  std::string text = model.config_json().dump();
  if (model.binding() && model.binding()->checkpoint) {
    for (const auto& file : model.binding()->checkpoint->files()) text += file->path().string();
  }
  return model.class_name() + "-" +
         io::checksum_text(io::checksum(std::as_bytes(std::span(text.data(), text.size()))));
}

// What all runs of the component in a step compute together.
models::Workload step_workload_of(const models::Model& model, const GenerationSize& size,
                                  at::Device device) {
  models::Workload workload = workload_of(model, size, device);
  const auto* vae = dynamic_cast<const models::AutoencoderMixin*>(&model);
  const bool denoises = runs_every_step(model);
  workload.batch = denoises || vae ? size.batch : size.prompts;
  if (size.true_cfg && !vae) workload.batch *= 2;
  workload.tiled = vae && vae->tiling();
  return workload;
}

offload::MeasurementKey key_of(const models::Model& model, const models::Workload& workload,
                               at::Device device) {
  return {.component = fingerprint(model),
          .device = device.str(),
          .dtype = tensor::dtype_name(workload.dtype),
          .width = workload.width,
          .height = workload.height,
          .text_tokens = workload.text_tokens,
          .batch = workload.batch,
          .threads = device.is_cpu() ? at::get_num_threads() : 0,
          .tiled = workload.tiled};
}

// This machine. Groups get their operations for a time, in proportion to which a measured one is
// shared out.
PlanRequest request_for(const models::Workload& workload, double read_bytes_per_s) {
  PlanRequest request;
  request.hardware.name = "this machine";
  request.hardware.disk_bytes_per_s = read_bytes_per_s;
  request.hardware.bf16_flops = 1e12;
  request.hardware.flops_efficiency = 1;
  request.workload = workload;
  return request;
}

std::string times(double seconds, int64_t steps) {
  return fmt::format("{} step{} in about {} ({} each)", steps, steps == 1 ? "" : "s",
                     format_duration(seconds * static_cast<double>(steps)),
                     format_duration(seconds));
}

}  // namespace

std::string TimeEstimate::describe() const {
  const std::string advice = "a smaller picture, a smaller dtype or more memory would be faster";
  if (!step_s) {
    std::string text =
        fmt::format("how long it takes is not known: {}",
                    unknown == Unknown::computing ? "it has not run here at this size yet"
                                                  : "no run has shown how fast the disk is");
    if (streamed_bytes > 0) {
      text += fmt::format("; {} of weights are read every step: {}", format_bytes(streamed_bytes),
                          advice);
    }
    return text;
  }
  std::string text = times(*step_s, steps);
  switch (bound) {
    case offload::Bound::compute:
      return text + ", limited by computing: a smaller picture or fewer steps would be faster";
    case offload::Bound::disk:
      text += ", limited by the disk";
      break;
    case offload::Bound::link:
      text += ", limited by the link to the device";
      break;
    case offload::Bound::decode:
      text += ", limited by decoding packs";
      break;
    case offload::Bound::room:
      text += ", limited by the room to read ahead";
      break;
  }
  if (next_gib_step_s)
    return text +
           fmt::format("; with 1 GiB more memory {} each", format_duration(*next_gib_step_s));
  return text + ": " + advice;
}

TimeEstimate estimate_time(const DiffusionPipeline& pipeline, const GenerationSize& size,
                           std::optional<int64_t> steps, at::Device device,
                           std::optional<uint64_t> weights_memory_bytes,
                           uint64_t rate_limit_bytes_per_s,
                           const offload::Measurements& measurements) {
  TimeEstimate estimate;
  estimate.steps = steps.value_or(pipeline.default_num_inference_steps());
  for (const auto& [name, component] : pipeline.components()) {
    if (!component.model || !runs_every_step(*component.model)) continue;
    const models::Workload workload = step_workload_of(*component.model, size, device);
    const auto measured = measurements.find(key_of(*component.model, workload, device));
    double rate = measured ? measured->read_bytes_per_s : 0;
    if (const auto limit = static_cast<double>(rate_limit_bytes_per_s); limit > 0)
      rate = rate > 0 ? std::min(rate, limit) : limit;
    PlanRequest request = request_for(workload, measured ? rate : 0);
    request.steps = static_cast<int>(estimate.steps);
    std::vector<PlannedComponent> planned = {
        describe_component(name, component.model, std::nullopt, request)};
    PlannedComponent& denoiser = planned.front();
    request.weights_memory_bytes = weights_memory_bytes.value_or(2 * denoiser.weight_bytes);
    if (measured)
      denoiser.groups = offload::with_measured_times(denoiser.groups, measured->compute_s);
    try {
      plan_components(planned, request);
    } catch (const BudgetError&) {
      return estimate;  // the engine says what it needs
    }
    estimate.streamed_bytes = denoiser.plan.streamed_bytes;
    if (!measured) return estimate;
    estimate.unknown = TimeEstimate::Unknown::reading;
    if (estimate.streamed_bytes == 0) {
      estimate.step_s = 0;
      for (const offload::GroupCost& group : denoiser.groups) *estimate.step_s += group.compute_s;
    } else if (rate > 0) {
      estimate.step_s = denoiser.plan.prediction.step_s;
      estimate.bound = denoiser.plan.prediction.bound;
      const double next = next_gib(planned, request).front().step_s;
      constexpr double kWorthIt = 0.98;
      if (next < kWorthIt * *estimate.step_s) estimate.next_gib_step_s = next;
    }
    return estimate;
  }
  return estimate;
}

void remember_times(const DiffusionPipeline& pipeline, const GenerationSize& size,
                    at::Device device, const offload::Measurements& measurements) {
  if (!device.is_cpu()) return;
  const auto& engine = pipeline.engine();
  const bool limited = engine && engine->options().read.rate_limit_bytes_per_s > 0;
  const double rate = engine && !limited ? engine->report().reads.rate() : 0;
  for (const auto& [name, time] : pipeline.compute_times()) {
    const std::shared_ptr<models::Model>& model = pipeline.components().at(name).model;
    const models::Workload workload = step_workload_of(*model, size, device);
    offload::Measurement measurement;
    measurement.read_bytes_per_s = rate;
    const PlannedComponent component =
        describe_component(name, model, std::nullopt, request_for(workload, 0));
    double operations = 0;
    for (const offload::GroupCost& group : component.groups) operations += group.compute_s;
    if (operations <= 0) continue;
    for (const offload::GroupCost& group : component.groups)
      measurement.compute_s[group.name] = group.compute_s / operations * time.shortest_s;
    try {
      measurements.store(key_of(*model, workload, device), measurement);
    } catch (const Error& error) {
      log::debug("times were not kept: {}", error.what());
    }
  }
}

}  // namespace ferry::pipelines
