// Streams, events and the copy engine of the fake accelerator (fake_accelerator.h): one worker
// thread and one FIFO a stream.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ferry/testing/fake_accelerator.h"

namespace ferry::testing::fake {

using Clock = std::chrono::steady_clock;

enum class JobKind {
  bookkeeping,  // poison, event: neither delayed nor logged
  operation,
  host_to_device,
  device_to_host,
};

struct Job {
  JobKind kind = JobKind::bookkeeping;
  std::string name = {};
  uint64_t bytes = 0;  // of copies between host and device
  std::function<void()> run;
};

// A job must not keep device storage alive: its destructor would free in the worker's order, and a
// use after free would go unseen. It holds addresses.
class StreamWorker {
 public:
  explicit StreamWorker(int64_t id) : id_(id) {}

  void enqueue(Job job);
  bool idle();
  // Until everything that was enqueued before the call has run.
  void wait();
  // Runs what is left, then ends the thread; later jobs run in enqueue().
  void stop();

 private:
  void work();
  void execute(Job& job);

  const int64_t id_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Job> queue_;
  uint64_t submitted_ = 0, completed_ = 0;
  bool stopping_ = false, stopped_ = false;
  std::thread thread_;  // started with the first job
  std::mt19937_64 random_;
  uint64_t seed_ = 0;
  bool seeded_ = false;
  int threads_ = 0;  // what at::set_num_threads was told on the worker
};

// The whole device; lives until the process ends.
class Streams {
 public:
  static constexpr int64_t kPoolStreams = 8;
  static Streams& get();

  StreamWorker& worker(int64_t stream_id);
  int64_t next_pool_stream();
  // Of the calling thread.
  int64_t current() const;
  int64_t exchange_current(int64_t stream_id);

  // Counts the job and hands it to the stream.
  void enqueue(int64_t stream_id, Job job);
  // The host waits: counted under `why`. Rethrows the first error of a worker.
  void synchronize(int64_t stream_id, const std::string& why);
  void synchronize_all(const std::string& why);
  void drain();
  void count_host_synchronization(const std::string& why);
  void rethrow_error();

  FakeAcceleratorOptions options();
  void set_options(const FakeAcceleratorOptions& options);
  FakeCounters counters();
  void reset_counters();
  std::vector<FakeOperation> log();
  void clear_log();
  void stop();

  // Runs copy(begin, end) over parts of `bytes`, each not before the direction's bandwidth allows
  // it to have arrived. One copy at a time in a direction.
  void paced(JobKind direction, uint64_t bytes,
             const std::function<void(uint64_t begin, uint64_t end)>& copy);

 private:
  friend class StreamWorker;
  Streams();
  void keep_error(std::exception_ptr error);
  void keep_log(FakeOperation entry);

  std::array<std::unique_ptr<StreamWorker>, kPoolStreams + 1> workers_;
  std::array<std::mutex, 2> engines_;  // held by the copy that is under way: to device, to host
  std::mutex mutex_;                   // of everything below
  FakeAcceleratorOptions options_;
  FakeCounters counters_;
  std::vector<FakeOperation> log_;
  std::exception_ptr error_;
  int64_t next_pool_stream_ = 0;
  const Clock::time_point start_ = Clock::now();
};

// What c10::Event holds, as c10::impl::DeviceGuardImplInterface hands it out: a void*.
namespace events {
void record(void** event, int64_t stream_id, c10::EventFlag flag);
void block(void* event, int64_t stream_id);
bool query(void* event);
void synchronize(void* event);
double elapsed_ms(void* first, void* second);
void destroy(void* event) noexcept;
}  // namespace events

}  // namespace ferry::testing::fake
