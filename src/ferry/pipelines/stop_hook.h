// Stopping a running model between two of its blocks.
#pragma once

#include "ferry/base/stop_token.h"
#include "ferry/nn/module.h"

namespace ferry::pipelines {

// While it lives, `root` throws Cancelled before its next block once a stop was requested. A block
// is a module in a list ("transformer_blocks.3"). Must not outlive `root`.
class StopHooks {
 public:
  StopHooks(nn::Module& root, const StopToken& stop);
  ~StopHooks();
  StopHooks(const StopHooks&) = delete;
  StopHooks& operator=(const StopHooks&) = delete;

 private:
  std::vector<nn::Module*> hooked_;
};

}  // namespace ferry::pipelines
