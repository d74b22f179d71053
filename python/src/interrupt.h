// Ctrl-C while C++ works without the GIL: Python would see it only afterwards, minutes later.
#pragma once

#include <functional>
#include <memory>

namespace ferry::python {

// While it lives, SIGINT makes `stop` be called, from a thread of its own, besides what Python does
// with it. Only on the main thread and where Ctrl-C means KeyboardInterrupt: a program that handles
// SIGINT itself is asked by PyErr_CheckSignals() alone. REQUIRES: the GIL, at both ends; one at a
// time on the main thread, so none within another's work (a second one does nothing).
class InterruptWatch {
 public:
  explicit InterruptWatch(std::function<void()> stop);
  ~InterruptWatch();
  InterruptWatch(const InterruptWatch&) = delete;
  InterruptWatch& operator=(const InterruptWatch&) = delete;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Runs Python's handlers of signals that have arrived. Throws what they raise (KeyboardInterrupt).
// REQUIRES: the GIL.
void check_signals();

}  // namespace ferry::python
