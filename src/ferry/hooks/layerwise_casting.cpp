#include "ferry/hooks/layerwise_casting.h"

#include <regex>

#include "ferry/base/error.h"
#include "ferry/nn/conv.h"
#include "ferry/nn/embedding.h"
#include "ferry/nn/linear.h"
#include "ferry/tensor/dtype.h"

namespace ferry::hooks {

const std::vector<std::string> kDefaultSkipModulesPattern = {"pos_embed", "patch_embed", "norm",
                                                             "^proj_in$", "^proj_out$"};

namespace {

class Caster {
 public:
  explicit Caster(const LayerwiseCastingConfig& config) : config_(config) {
    for (const std::string& pattern : config.skip_modules_pattern) {
      try {
        skip_.emplace_back(pattern);
      } catch (const std::regex_error& error) {
        throw_error<ArgumentError>("layerwise casting: '{}' is no regular expression: {}", pattern,
                                   error.what());
      }
    }
  }

  void walk(torch::nn::Module& module, const std::string& name) {
    for (const std::regex& pattern : skip_) {
      if (std::regex_search(name, pattern)) return;
    }
    auto* linear = dynamic_cast<nn::Linear*>(&module);
    auto* embedding = dynamic_cast<nn::Embedding*>(&module);
    if (linear && linear->quantized_weight()) return;
    if (linear || embedding || dynamic_cast<nn::Conv2d*>(&module)) {
      if (embedding) embedding->set_compute_dtype(config_.compute_dtype);
      static_cast<nn::Module&>(module).to(config_.storage_dtype);
      ++layers;
      return;
    }
    for (const auto& child : module.named_children())
      walk(*child.value(), name.empty() ? child.key() : name + "." + child.key());
  }

  size_t layers = 0;

 private:
  const LayerwiseCastingConfig& config_;
  std::vector<std::regex> skip_;
};

}  // namespace

size_t apply_layerwise_casting(nn::Module& module, const LayerwiseCastingConfig& config) {
  if (!at::isFloat8Type(config.storage_dtype)) {
    throw_error<ArgumentError>("layerwise casting: got storage dtype {}, expected a float8",
                               tensor::dtype_name(config.storage_dtype));
  }
  auto refuse_offloaded = [](const torch::nn::Module& below) {
    const auto* hooked = dynamic_cast<const nn::Module*>(&below);
    if (hooked && hooked->weights_are_offloaded()) {
      throw ArgumentError(
          "layerwise casting: offloading is enabled already; cast first, then offload");
    }
  };
  refuse_offloaded(module);
  for (const auto& below : module.modules(/*include_self=*/false)) refuse_offloaded(*below);
  Caster caster(config);
  caster.walk(module, "");
  return caster.layers;
}

}  // namespace ferry::hooks
