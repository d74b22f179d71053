// How `ferry plan` shows plans: text for people, JSON for programs.
#pragma once

#include <nlohmann/json.hpp>

#include <string>
#include <vector>

#include "ferry/pipelines/plan_components.h"

namespace ferry::cli {

using pipelines::NextGiB;
using pipelines::PlannedComponent;
using pipelines::PlanRequest;

std::string plan_text(const std::string& title, const std::vector<PlannedComponent>& components,
                      const PlanRequest& request, const std::vector<NextGiB>& next);
nlohmann::ordered_json plan_json(const std::vector<PlannedComponent>& components,
                                 const PlanRequest& request, const std::vector<NextGiB>& next);

}  // namespace ferry::cli
