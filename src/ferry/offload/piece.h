// Inside the engine: a piece is the unit of transfer, a run of a group's slots with their extents
// in files and their places in memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ferry/offload/arena.h"
#include "ferry/weights/binding.h"

namespace ferry::offload {

// A run of bytes of one file that holds one or more slots, widened to what O_DIRECT wants. Slots
// that lie within kMergeGap of each other share one.
struct Extent {
  std::shared_ptr<const io::File> file;
  uint64_t offset = 0;      // aligned
  uint64_t size_bytes = 0;  // aligned; may reach past the end of the file
  uint64_t min_bytes = 0;   // what has to arrive
  uint64_t place = 0;       // where it goes in the read range

  static constexpr uint64_t kMergeGap = 64 << 10;
};

// Where a slot's bytes lie.
struct SlotPlace {
  at::Tensor tensor;  // the registered one
  at::Tensor stub;
  weights::StoredTensor source;
  uint64_t read_place = 0;  // of its stored bytes in the read range
  // Set where the stored bytes cannot be used as they lie (another dtype, encoded, not aligned to
  // items): of the converted bytes in the convert range.
  std::optional<uint64_t> convert_place;
  uint64_t flat_place = 0;  // on an accelerator: in the piece's range of the arena

  at::ScalarType dtype() const { return stub.scalar_type(); }
  uint64_t size_bytes() const { return static_cast<uint64_t>(stub.numel()) * stub.element_size(); }
};

// One copy to an accelerator.
struct CopyRun {
  bool converted = false;  // from the convert range, not the read range
  uint64_t from = 0;
  uint64_t to = 0;  // in the piece's range of the arena
  uint64_t size_bytes = 0;
};

enum class Whereabouts {
  absent,
  reading,  // from disk
  copying,  // to an accelerator: enqueued, `arrived` tells when it is done
  here,
};

struct Piece {
  std::string name;  // of the group
  std::vector<Extent> extents;
  std::vector<SlotPlace> slots;
  std::vector<CopyRun> runs;
  uint64_t read_bytes = 0;     // of the read range
  uint64_t convert_bytes = 0;  // of the convert range
  uint64_t flat_bytes = 0;     // on an accelerator
  bool all_converted = true;   // then the read range is free after conversion

  // What the plan says.
  bool resident = false;
  bool host_home = false;

  Whereabouts where = Whereabouts::absent;
  // On the CPU ranges of the arena; on an accelerator of pinned host memory.
  std::optional<uint64_t> read_at, convert_at;
  // The host memory at read_at and convert_at holds the weights for good (host home).
  bool staged = false;
  std::optional<uint64_t> arena_at;  // on an accelerator
  io::ReadTicketPtr ticket;
  Fence arrived;
  std::exception_ptr error;
  std::chrono::steady_clock::time_point started, copied;
  double convert_s = 0;           // what convert() took the last time
  std::vector<at::Tensor> views;  // one a slot, while here

  // What the piece takes of the arena while it is here.
  uint64_t footprint(bool on_accelerator) const;
  // What it takes there while it arrives.
  uint64_t arriving_footprint(bool on_accelerator) const;
  // Casts, decodes and aligns what has to be; host memory both.
  void convert(std::byte* read_range, const Memory& memory, uint64_t convert_range);
  void attach();
  void detach() noexcept;
};

struct PieceOptions {
  at::Device device;       // where compute happens
  at::Device idle_device;  // of the stubs
  uint64_t piece_bytes;    // about that much each
  bool packed = false;     // read from their packs the slots that have one
};

// Cuts a group into pieces, slots in the order of the files.
std::vector<Piece> make_pieces(const std::string& name,
                               const std::vector<weights::BoundSlot>& slots,
                               const PieceOptions& options);

}  // namespace ferry::offload
