#include "ferry/quant/stored_weights.h"

#include "ferry/quant/bitsandbytes.h"
#include "ferry/quant/comfy.h"
#include "ferry/quant/torchao.h"

namespace ferry::quant {

const std::vector<Format>& formats() {
  static const std::vector<Format> all = {
      {"torchao", read_torchao_checkpoint},
      {"bitsandbytes", read_bitsandbytes_checkpoint},
      {"comfy", read_comfy_checkpoint},  // takes what is fp8, so it comes after the others
  };
  return all;
}

StoredWeights read_weights(const weights::Checkpoint& checkpoint,
                           const nlohmann::ordered_json& config) {
  StoredWeights weights;
  weights.plain = checkpoint.tensors();
  for (const Format& format : formats()) {
    if (format.read(checkpoint, config, weights)) break;
  }
  return weights;
}

}  // namespace ferry::quant
