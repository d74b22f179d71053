// Inside the engine: one group's extents, memory and whereabouts.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "ferry/offload/engine.h"

namespace ferry::offload {

// A run of bytes of one file that holds one or more of the group's slots, widened to what O_DIRECT
// wants. Slots that lie within kMergeGap of each other share one.
struct Extent {
  std::shared_ptr<const io::File> file;
  uint64_t offset = 0;      // aligned
  uint64_t size_bytes = 0;  // aligned; may reach past the end of the file
  uint64_t min_bytes = 0;   // what has to arrive
  uint64_t place = 0;       // where it goes in the group's read range

  static constexpr uint64_t kMergeGap = 64 << 10;
};

// Where a slot's bytes lie once they are here.
struct SlotPlace {
  at::Tensor tensor;  // the registered one
  at::Tensor stub;
  at::ScalarType stored{};
  uint64_t read_place = 0;  // of its first byte in the read range
  uint64_t read_bytes = 0;
  // Null: the bytes are the tensor's.
  std::shared_ptr<const weights::Encoding> encoding;
  // Set where the stored bytes cannot be used as they lie: another dtype, encoded, or not aligned
  // to items.
  std::optional<uint64_t> cast_place;
};

struct Client::State {
  enum class Where { absent, loading, here };

  std::string name;
  uint64_t size_bytes = 0;
  bool keep_resident = false;
  std::vector<Extent> extents;
  std::vector<SlotPlace> slots;
  uint64_t read_range_bytes = 0;
  uint64_t cast_range_bytes = 0;

  Placement placement = Placement::streamed;
  Where where = Where::absent;
  int leases = 0;
  int predicted = 0;  // entries of pending_
  bool used_in_pass = false;

  // Memory: ranges of the arena if streamed, buffers of its own if resident.
  std::optional<uint64_t> read_offset, cast_offset;
  io::AlignedBuffer read_buffer, cast_buffer;
  io::ReadTicketPtr ticket;
  std::chrono::steady_clock::time_point started;    // of the reads
  std::chrono::steady_clock::time_point leased_at;  // of the outermost lease
  std::vector<at::Tensor> views;                    // one a slot while here

  explicit State(const Group& group);
  uint64_t arena_bytes() const;
  // Casts what has to be and points the views at the bytes.
  void make_views(std::byte* read_range, std::byte* cast_range);
  void attach();           // the slots see the weights
  void detach() noexcept;  // the slots are stubs
};

}  // namespace ferry::offload
