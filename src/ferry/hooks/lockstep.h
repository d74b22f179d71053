// Several passes through offloaded models, group by group: each group of weights comes once and
// serves every pass before it goes.
#pragma once

#include <functional>
#include <vector>

#include "ferry/hooks/group_offloading.h"

namespace ferry::hooks {

// Runs the passes, each of which calls each of the offloaded modules once at most (the cond and the
// uncond prediction of true CFG, say), in turns on this thread: all of them use a group before the
// first goes on to the next one. Every pass computes what it would compute alone, bit for bit.
// Where the device's memory runs out, all passes run once more from their beginning.
// Passes that take different ways through the model only lose the saving. Throws what a pass
// throws; then the others are unwound.
void run_lockstep(const std::vector<GroupOffloading*>& offloaded,
                  const std::vector<std::function<void()>>& passes,
                  LockstepTurn turn = LockstepTurn::group);

}  // namespace ferry::hooks
