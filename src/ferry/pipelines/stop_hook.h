// Stopping a running model between two of its blocks, and while it loads.
#pragma once

#include "ferry/base/stop_token.h"
#include "ferry/models/model.h"

namespace ferry::pipelines {

// While it lives, `root` throws Cancelled before its next block once a stop was requested, and so
// does the load of its first call. A block is a module in a list ("transformer_blocks.3"). Must not
// outlive `root`.
class StopHooks {
 public:
  StopHooks(models::Model& root, const StopToken& stop);
  ~StopHooks();
  StopHooks(const StopHooks&) = delete;
  StopHooks& operator=(const StopHooks&) = delete;

 private:
  models::Model& root_;
  std::vector<nn::Module*> hooked_;
};

}  // namespace ferry::pipelines
