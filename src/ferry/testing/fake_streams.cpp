#include "ferry/testing/fake_streams.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace ferry::testing::fake {

namespace {

thread_local int64_t current_stream = 0;

std::chrono::nanoseconds milliseconds(double ms) {
  return std::chrono::nanoseconds(static_cast<int64_t>(ms * 1e6));
}

}  // namespace

// ---- StreamWorker ----

void StreamWorker::enqueue(Job job) {
  // A kernel's bits depend on the number of threads, which torch keeps per thread.
  int threads = job.kind == JobKind::operation ? at::get_num_threads() : 0;
  if (threads > 0) {
    job.run = [this, threads, run = std::move(job.run)] {
      if (std::this_thread::get_id() == thread_.get_id() && threads_ != threads) {
        at::set_num_threads(threads);
        threads_ = threads;
      }
      run();
    };
  }
  {
    std::lock_guard lock(mutex_);
    if (!stopped_) {
      if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
      queue_.push_back(std::move(job));
      ++submitted_;
      wake_.notify_one();
      return;
    }
  }
  execute(job);
}

bool StreamWorker::idle() {
  std::lock_guard lock(mutex_);
  return completed_ == submitted_;
}

void StreamWorker::wait() {
  std::unique_lock lock(mutex_);
  const uint64_t target = submitted_;
  done_.wait(lock, [&] { return completed_ >= target; });
}

void StreamWorker::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    wake_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
  std::lock_guard lock(mutex_);
  stopped_ = true;
}

void StreamWorker::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Job job = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    execute(job);
    job = {};  // what it holds is released before it counts as done
    lock.lock();
    ++completed_;
    done_.notify_all();
  }
}

void StreamWorker::execute(Job& job) {
  Streams& streams = Streams::get();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  at::NoGradGuard no_grad;
  const Clock::time_point begin = Clock::now();
  bool logged = false;
  try {
    if (job.kind != JobKind::bookkeeping) {
      const FakeAcceleratorOptions options = streams.options();
      logged = options.record_log;
      double ms = job.kind == JobKind::operation ? options.op_delay_ms : options.copy_delay_ms;
      if (options.random_delay_ms > 0) {
        if (!seeded_ || seed_ != options.seed) {
          std::seed_seq sequence{options.seed, static_cast<uint64_t>(id_)};
          random_.seed(sequence);
          seed_ = options.seed;
          seeded_ = true;
        }
        ms += std::uniform_real_distribution<double>(0, options.random_delay_ms)(random_);
      }
      if (ms > 0) std::this_thread::sleep_for(milliseconds(ms));
    }
    job.run();
  } catch (...) {
    streams.keep_error(std::current_exception());
  }
  if (logged) {
    auto since_start = [&](Clock::time_point time) {
      return std::chrono::duration<double, std::milli>(time - streams.start_).count();
    };
    streams.keep_log({id_, job.name, job.bytes, since_start(begin), since_start(Clock::now())});
  }
}

// ---- Streams ----

Streams& Streams::get() {
  static Streams* const streams = new Streams;  // tensors may be freed after main()
  return *streams;
}

Streams::Streams() {
  for (size_t i = 0; i < workers_.size(); ++i)
    workers_[i] = std::make_unique<StreamWorker>(static_cast<int64_t>(i));
}

StreamWorker& Streams::worker(int64_t stream_id) {
  TORCH_CHECK(stream_id >= 0 && stream_id <= kPoolStreams, "fake accelerator: stream ", stream_id,
              " is not one of its streams, 0 to ", kPoolStreams);
  return *workers_[static_cast<size_t>(stream_id)];
}

int64_t Streams::next_pool_stream() {
  std::lock_guard lock(mutex_);
  return 1 + next_pool_stream_++ % kPoolStreams;
}

int64_t Streams::current() const {
  return current_stream;
}

int64_t Streams::exchange_current(int64_t stream_id) {
  worker(stream_id);  // throws for a stream of another device
  return std::exchange(current_stream, stream_id);
}

void Streams::enqueue(int64_t stream_id, Job job) {
  const JobKind kind = job.kind;
  bool wait = false;
  {
    std::lock_guard lock(mutex_);
    if (kind == JobKind::operation) ++counters_.operations;
    if (kind == JobKind::host_to_device) {
      ++counters_.host_to_device_copies;
      counters_.host_to_device_bytes += job.bytes;
    }
    if (kind == JobKind::device_to_host) {
      ++counters_.device_to_host_copies;
      counters_.device_to_host_bytes += job.bytes;
    }
    wait = kind == JobKind::operation && !options_.asynchronous_compute;
  }
  worker(stream_id).enqueue(std::move(job));
  if (wait) worker(stream_id).wait();
}

void Streams::synchronize(int64_t stream_id, const std::string& why) {
  count_host_synchronization(why);
  worker(stream_id).wait();
  rethrow_error();
}

void Streams::synchronize_all(const std::string& why) {
  count_host_synchronization(why);
  drain();
}

void Streams::drain() {
  // Work of one stream may wait for work of another, but not for work that is enqueued later.
  for (auto& worker : workers_) worker->wait();
  rethrow_error();
}

void Streams::count_host_synchronization(const std::string& why) {
  std::lock_guard lock(mutex_);
  counters_.host_synchronizations.push_back(why);
}

void Streams::rethrow_error() {
  std::exception_ptr error;
  {
    std::lock_guard lock(mutex_);
    error = std::exchange(error_, nullptr);
  }
  if (error) std::rethrow_exception(error);
}

FakeAcceleratorOptions Streams::options() {
  std::lock_guard lock(mutex_);
  return options_;
}

void Streams::set_options(const FakeAcceleratorOptions& options) {
  drain();
  std::lock_guard lock(mutex_);
  options_ = options;
}

FakeCounters Streams::counters() {
  std::lock_guard lock(mutex_);
  return counters_;
}

void Streams::reset_counters() {
  std::lock_guard lock(mutex_);
  counters_ = {};
}

std::vector<FakeOperation> Streams::log() {
  std::lock_guard lock(mutex_);
  return log_;
}

void Streams::clear_log() {
  std::lock_guard lock(mutex_);
  log_.clear();
}

void Streams::stop() {
  for (auto& worker : workers_) worker->wait();
  for (auto& worker : workers_) worker->stop();
}

void Streams::keep_error(std::exception_ptr error) {
  std::lock_guard lock(mutex_);
  if (!error_) error_ = std::move(error);
}

void Streams::keep_log(FakeOperation entry) {
  std::lock_guard lock(mutex_);
  log_.push_back(std::move(entry));
}

void Streams::paced(JobKind direction, uint64_t bytes,
                    const std::function<void(uint64_t begin, uint64_t end)>& copy) {
  const bool to_device = direction == JobKind::host_to_device;
  const FakeAcceleratorOptions now = options();
  const double rate =
      to_device ? now.host_to_device_bytes_per_second : now.device_to_host_bytes_per_second;
  std::lock_guard engine(engines_[to_device ? 0 : 1]);
  if (rate <= 0 || bytes == 0) return copy(0, bytes);
  constexpr uint64_t kPart = 1 << 20;
  const Clock::time_point start = Clock::now();
  for (uint64_t begin = 0; begin < bytes; begin += kPart) {
    const uint64_t end = std::min(bytes, begin + kPart);
    std::this_thread::sleep_until(start + milliseconds(static_cast<double>(end) / rate * 1e3));
    copy(begin, end);
  }
}

// ---- events ----

namespace events {
namespace {

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0, completed = 0;  // versions
  Clock::time_point when = {};           // of the last completion
  bool timing = false;
};
// Jobs share the state: an event may be destroyed before its stream comes to it.
using Handle = std::shared_ptr<State>;

Handle& handle(void* event) {
  return *static_cast<Handle*>(event);
}

void wait_for(State& state, uint64_t version) {
  std::unique_lock lock(state.mutex);
  state.changed.wait(lock, [&] { return state.completed >= version; });
}

}  // namespace

void record(void** event, int64_t stream_id, c10::EventFlag flag) {
  if (!*event) {
    *event = new Handle(std::make_shared<State>());
    handle(*event)->timing = flag == c10::EventFlag::BACKEND_DEFAULT;
  }
  Handle state = handle(*event);
  uint64_t version = 0;
  {
    std::lock_guard lock(state->mutex);
    version = ++state->recorded;
  }
  Streams::get().enqueue(stream_id, {.run = [state, version] {
                           std::lock_guard lock(state->mutex);
                           state->completed = std::max(state->completed, version);
                           state->when = Clock::now();
                           state->changed.notify_all();
                         }});
}

void block(void* event, int64_t stream_id) {
  if (!event) return;
  Handle state = handle(event);
  uint64_t version = 0;
  {
    std::lock_guard lock(state->mutex);
    version = state->recorded;
  }
  Streams::get().enqueue(stream_id, {.run = [state, version] { wait_for(*state, version); }});
}

bool query(void* event) {
  if (!event) return true;
  State& state = *handle(event);
  std::lock_guard lock(state.mutex);
  return state.completed == state.recorded;
}

void synchronize(void* event) {
  if (!event) return;
  Streams::get().count_host_synchronization("synchronize event");
  State& state = *handle(event);
  uint64_t version = 0;
  {
    std::lock_guard lock(state.mutex);
    version = state.recorded;
  }
  wait_for(state, version);
  Streams::get().rethrow_error();
}

double elapsed_ms(void* first, void* second) {
  TORCH_CHECK(first && second, "fake accelerator: elapsedTime of an event that was not recorded");
  Clock::time_point times[2];
  int i = 0;
  for (void* event : {first, second}) {
    State& state = *handle(event);
    std::lock_guard lock(state.mutex);
    TORCH_CHECK(state.timing,
                "fake accelerator: elapsedTime wants events made with EventFlag::BACKEND_DEFAULT");
    TORCH_CHECK(state.completed == state.recorded,
                "fake accelerator: elapsedTime of an event that is not complete yet");
    times[i++] = state.when;
  }
  return std::chrono::duration<double, std::milli>(times[1] - times[0]).count();
}

void destroy(void* event) noexcept {
  if (event) delete &handle(event);
}

}  // namespace events
}  // namespace ferry::testing::fake
