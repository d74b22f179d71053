// Plans of components under budgets on a machine: what `ferry plan` prints, and from which a
// generation says how long it will take.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ferry/models/costs.h"
#include "ferry/models/model.h"
#include "ferry/offload/hardware.h"
#include "ferry/offload/plan.h"
#include "ferry/offload/simulate.h"

namespace ferry::pipelines {

struct PlanRequest {
  offload::Hardware hardware;
  models::Workload workload;
  int steps = 28;
  std::optional<uint64_t> memory_bytes;          // all that may be held where compute happens
  std::optional<uint64_t> weights_memory_bytes;  // the weights' part of it
  uint64_t host_memory_bytes = 0;                // 0: staging only
  bool packs = false;                            // lossless packs may be made
};

struct PlannedComponent {
  std::string name;  // "transformer"
  std::shared_ptr<models::Model> model;
  std::vector<offload::GroupCost> groups;
  uint64_t weight_bytes = 0;  // all of them
  uint64_t small_bytes = 0;   // slots that always stay
  uint64_t table_bytes = 0;   // embedding tables, whose rows are read as needed
  uint64_t unused_bytes = 0;  // of modules that a run does not use
  int passes = 1;

  models::Workload workload;  // tiled where the decode would not fit otherwise
  uint64_t activation_bytes = 0;
  offload::PlanOptions options;
  offload::Plan plan;
  // Peak where compute happens: activations, small slots of all components, plan.
  uint64_t peak_bytes = 0;
  // Of a run in steady state, or of the only one.
  double run_s() const {
    return passes > 1 ? plan.prediction.step_s : plan.prediction.first_step_s;
  }
  double total_s() const {
    return plan.prediction.first_step_s + (passes - 1) * plan.prediction.step_s;
  }
};

// Whether the model computes once a step and not once a picture.
bool runs_every_step(const models::Model& model);

// The groups of a model: its leaves, as leaf-level offloading makes them. `dtype` is given where
// the weights are not there; else each slot has the checkpoint's.
PlannedComponent describe_component(const std::string& name, std::shared_ptr<models::Model> model,
                                    std::optional<at::ScalarType> dtype,
                                    const PlanRequest& request);

// The components of a pipeline's or component's folder, in the order in which they run. Throws
// FormatError, IoError.
std::vector<PlannedComponent> components_of_folder(const std::string& folder,
                                                   const PlanRequest& request);

// Plans all components, which run one after another under one budget; homes in host memory go to
// the component that runs most often first. Throws BudgetError stating the least memory.
void plan_components(std::vector<PlannedComponent>& components, const PlanRequest& request);

// The component that takes the most time.
const PlannedComponent& main_component(const std::vector<PlannedComponent>& components);

// One more GiB of a tier: what the step of the main component takes then.
struct NextGiB {
  std::string what;  // "--memory", "--host-memory"
  double step_s;
};
// REQUIRES: plan_components() has planned `components` for `request`.
std::vector<NextGiB> next_gib(const std::vector<PlannedComponent>& components,
                              const PlanRequest& request);

}  // namespace ferry::pipelines
