#include "ferry/offload/piece.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "ferry/tensor/dtype.h"
#include "ferry/weights/stub.h"

namespace ferry::offload {

namespace {

// What accelerators want of a weight's address for their fastest kernels.
constexpr uint64_t kDeviceAlignment = 256;

uint64_t round_up(uint64_t value, uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

class Builder {
 public:
  Builder(const std::string& name, const PieceOptions& options)
      : on_accelerator_(!options.device.is_cpu()), idle_device_(options.idle_device) {
    piece_.name = name;
  }

  bool empty() const { return piece_.slots.empty(); }
  uint64_t read_bytes() const { return piece_.read_bytes; }

  void add(const weights::BoundSlot& bound, const weights::StoredTensor& source) {
    SlotPlace slot;
    slot.tensor = bound.slot.tensor;
    slot.stub = weights::make_stub(bound.slot.shape(), bound.slot.dtype(), idle_device_);
    slot.source = source;

    std::vector<Extent>& extents = piece_.extents;
    const bool joins = !extents.empty() && extents.back().file == source.file &&
                       source.offset >= extents.back().offset &&
                       source.offset <= end_ + Extent::kMergeGap;
    if (!joins) {
      extents.push_back({source.file, source.offset / Arena::kAlignment * Arena::kAlignment, 0, 0,
                         round_up(piece_.read_bytes, Arena::kAlignment)});
    }
    end_ = source.offset + source.size_bytes;
    Extent& extent = extents.back();
    extent.min_bytes = end_ - extent.offset;
    extent.size_bytes = round_up(extent.min_bytes, Arena::kAlignment);
    piece_.read_bytes = extent.place + extent.size_bytes;
    slot.read_place = extent.place + (source.offset - extent.offset);

    const bool misaligned = source.offset % io::item_size(source.dtype) != 0;
    if (misaligned || source.encoding || tensor::to_torch(source.dtype) != bound.slot.dtype()) {
      slot.convert_place = piece_.convert_bytes;
      piece_.convert_bytes = round_up(piece_.convert_bytes + bound.slot.size_bytes(), 64);
    } else {
      piece_.all_converted = false;
    }
    if (on_accelerator_) add_copy(slot);
    piece_.slots.push_back(std::move(slot));
  }

  Piece finish() { return std::move(piece_); }

 private:
  // Neighbours that keep their distance travel in one copy, if all stay aligned.
  void add_copy(SlotPlace& slot) {
    const bool converted = slot.convert_place.has_value();
    const uint64_t from = converted ? *slot.convert_place : slot.read_place;
    const uint64_t size = slot.size_bytes();
    CopyRun* last = piece_.runs.empty() ? nullptr : &piece_.runs.back();
    if (last && last->converted == converted && from >= last->from + last->size_bytes &&
        from - (last->from + last->size_bytes) < kDeviceAlignment &&
        (from - last->from) % kDeviceAlignment == 0) {
      slot.flat_place = last->to + (from - last->from);
      last->size_bytes = from + size - last->from;
    } else {
      slot.flat_place = round_up(piece_.flat_bytes, kDeviceAlignment);
      piece_.runs.push_back({converted, from, slot.flat_place, size});
    }
    piece_.flat_bytes = slot.flat_place + size;
  }

  bool on_accelerator_;
  at::Device idle_device_;
  Piece piece_;
  uint64_t end_ = 0;  // of the last slot, in its file
};

}  // namespace

uint64_t Piece::footprint(bool on_accelerator) const {
  if (on_accelerator) return Arena::round_up(flat_bytes);
  return (all_converted ? 0 : Arena::round_up(read_bytes)) + Arena::round_up(convert_bytes);
}

uint64_t Piece::arriving_footprint(bool on_accelerator) const {
  if (on_accelerator) return Arena::round_up(flat_bytes);
  return Arena::round_up(read_bytes) + Arena::round_up(convert_bytes);
}

void Piece::convert(std::byte* read_range, const Memory& memory, uint64_t convert_range) {
  c10::InferenceMode off(false);
  const auto began = std::chrono::steady_clock::now();
  for (const SlotPlace& slot : slots) {
    if (!slot.convert_place || slot.size_bytes() == 0) continue;
    const std::byte* stored = read_range + slot.read_place;
    const at::ScalarType stored_dtype = tensor::to_torch(slot.source.dtype);
    at::Tensor into =
        memory.view(convert_range + *slot.convert_place, slot.stub.sizes(), slot.dtype());
    // The stored bytes, as the tensor's own.
    auto plain_into = [&](const at::Tensor& tensor) {
      auto* bytes = static_cast<std::byte*>(tensor.mutable_data_ptr());
      if (slot.source.encoding) {
        slot.source.encoding->decode({stored, slot.source.size_bytes}, {bytes, tensor.nbytes()});
      } else {
        std::memcpy(bytes, stored, slot.source.size_bytes);
      }
    };
    if (stored_dtype == slot.dtype()) {
      plain_into(into);
      continue;
    }
    at::Tensor plain;
    const bool readable = !slot.source.encoding &&
                          reinterpret_cast<uintptr_t>(stored) % c10::elementSize(stored_dtype) == 0;
    if (readable) {
      plain = at::from_blob(const_cast<std::byte*>(stored), slot.stub.sizes(),
                            at::TensorOptions().dtype(stored_dtype));
    } else {
      plain = at::empty(slot.stub.sizes(), at::TensorOptions().dtype(stored_dtype));
      plain_into(plain);
    }
    into.copy_(plain);
  }
  convert_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

void Piece::attach() {
  for (size_t i = 0; i < slots.size(); ++i) slots[i].tensor.set_data(views[i]);
}

void Piece::detach() noexcept {
  for (SlotPlace& slot : slots) {
    slot.tensor.set_data(slot.stub);
    // A graph that saved the weight must not find other bytes in its place without a word.
    // (One that was made in inference mode has no counter, and is in no graph.)
    c10::TensorImpl* tensor = slot.tensor.unsafeGetTensorImpl();
    if (tensor->version_counter().enabled()) tensor->bump_version();
  }
}

std::vector<Piece> make_pieces(const std::string& name,
                               const std::vector<weights::BoundSlot>& slots,
                               const PieceOptions& options) {
  auto source_of = [&](size_t i) -> const weights::StoredTensor& {
    return options.packed && slots[i].packed ? *slots[i].packed : slots[i].source;
  };
  std::vector<size_t> by_offset(slots.size());
  std::iota(by_offset.begin(), by_offset.end(), 0);
  std::sort(by_offset.begin(), by_offset.end(), [&](size_t a, size_t b) {
    const auto &left = source_of(a), &right = source_of(b);
    return std::tuple(left.file.get(), left.offset) < std::tuple(right.file.get(), right.offset);
  });
  std::vector<Piece> pieces;
  std::optional<Builder> builder;
  for (size_t i : by_offset) {
    if (builder && builder->read_bytes() + source_of(i).size_bytes > options.piece_bytes) {
      pieces.push_back(builder->finish());
      builder.reset();
    }
    if (!builder) builder.emplace(name, options);
    builder->add(slots[i], source_of(i));
  }
  if (builder) pieces.push_back(builder->finish());
  return pieces;
}

}  // namespace ferry::offload
