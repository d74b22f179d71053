#include "ferry/base/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <exception>
#include <utility>

#include "ferry/base/error.h"

// Sanitizers have to be told that the stack changes.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define FERRY_FIBER_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define FERRY_FIBER_TSAN 1
#endif

namespace ferry {

namespace {

constexpr size_t kPage = 4096;

// Thrown through a body that is not wanted any more. Not an exception that anyone catches by type.
struct Unwind {};

thread_local void* running_fiber = nullptr;

}  // namespace

struct Fiber::State {
  std::function<void()> body;
  std::byte* mapping = nullptr;  // a guard page, then the stack
  size_t stack_bytes = 0;
  ucontext_t inside{}, outside{};
  State* resumed_from = nullptr;
  std::exception_ptr error;
  bool started = false;
  bool done = false;
  bool unwinding = false;
#ifdef FERRY_FIBER_ASAN
  void* fake_inside = nullptr;
  void* fake_outside = nullptr;
  const void* outside_stack = nullptr;
  size_t outside_stack_bytes = 0;
#endif
#ifdef FERRY_FIBER_TSAN
  void* tsan_inside = nullptr;
  void* tsan_outside = nullptr;
#endif

  std::byte* stack() const {
    return mapping + kPage;
  }

  static State* running() {
    return static_cast<State*>(running_fiber);
  }

  void enter() {
    resumed_from = running();
    running_fiber = this;
#ifdef FERRY_FIBER_ASAN
    __sanitizer_start_switch_fiber(&fake_outside, stack(), stack_bytes);
#endif
#ifdef FERRY_FIBER_TSAN
    tsan_outside = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_inside, 0);
#endif
    ::swapcontext(&outside, &inside);
#ifdef FERRY_FIBER_ASAN
    __sanitizer_finish_switch_fiber(fake_outside, nullptr, nullptr);
#endif
    running_fiber = std::exchange(resumed_from, nullptr);
  }

  void leave(bool for_good) {
#ifdef FERRY_FIBER_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_inside, outside_stack,
                                   outside_stack_bytes);
#endif
#ifdef FERRY_FIBER_TSAN
    __tsan_switch_to_fiber(tsan_outside, 0);
#endif
    ::swapcontext(&inside, &outside);
#ifdef FERRY_FIBER_ASAN
    __sanitizer_finish_switch_fiber(fake_inside, &outside_stack, &outside_stack_bytes);
#endif
  }

  void run() {
#ifdef FERRY_FIBER_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &outside_stack, &outside_stack_bytes);
#endif
    try {
      body();
    } catch (const Unwind&) {
    } catch (...) {
      error = std::current_exception();
    }
    done = true;
    leave(/*for_good=*/true);
  }

  // makecontext() passes ints only.
  static void begin(unsigned high, unsigned low) {
    const auto address = (static_cast<uintptr_t>(high) << 32) | low;
    reinterpret_cast<State*>(address)->run();
  }
};

Fiber::Fiber(std::function<void()> body, size_t stack_bytes) : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.body = std::move(body);
  state.stack_bytes = (stack_bytes + kPage - 1) / kPage * kPage;
  void* mapping = ::mmap(nullptr, kPage + state.stack_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (mapping == MAP_FAILED)
    throw_error<Error>("cannot map a stack of {} bytes: {}", state.stack_bytes,
                       std::strerror(errno));
  state.mapping = static_cast<std::byte*>(mapping);
  // Stacks grow down: running over ends in a fault, not in somebody's memory.
  ::mprotect(mapping, kPage, PROT_NONE);
  ::getcontext(&state.inside);
  state.inside.uc_stack.ss_sp = state.stack();
  state.inside.uc_stack.ss_size = state.stack_bytes;
  state.inside.uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(&state);
  ::makecontext(&state.inside, reinterpret_cast<void (*)()>(&State::begin), 2,
                static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
#ifdef FERRY_FIBER_TSAN
  state.tsan_inside = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
  State& state = *state_;
  if (state.started && !state.done) {
    state.unwinding = true;
    state.enter();
  }
#ifdef FERRY_FIBER_TSAN
  __tsan_destroy_fiber(state.tsan_inside);
#endif
  ::munmap(state.mapping, kPage + state.stack_bytes);
}

void Fiber::resume() {
  State& state = *state_;
  if (state.done) throw Error("a fiber that has ended was resumed");
  state.started = true;
  state.enter();
  if (state.error) std::rethrow_exception(std::exchange(state.error, nullptr));
}

bool Fiber::done() const {
  return state_->done;
}

void Fiber::yield() {
  State* state = State::running();
  // While a stack is unwound nothing may go on beside it.
  if (!state || state->unwinding || std::uncaught_exceptions() > 0) return;
  state->leave(/*for_good=*/false);
  if (state->unwinding) throw Unwind{};
}

bool Fiber::running() {
  return running_fiber != nullptr;
}

}  // namespace ferry
