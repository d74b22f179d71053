#include "interrupt.h"

#include <semaphore.h>
#include <signal.h>

#include <atomic>
#include <cerrno>
#include <thread>

#include "module.h"

namespace ferry::python {
namespace {

// What the handler may touch: a semaphore for the watching thread, and the handler it replaced.
sem_t arrived;
struct sigaction replaced;
std::atomic<bool> watching = false;

void on_interrupt(int signal) {
  const int kept_errno = errno;
  sem_post(&arrived);
  if (replaced.sa_handler != SIG_IGN && replaced.sa_handler != SIG_DFL) replaced.sa_handler(signal);
  errno = kept_errno;
}

// Whether this is the main thread, and Python would raise KeyboardInterrupt in it.
bool raises_keyboard_interrupt() {
  const py::module_ threading = py::module_::import("threading");
  if (!threading.attr("current_thread")().is(threading.attr("main_thread")())) return false;
  const py::module_ signal = py::module_::import("signal");
  return signal.attr("getsignal")(signal.attr("SIGINT")).is(signal.attr("default_int_handler"));
}

}  // namespace

struct InterruptWatch::State {
  std::atomic<bool> finished = false;
  std::thread thread;
};

InterruptWatch::InterruptWatch(std::function<void()> stop) {
  if (watching || !raises_keyboard_interrupt()) return;
  struct sigaction current {};
  sigaction(SIGINT, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) != 0) return;  // not Python's
  watching = true;
  state_ = std::make_unique<State>();
  sem_init(&arrived, 0, 0);
  state_->thread = std::thread([state = state_.get(), stop = std::move(stop)] {
    while (sem_wait(&arrived) != 0 && errno == EINTR) {
    }
    if (!state->finished) stop();
  });
  replaced = current;
  struct sigaction action = current;
  action.sa_handler = on_interrupt;
  sigaction(SIGINT, &action, nullptr);
}

InterruptWatch::~InterruptWatch() {
  if (!state_) return;
  sigaction(SIGINT, &replaced, nullptr);
  state_->finished = true;
  sem_post(&arrived);
  state_->thread.join();
  sem_destroy(&arrived);
  watching = false;
}

void check_signals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace ferry::python
