// Where compute happens on the CPU: reads land in the arena, where the parameters alias them.
#include <utility>

#include "ferry/base/trace.h"
#include "ferry/offload/carrier.h"

namespace ferry::offload {

using Clock = std::chrono::steady_clock;

std::optional<uint64_t> allocate(Arena& arena, bool resident, uint64_t bytes, Urgency urgency) {
  if (resident) return arena.allocate_lasting(bytes);
  return urgency == Urgency::now ? arena.allocate(bytes) : arena.allocate_in_turn(bytes);
}

io::ReadTicketPtr submit_reads(io::ReadEngine& reader, const Piece& piece, std::byte* into) {
  std::vector<io::ReadRequest> requests;
  const io::File* checked = nullptr;
  for (const Extent& extent : piece.extents) {
    if (extent.file.get() != checked) extent.file->check_unchanged();
    checked = extent.file.get();
    requests.push_back(
        {extent.file, extent.offset, extent.size_bytes, extent.min_bytes, into + extent.place});
  }
  return reader.submit(std::move(requests));
}

namespace {

class CpuCarrier final : public Carrier {
 public:
  explicit CpuCarrier(CarrierContext context) : context_(std::move(context)) {}

  Start start(Piece& piece, Urgency urgency) override {
    // Where everything is converted the stored bytes do not stay.
    piece.read_at =
        allocate(context_.arena, piece.resident && !piece.all_converted, piece.read_bytes, urgency);
    if (!piece.read_at) return Start::no_room;
    if (piece.convert_bytes > 0) {
      piece.convert_at = allocate(context_.arena, piece.resident, piece.convert_bytes, urgency);
      if (!piece.convert_at) {
        free_ranges(piece);
        return Start::no_room;
      }
    }
    try {
      piece.started = Clock::now();
      piece.ticket = submit_reads(context_.reader, piece, context_.arena.at(*piece.read_at));
    } catch (...) {
      free_ranges(piece);
      throw;
    }
    piece.where = Whereabouts::reading;
    return Start::begun;
  }

  bool has_arrived(const Piece& piece) const override {
    return piece.where == Whereabouts::here || (piece.ticket && piece.ticket->done());
  }

  void arrive(Piece& piece, std::unique_lock<std::mutex>&) override {
    if (piece.where == Whereabouts::here) return;
    try {
      context_.reader.wait(piece.ticket);
      make_views(piece);
    } catch (...) {
      drop(piece, nullptr, false);
      throw;
    }
    if (Trace* trace = context_.options.trace) {
      trace->complete("read", piece.name, piece.started, Clock::now(), "reads",
                      {{"bytes", std::to_string(piece.read_bytes)}});
    }
    piece.ticket.reset();
    piece.where = Whereabouts::here;
    if (piece.all_converted) context_.arena.release(*std::exchange(piece.read_at, std::nullopt));
  }

  Fence fence() noexcept override { return nullptr; }

  void keep(Piece& piece) override {
    if (piece.read_at && !piece.all_converted) context_.arena.make_lasting(*piece.read_at);
    if (piece.convert_at) context_.arena.make_lasting(*piece.convert_at);
    piece.resident = true;
  }

  void drop(Piece& piece, const Fence&, bool) noexcept override {
    if (piece.ticket) context_.reader.cancel(piece.ticket);
    piece.ticket.reset();
    piece.views.clear();
    piece.where = Whereabouts::absent;
    free_ranges(piece);
  }

 private:
  void free_ranges(Piece& piece) noexcept {
    if (piece.read_at) context_.arena.release(*std::exchange(piece.read_at, std::nullopt));
    if (piece.convert_at) context_.arena.release(*std::exchange(piece.convert_at, std::nullopt));
  }

  void make_views(Piece& piece) {
    const Arena& arena = context_.arena;
    if (piece.convert_at)
      piece.convert(arena.at(*piece.read_at), arena.memory(), *piece.convert_at);
    piece.views.clear();
    for (const SlotPlace& slot : piece.slots) {
      const uint64_t at = slot.convert_place ? *piece.convert_at + *slot.convert_place
                                             : *piece.read_at + slot.read_place;
      piece.views.push_back(arena.memory().view(at, slot.stub.sizes(), slot.dtype()));
    }
  }

  CarrierContext context_;
};

}  // namespace

std::unique_ptr<Carrier> make_cpu_carrier(CarrierContext context) {
  return std::make_unique<CpuCarrier>(std::move(context));
}

}  // namespace ferry::offload
