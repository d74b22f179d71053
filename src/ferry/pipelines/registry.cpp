#include "ferry/pipelines/flux/pipeline_flux.h"
#include "ferry/pipelines/pipeline.h"

namespace ferry::pipelines {

const std::vector<PipelineClass>& pipeline_classes() {
  static const std::vector<PipelineClass> classes = {
      {"FluxPipeline",
       {"scheduler", "transformer", "vae"},
       [](std::map<std::string, Component> components, nlohmann::ordered_json config) {
         return std::make_shared<FluxPipeline>(std::move(components), std::move(config));
       }},
  };
  return classes;
}

}  // namespace ferry::pipelines
