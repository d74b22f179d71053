// Where compute happens on an accelerator: reads land in pinned host memory, copies to the arena
// are enqueued on a stream of their own as reads complete, and events order copies and compute, so
// that the host waits for neither.
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>

#include <algorithm>
#include <exception>
#include <thread>
#include <utility>

#include "ferry/base/log.h"
#include "ferry/base/trace.h"
#include "ferry/base/units.h"
#include "ferry/offload/carrier.h"

namespace ferry::offload {

using Clock = std::chrono::steady_clock;

namespace {

// How often the thread looks for reads and copies that completed, while there are any.
constexpr auto kPollInterval = std::chrono::microseconds(50);

class DeviceCarrier final : public Carrier {
 public:
  explicit DeviceCarrier(CarrierContext context)
      : context_(std::move(context)),
        guard_(context_.options.device.type()),
        copy_stream_(guard_.getStreamFromGlobalPool(context_.options.device)),
        host_(Memory::pinned_for(context_.options.device, context_.host_memory_bytes)) {
    host_.set_ring_bytes(context_.host_memory_bytes);
    // The arena's memory belongs to the stream that was current when it was allocated.
    record()->block(copy_stream_);
    thread_ = std::thread([this] { run(); });
  }

  ~DeviceCarrier() override {
    {
      std::lock_guard lock(context_.mutex);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
    // What was read ahead may still be on its way into the arena, on a stream that its memory knows
    // nothing of: whoever gets that next would be written over.
    try {
      at::accelerator::synchronizeDevice(context_.options.device.index());
    } catch (const std::exception& error) {
      log::error("the device does not answer at the engine's end: {}", error.what());
    }
  }

  Start start(Piece& piece, Urgency urgency) override {
    piece.arena_at = allocate(context_.arena, piece.resident, piece.flat_bytes, urgency);
    if (!piece.arena_at) return Start::no_room;
    if (piece.staged) {
      enqueue_copies(piece);
      return Start::begun;
    }
    if (!reserve_host(piece)) {
      release_arena(piece, nullptr);
      return Start::no_staging;
    }
    try {
      piece.started = Clock::now();
      piece.ticket = submit_reads(context_.reader, piece, host_.at(*piece.read_at));
    } catch (...) {
      release_host(piece);
      release_arena(piece, nullptr);
      throw;
    }
    piece.where = Whereabouts::reading;
    reading_.push_back(&piece);
    changed_.notify_all();
    return Start::begun;
  }

  void keep(Piece& piece) override {
    if (piece.arena_at) context_.arena.make_lasting(*piece.arena_at);
    piece.resident = true;
  }

  bool wait_for_staging(std::unique_lock<std::mutex>& lock) override {
    throw_if_broken();
    if (reading_.empty() && leaving_.empty()) return false;
    const uint64_t used = host_.used_bytes();
    changed_.notify_all();
    changed_.wait(lock, [&] {
      return broken_ || host_.used_bytes() < used || (reading_.empty() && leaving_.empty());
    });
    throw_if_broken();
    return true;
  }

  bool has_arrived(const Piece& piece) const override {
    return piece.error || piece.where == Whereabouts::copying || piece.where == Whereabouts::here;
  }

  void arrive(Piece& piece, std::unique_lock<std::mutex>& lock) override {
    changed_.wait(lock, [&] { return broken_ || has_arrived(piece); });
    throw_if_broken();
    if (piece.error) {
      std::exception_ptr error = std::exchange(piece.error, nullptr);
      drop(piece, nullptr, false);
      std::rethrow_exception(error);
    }
    if (piece.where == Whereabouts::copying) {
      piece.views.clear();
      for (const SlotPlace& slot : piece.slots) {
        piece.views.push_back(context_.arena.memory().view(*piece.arena_at + slot.flat_place,
                                                           slot.stub.sizes(), slot.dtype()));
      }
      piece.where = Whereabouts::here;
    }
    if (!piece.arrived) return;
    if (piece.arrived->query()) {
      piece.arrived.reset();
    } else if (!context_.options.faults.skip_wait_for_copy) {
      piece.arrived->block(guard_.getStream(context_.options.device));
    }
  }

  Fence fence() noexcept override {
    try {
      return record();
    } catch (...) {
      broken_ = std::current_exception();
      return nullptr;
    }
  }

  void follow(const Fence& fence) override {
    if (fence && !fence->query()) fence->block(guard_.getStream(context_.options.device));
  }

  void drop(Piece& piece, const Fence& fence, bool forget_host) noexcept override {
    if (piece.ticket) context_.reader.cancel(piece.ticket);
    piece.ticket.reset();
    piece.error = nullptr;
    std::erase(reading_, &piece);
    if (piece.where == Whereabouts::reading) release_host(piece);
    if (piece.arena_at) release_arena(piece, fence ? fence : piece.arrived);
    piece.arrived.reset();
    piece.views.clear();
    piece.where = Whereabouts::absent;
    if (forget_host && piece.staged) {
      piece.staged = false;
      // A copy from there may be under way.
      leave_host(piece, fence);
    }
  }

  void poll() override {
    for (size_t i = 0; i < reading_.size();) {
      Piece* piece = reading_[i];
      if (!piece->ticket->done()) {
        ++i;
        continue;
      }
      reading_.erase(reading_.begin() + static_cast<ptrdiff_t>(i));
      finish_read(*piece);
    }
  }

  uint64_t host_bytes() const override { return host_.size_bytes(); }
  uint64_t host_peak_bytes() const override { return host_.peak_bytes(); }

 private:
  // Ranges of host memory that a copy still reads.
  struct Leaving {
    Fence fence;
    std::vector<uint64_t> offsets;
  };

  Fence record() {
    auto event = std::make_shared<c10::Event>(context_.options.device.type());
    event->record(guard_.getStream(context_.options.device));
    return event;
  }

  void throw_if_broken() const {
    if (broken_) std::rethrow_exception(broken_);
  }

  bool reserve_host(Piece& piece) {
    auto allocate = [&](bool lasting, uint64_t bytes) {
      return lasting ? host_.allocate_lasting(bytes) : host_.allocate(bytes);
    };
    // Where everything is converted the stored bytes do not stay.
    piece.read_at = allocate(piece.host_home && !piece.all_converted, piece.read_bytes);
    if (!piece.read_at) return false;
    if (piece.convert_bytes == 0) return true;
    piece.convert_at = allocate(piece.host_home, piece.convert_bytes);
    if (piece.convert_at) return true;
    release_host(piece);
    return false;
  }

  void release_host(Piece& piece) noexcept {
    if (piece.read_at) host_.release(*std::exchange(piece.read_at, std::nullopt));
    if (piece.convert_at) host_.release(*std::exchange(piece.convert_at, std::nullopt));
  }

  void leave_host(Piece& piece, const Fence& fence) noexcept {
    if (!fence) return release_host(piece);
    Leaving leaving{fence, {}};
    if (piece.read_at) leaving.offsets.push_back(*std::exchange(piece.read_at, std::nullopt));
    if (piece.convert_at) leaving.offsets.push_back(*std::exchange(piece.convert_at, std::nullopt));
    leaving_.push_back(std::move(leaving));
    changed_.notify_all();
  }

  void release_arena(Piece& piece, const Fence& fence) noexcept {
    context_.arena.release(*std::exchange(piece.arena_at, std::nullopt), fence);
  }

  // The stored bytes are in host memory: convert, and on to the accelerator.
  void finish_read(Piece& piece) noexcept {
    try {
      context_.reader.wait(piece.ticket);
      piece.ticket.reset();
      if (Trace* trace = context_.options.trace) {
        trace->complete("read", piece.name, piece.started, Clock::now(), "reads",
                        {{"bytes", std::to_string(piece.read_bytes)}});
      }
      if (piece.convert_at)
        piece.convert(host_.at(*piece.read_at), host_.memory(), *piece.convert_at);
      if (piece.all_converted) host_.release(*std::exchange(piece.read_at, std::nullopt));
      enqueue_copies(piece);
      if (piece.host_home) {
        piece.staged = true;
      } else {
        leave_host(piece, piece.arrived);
      }
    } catch (...) {
      piece.ticket.reset();
      piece.error = std::current_exception();
    }
    changed_.notify_all();
  }

  void enqueue_copies(Piece& piece) {
    c10::StreamGuard on_copy_stream(copy_stream_);
    for (const Fence& fence : context_.arena.take_fences(*piece.arena_at)) {
      if (!context_.options.faults.skip_wait_for_compute) fence->block(copy_stream_);
    }
    const auto began = Clock::now();
    for (const CopyRun& run : piece.runs) {
      const uint64_t from = (run.converted ? *piece.convert_at : *piece.read_at) + run.from;
      at::Tensor into = context_.arena.memory().bytes(*piece.arena_at + run.to, run.size_bytes);
      into.copy_(host_.memory().bytes(from, run.size_bytes), /*non_blocking=*/true);
      context_.report.bytes_copied += run.size_bytes;
    }
    auto event = std::make_shared<c10::Event>(copy_stream_.device_type());
    event->record(copy_stream_);
    piece.arrived = std::move(event);
    piece.where = Whereabouts::copying;
    if (context_.options.trace) {
      // Drawn from enqueueing until the event is seen to have passed.
      traced_.push_back({piece.arrived, piece.name, began, piece.flat_bytes});
      changed_.notify_all();
    }
  }

  // Host memory whose copies are done.
  bool free_passed() {
    bool any = false;
    std::erase_if(leaving_, [&](const Leaving& leaving) {
      if (!leaving.fence->query()) return false;
      for (uint64_t offset : leaving.offsets) host_.release(offset);
      return any = true;
    });
    std::erase_if(traced_, [&](const TracedCopy& copy) {
      if (!copy.fence->query()) return false;
      // A trace that has ended since is drawn in no more.
      if (Trace* trace = context_.options.trace) {
        trace->complete("copy", copy.name, copy.began, Clock::now(), "copies",
                        {{"bytes", std::to_string(copy.size_bytes)}});
      }
      return true;
    });
    return any;
  }

  void take_in() {
    poll();
    if (!free_passed()) return;
    changed_.notify_all();
    context_.on_room();
  }

  void run() {
    std::unique_lock lock(context_.mutex);
    while (!stopping_) {
      try {
        if (!broken_) take_in();
      } catch (...) {  // the device, or the kernel: whoever waits is told
        broken_ = std::current_exception();
        changed_.notify_all();
      }
      if (broken_) {
        changed_.wait(lock, [&] { return stopping_; });
        return;
      }
      const bool busy = !reading_.empty() || !leaving_.empty() || !traced_.empty();
      if (busy) {
        lock.unlock();
        std::this_thread::sleep_for(kPollInterval);
        lock.lock();
      } else {
        changed_.wait(lock);
      }
    }
  }

  struct TracedCopy {
    Fence fence;
    std::string name;
    Clock::time_point began;
    uint64_t size_bytes;
  };

  CarrierContext context_;
  c10::impl::VirtualGuardImpl guard_;
  c10::Stream copy_stream_;
  Arena host_;  // pinned: staging as a ring, host homes as lasting ranges
  std::vector<Piece*> reading_;
  std::vector<Leaving> leaving_;
  std::vector<TracedCopy> traced_;
  std::condition_variable changed_;
  std::exception_ptr broken_;  // what ended the thread's work, for good
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Carrier> make_device_carrier(CarrierContext context) {
  return std::make_unique<DeviceCarrier>(std::move(context));
}

}  // namespace ferry::offload
