// How `ferry plan` shows plans: text for people, JSON for programs.
#pragma once

#include <nlohmann/json.hpp>

#include <string>
#include <vector>

#include "plan_components.h"

namespace ferry::cli {

// One more GiB of a tier: what the step of the main component takes then.
struct NextGiB {
  std::string what;  // "--memory", "--host-memory"
  double step_s;
};

std::string plan_text(const std::string& title, const std::vector<PlannedComponent>& components,
                      const PlanRequest& request, const std::vector<NextGiB>& next);
nlohmann::ordered_json plan_json(const std::vector<PlannedComponent>& components,
                                 const PlanRequest& request, const std::vector<NextGiB>& next);

}  // namespace ferry::cli
