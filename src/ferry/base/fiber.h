// Functions that take turns on one thread.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace ferry {

// A function with a stack of its own, which it can leave in the middle and come back to. Everything
// runs on the thread that calls resume(), so thread-local state and thread pools are shared: a
// fiber has nothing to synchronise. Not thread-safe.
class Fiber {
 public:
  explicit Fiber(std::function<void()> body, size_t stack_bytes = 8 << 20);
  // A body that is not at its end is unwound: yield() throws in it.
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs the body until it yields or ends. Throws what the body threw; then it has ended.
  // REQUIRES: not done(), and not called from within this fiber.
  void resume();
  bool done() const;

  // Back to whoever resumed the running fiber. Does nothing outside of one.
  static void yield();
  // Whether the caller runs in a fiber.
  static bool running();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ferry
