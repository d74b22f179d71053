// An accelerator without hardware: a libtorch PrivateUse1 backend ("fake") whose memory and streams
// behave as a GPU's and whose kernels are the CPU's, so that tests run the code path of a GPU and
// see its mistakes: a missing event wait gives wrong results, memory that was freed is NaN, the
// host cannot read device memory, an allocation over the capacity throws.
//
//   at::Device device = testing::FakeAccelerator::install({.capacity_bytes = 64 << 20});
//   at::Tensor x = at::ones({2, 3}, device);
//
// at::accelerator, c10::Stream, c10::Event, c10::impl::VirtualGuardImpl, pinned_memory(true) and
// record_stream work on it as on CUDA. Results equal the CPU's bit for bit.
//
// Rules that it enforces, all of them a GPU's:
// - Work is in order within a stream and in no order between streams without events. That holds for
//   allocations too: memory belongs to the stream that was current when it was allocated; it is
//   filled with 0xFF bytes (NaN) in that stream's order at allocation and at free. Another stream
//   has to wait for the allocating stream before it writes, and needs record_stream() (or a living
//   tensor) for what it still reads.
// - A copy between host and device is asynchronous only with non_blocking and pinned host memory.
// - A CPU tensor among the arguments of an operation on the device throws, unless it is 0-dim.
//
// What it does not have: random generators of its own (the CPU's default generator serves), several
// devices, graphs.
//
// Thread-safety: every function may be called from any thread, except that options should not be
// changed while other threads use the device. One device a process: that is what libtorch has.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace ferry::testing {

struct FakeAcceleratorOptions {
  // Device memory; more throws c10::OutOfMemoryError. Sizes count in multiples of 512 bytes, as
  // CUDA's allocator does.
  uint64_t capacity_bytes = uint64_t{16} << 30;
  // Pinned host memory; more throws c10::Error, as where memlock is refused. 0 refuses all.
  uint64_t pinned_capacity_bytes = std::numeric_limits<uint64_t>::max();
  // Freed device memory that stays poisoned, and its addresses unused, before it is reused.
  uint64_t quarantine_bytes = uint64_t{64} << 20;

  // Bandwidth in bytes per second; 0 does not pace. Copies in one direction share it, in turn.
  double host_to_device_bytes_per_second = 0;
  double device_to_host_bytes_per_second = 0;
  // Added to every copy between host and device, and to every operation (copies on the device
  // included), before its effect. "Every copy 3 ms late" and "every operation 3 ms late" are the
  // two schedules that show missing waits deterministically.
  double copy_delay_ms = 0;
  double op_delay_ms = 0;
  // Added to both: evenly distributed between 0 and this; `seed` gives the sequence, per stream.
  double random_delay_ms = 0;
  uint64_t seed = 0;

  // False: each operation finishes before the call returns. Hides most missing waits; for
  // debugging.
  bool asynchronous_compute = true;
  // Keep what was executed for log().
  bool record_log = false;
};

// One executed operation or copy. Times in ms since an arbitrary start.
struct FakeOperation {
  int64_t stream_id;  // c10::Stream::id(): 0 is the default stream
  std::string name;   // "aten::mm", "copy host to device", …
  uint64_t bytes;     // of copies between host and device
  double begin_ms, end_ms;
};

struct FakeCounters {
  uint64_t host_to_device_copies = 0, host_to_device_bytes = 0;
  uint64_t device_to_host_copies = 0, device_to_host_bytes = 0;
  uint64_t operations = 0;  // on the device: kernels and copies within it
  // What made the host wait for the device, in order: "synchronize stream", "copy host to device
  // (pageable)", "aten::_local_scalar_dense", … Operations without an asynchronous form here run on
  // the host and count too ("aten::nonzero").
  std::vector<std::string> host_synchronizations;
};

class FakeAccelerator {
 public:
  // Registers the backend, once a process; later calls only set the options. Returns device(). Call
  // it before the first at::accelerator::getAccelerator(), hasCUDA() or pinned allocation: libtorch
  // remembers what it found. Throws DeviceError if address space for its memory is refused
  // (ulimit -v).
  static at::Device install(const FakeAcceleratorOptions& options = {});
  static bool installed();
  // "fake:0" (PrivateUse1).
  static at::Device device();

  // Waits for the device, then replaces all options; memory in use stays.
  static void set_options(const FakeAcceleratorOptions& options);
  static FakeAcceleratorOptions options();

  // Device memory that is allocated, or freed but still held by record_stream(); its peak since
  // reset_peak(). at::accelerator::getMemoryInfo and getDeviceStats say the same.
  static uint64_t live_bytes();
  static uint64_t peak_bytes();
  static void reset_peak();
  static uint64_t pinned_bytes();

  static FakeCounters counters();
  static void reset_counters();
  // In order of their end; empty without record_log.
  static std::vector<FakeOperation> log();
  static void clear_log();

  // Waits for all streams, and rethrows the first error that an operation met on a worker. Not
  // counted as a host synchronisation.
  static void drain();

  FakeAccelerator() = delete;
};

}  // namespace ferry::testing
