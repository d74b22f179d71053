#include "ferry/hooks/lockstep.h"

#include <ATen/ThreadLocalState.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <memory>

#include "ferry/base/fiber.h"

namespace ferry::hooks {

namespace {

void run_once(const std::vector<GroupOffloading*>& offloaded,
              const std::vector<std::function<void()>>& passes, LockstepTurn turn) {
  for (GroupOffloading* one : offloaded) {
    one->set_lockstep_turn(turn);
    one->client().begin_lockstep(passes.empty() ? 0 : passes.size() - 1);
  }
  struct Guard {
    const std::vector<GroupOffloading*>& offloaded;
    ~Guard() {
      for (GroupOffloading* one : offloaded) one->client().end_lockstep();
    }
  } guard{offloaded};

  // Guards that a forward holds (grad mode, inference mode) are thread-local: each pass has its
  // own.
  const at::ThreadLocalState outside;
  struct Pass {
    std::unique_ptr<Fiber> fiber;
    at::ThreadLocalState state;
  };
  std::vector<Pass> running(passes.size());
  for (size_t i = 0; i < passes.size(); ++i) running[i].fiber = std::make_unique<Fiber>(passes[i]);

  try {
    for (bool any = true; any;) {
      any = false;
      for (size_t i = 0; i < running.size(); ++i) {
        if (running[i].fiber->done()) continue;
        any = true;
        for (GroupOffloading* one : offloaded) one->client().follow(i > 0);
        at::ThreadLocalState::setThreadLocalState(running[i].state);
        running[i].fiber->resume();
        running[i].state = at::ThreadLocalState();
        at::ThreadLocalState::setThreadLocalState(outside);
      }
    }
  } catch (...) {
    for (Pass& pass : running) {
      at::ThreadLocalState::setThreadLocalState(pass.state);
      pass.fiber.reset();
    }
    at::ThreadLocalState::setThreadLocalState(outside);
    throw;
  }
}

}  // namespace

void run_lockstep(const std::vector<GroupOffloading*>& offloaded,
                  const std::vector<std::function<void()>>& passes, LockstepTurn turn) {
  for (bool again = false;; again = true) {
    try {
      return run_once(offloaded, passes, turn);
    } catch (const c10::OutOfMemoryError& error) {
      // While other passes were under way, the one that failed could not be run again by itself.
      const bool room = std::any_of(
          offloaded.begin(), offloaded.end(),
          [&](const GroupOffloading* one) { return one->engine()->make_room(error, again); });
      if (!room) throw;
    }
  }
}

}  // namespace ferry::hooks
