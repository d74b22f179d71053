// Inside the engine: how pieces get to where compute happens. One carrier where that is the CPU,
// another for accelerators; the engine above knows only this interface.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "ferry/io/read_engine.h"
#include "ferry/offload/arena.h"
#include "ferry/offload/engine.h"
#include "ferry/offload/piece.h"

namespace ferry::offload {

// What a carrier is given by the engine; all of it outlives the carrier. Every method of a carrier
// is called with `mutex` held.
struct CarrierContext {
  const EngineOptions& options;
  io::ReadEngine& reader;
  Arena& arena;
  Report& report;
  std::mutex& mutex;
  // Called by the carrier's own thread, with the mutex held, when room was made: read ahead.
  std::function<void()> on_room;
  uint64_t host_memory_bytes = 0;  // pinned; accelerators only
};

enum class Urgency {
  ahead,  // keeps to the arena's order
  now,    // somebody waits: any hole will do
};

enum class Start {
  begun,
  no_room,     // in the arena
  no_staging,  // in host memory, which copies under way still use
};

class Carrier {
 public:
  // Returns once nothing that was enqueued uses the arena.
  virtual ~Carrier() = default;

  // Reserves memory for an absent piece and begins to bring it. Throws IoError (the file changed
  // since it was opened).
  virtual Start start(Piece& piece, Urgency urgency) = 0;
  // After no_staging: waits until some is free. False if none will ever be. Throws what made
  // the device fail.
  virtual bool wait_for_staging(std::unique_lock<std::mutex>& lock) { return false; }
  // True if arrive() would return without waiting.
  virtual bool has_arrived(const Piece& piece) const = 0;
  // Returns once work that is enqueued from now on may use the piece, and its views are made.
  // Throws what went wrong on the way; then the piece is absent.
  virtual void arrive(Piece& piece, std::unique_lock<std::mutex>& lock) = 0;
  // For the work enqueued so far by this thread; null where it is done already. Where the device
  // fails the next arrive() says so.
  virtual Fence fence() noexcept = 0;
  // What this thread enqueues from now on waits for `fence`, which may be null.
  virtual void follow(const Fence& fence) {}
  // A streamed piece that is here or on its way stays after all.
  virtual void keep(Piece& piece) = 0;
  // Takes the piece's memory back once `fence` has passed; reads in flight are cancelled. What a
  // host home holds stays unless `forget_host`.
  virtual void drop(Piece& piece, const Fence& fence, bool forget_host) noexcept = 0;
  // Takes in what arrived; never waits.
  virtual void poll() {}
  // Pinned host memory that it has, and the most of it ever held.
  virtual uint64_t host_bytes() const { return 0; }
  virtual uint64_t host_peak_bytes() const { return 0; }
};

std::unique_ptr<Carrier> make_cpu_carrier(CarrierContext context);
std::unique_ptr<Carrier> make_device_carrier(CarrierContext context);

// What both share. A range of the arena for a piece, or nothing.
std::optional<uint64_t> allocate(Arena& arena, bool resident, uint64_t bytes, Urgency urgency);
// Checks the files, submits a piece's reads to `into`. Throws IoError.
io::ReadTicketPtr submit_reads(io::ReadEngine& reader, const Piece& piece, std::byte* into);

}  // namespace ferry::offload
