// A whole run of a scheduler with given model outputs: how any language checks a scheduler.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "ferry/schedulers/scheduler.h"

namespace ferry::schedulers {

using NamedTensors = std::map<std::string, at::Tensor>;

// Inputs: `model_outputs` [n, ...] and `sample` [...] (both or neither: then only the schedule),
// optional `noise` [n, ...] (instead of drawn noise), `timesteps` and `sigmas` [n] (given to
// set_timesteps), `per_token_timesteps` [n, batch, tokens].
// Arguments: `mu`, `begin_index`, `seed` (of the generator that step() draws from), and those of
// step(). Outputs: `timesteps`, `sigmas`, `init_noise_sigma`, `trajectory` [n + 1, ...], the sample
// first. Throws ArgumentError for inputs that are unknown, missing or of unequal length.
NamedTensors run_trajectory(Scheduler& scheduler, const NamedTensors& inputs,
                            std::optional<int64_t> steps,
                            const nlohmann::json& arguments = nlohmann::json::object());

}  // namespace ferry::schedulers
