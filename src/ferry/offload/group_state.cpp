#include "ferry/offload/group_state.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "ferry/tensor/dtype.h"
#include "ferry/weights/stub.h"

namespace ferry::offload {

namespace {

uint64_t round_up(uint64_t value, uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

std::span<std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.mutable_data_ptr()), tensor.nbytes()};
}

at::Tensor view_of(void* data, at::IntArrayRef shape, at::ScalarType dtype) {
  return at::from_blob(data, shape, at::TensorOptions().dtype(dtype));
}

}  // namespace

Client::State::State(const Group& group) : name(group.name), keep_resident(group.keep_resident) {
  // Slots in the order of the file, so that neighbours can share an extent.
  std::vector<size_t> by_offset(group.slots.size());
  std::iota(by_offset.begin(), by_offset.end(), 0);
  std::sort(by_offset.begin(), by_offset.end(), [&](size_t a, size_t b) {
    const auto &left = group.slots[a].source, &right = group.slots[b].source;
    return std::tuple(left.file.get(), left.offset) < std::tuple(right.file.get(), right.offset);
  });

  slots.resize(group.slots.size());
  uint64_t end = 0;  // of the last slot, in its file
  for (size_t i : by_offset) {
    const weights::BoundSlot& bound = group.slots[i];
    const weights::StoredTensor& source = bound.source;
    SlotPlace& slot = slots[i];
    slot.tensor = bound.slot.tensor;
    slot.stub = weights::make_stub(bound.slot.shape(), bound.slot.dtype());
    slot.stored = tensor::to_torch(source.dtype);
    slot.read_bytes = source.size_bytes;
    slot.encoding = source.encoding;
    size_bytes += bound.slot.size_bytes();

    bool joins = !extents.empty() && extents.back().file == source.file &&
                 source.offset <= end + Extent::kMergeGap;
    if (!joins) {
      if (!extents.empty()) read_range_bytes = extents.back().place + extents.back().size_bytes;
      extents.push_back({source.file, source.offset / Arena::kAlignment * Arena::kAlignment, 0, 0,
                         round_up(read_range_bytes, Arena::kAlignment)});
    }
    end = source.offset + source.size_bytes;
    Extent& extent = extents.back();
    extent.min_bytes = end - extent.offset;
    extent.size_bytes = round_up(extent.min_bytes, Arena::kAlignment);
    read_range_bytes = extent.place + extent.size_bytes;
    slot.read_place = extent.place + (source.offset - extent.offset);

    const bool misaligned = source.offset % io::item_size(source.dtype) != 0;
    if (misaligned || slot.encoding || slot.stored != bound.slot.dtype()) {
      slot.cast_place = cast_range_bytes;
      cast_range_bytes = round_up(cast_range_bytes + bound.slot.size_bytes(), 64);
    }
  }
}

uint64_t Client::State::arena_bytes() const {
  return round_up(read_range_bytes, Arena::kAlignment) +
         round_up(cast_range_bytes, Arena::kAlignment);
}

void Client::State::make_views(std::byte* read_range, std::byte* cast_range) {
  // Views must be ordinary tensors also where the caller runs in inference mode.
  c10::InferenceMode off(false);
  views.clear();
  for (const SlotPlace& slot : slots) {
    std::byte* bytes = read_range + slot.read_place;
    const at::ScalarType wanted = slot.stub.scalar_type();
    if (!slot.cast_place) {
      views.push_back(view_of(bytes, slot.stub.sizes(), wanted));
      continue;
    }
    at::Tensor view = view_of(cast_range + *slot.cast_place, slot.stub.sizes(), wanted);
    if (slot.encoding && slot.stored == wanted) {
      slot.encoding->decode({bytes, slot.read_bytes}, bytes_of(view));
    } else if (slot.encoding) {
      at::Tensor plain = at::empty(slot.stub.sizes(), at::TensorOptions().dtype(slot.stored));
      slot.encoding->decode({bytes, slot.read_bytes}, bytes_of(plain));
      view.copy_(plain);
    } else if (slot.stored == wanted) {
      std::memcpy(view.mutable_data_ptr(), bytes, slot.read_bytes);
    } else if (reinterpret_cast<uintptr_t>(bytes) % c10::elementSize(slot.stored) == 0) {
      view.copy_(view_of(bytes, slot.stub.sizes(), slot.stored));
    } else {
      at::Tensor aligned = at::empty(slot.stub.sizes(), at::TensorOptions().dtype(slot.stored));
      std::memcpy(aligned.mutable_data_ptr(), bytes, slot.read_bytes);
      view.copy_(aligned);
    }
    views.push_back(std::move(view));
  }
}

void Client::State::attach() {
  for (size_t i = 0; i < slots.size(); ++i) slots[i].tensor.set_data(views[i]);
}

void Client::State::detach() noexcept {
  for (SlotPlace& slot : slots) slot.tensor.set_data(slot.stub);
}

}  // namespace ferry::offload
