#include "ferry/weights/binding.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <unordered_map>

#include "ferry/base/error.h"
#include "ferry/tensor/dtype.h"
#include "ferry/weights/stub.h"

namespace ferry::weights {

namespace {

std::string shape_text(at::IntArrayRef shape) {
  return fmt::format("[{}]", fmt::join(shape.begin(), shape.end(), ", "));
}

// All that is wrong with a checkpoint, told at once.
struct Mismatch {
  std::vector<std::string> missing, unexpected, shapes;

  bool any() const { return !missing.empty() || !unexpected.empty() || !shapes.empty(); }

  static void append(std::string& text, const char* title, const std::vector<std::string>& lines) {
    if (lines.empty()) return;
    constexpr size_t kShown = 40;
    text += fmt::format("\n  {} ({}):", title, lines.size());
    for (size_t i = 0; i < std::min(lines.size(), kShown); ++i) text += "\n    " + lines[i];
    if (lines.size() > kShown) text += fmt::format("\n    … and {} more", lines.size() - kShown);
  }

  [[noreturn]] void raise(const Checkpoint& checkpoint) const {
    std::string text =
        fmt::format("{}: the checkpoint does not fit the model that its config describes",
                    checkpoint.files().front()->path().parent_path().string());
    append(text, "missing keys", missing);
    append(text, "unexpected keys", unexpected);
    append(text, "shapes that differ", shapes);
    throw FormatError(text);
  }
};

}  // namespace

std::shared_ptr<Binding> bind(const torch::nn::Module& root,
                              std::shared_ptr<const Checkpoint> checkpoint,
                              const BindOptions& options) {
  std::vector<Slot> slots = collect_slots(root);
  std::unordered_map<std::string, size_t> by_name;
  for (size_t i = 0; i < slots.size(); ++i) {
    for (const std::string& name : slots[i].names) by_name.emplace(name, i);
  }

  Mismatch mismatch;
  std::vector<const StoredTensor*> sources(slots.size(), nullptr);
  for (const StoredTensor& stored : checkpoint->tensors()) {
    std::string name = options.map_key ? options.map_key(stored.key) : stored.key;
    if (name.empty()) continue;
    auto entry = by_name.find(name);
    if (entry == by_name.end()) {
      mismatch.unexpected.push_back(stored.key);
      continue;
    }
    const Slot& slot = slots[entry->second];
    if (slot.shape() != at::IntArrayRef(stored.shape)) {
      mismatch.shapes.push_back(fmt::format("{}: got {}, expected {}", stored.key,
                                            shape_text(stored.shape), shape_text(slot.shape())));
      continue;
    }
    // Tied parameters may be stored under each of their names; any of them will do.
    if (!sources[entry->second]) sources[entry->second] = &stored;
  }
  auto binding = std::make_shared<Binding>();
  for (size_t i = 0; i < slots.size(); ++i) {
    if (!sources[i]) {
      bool allowed = options.may_be_missing && options.may_be_missing(slots[i].name());
      bool told = std::any_of(
          mismatch.shapes.begin(), mismatch.shapes.end(),
          [&](const std::string& line) { return line.starts_with(slots[i].name() + ":"); });
      if (!allowed && !told) mismatch.missing.push_back(slots[i].name());
      continue;
    }
    binding->slots.push_back({slots[i], *sources[i]});
  }
  if (mismatch.any()) mismatch.raise(*checkpoint);

  for (BoundSlot& bound : binding->slots) {
    at::ScalarType stored = tensor::to_torch(bound.source.dtype);
    at::ScalarType wanted = options.dtype ? options.dtype(bound.slot.name(), stored) : stored;
    bound.slot.tensor.set_data(make_stub(bound.slot.shape(), wanted));
  }
  binding->checkpoint = std::move(checkpoint);
  return binding;
}

void offer_pack(Binding& binding, const Checkpoint& pack) {
  for (BoundSlot& bound : binding.slots) {
    const StoredTensor* stored = pack.find(bound.source.key);
    if (stored && stored->encoding && stored->shape == bound.source.shape &&
        stored->dtype == bound.source.dtype && !bound.source.encoding) {
      bound.packed = *stored;
    }
  }
}

namespace {

std::byte* bytes_of(const at::Tensor& tensor) {
  return static_cast<std::byte*>(tensor.mutable_data_ptr());
}

// Where a stored tensor's bytes are read to: the tensor itself, or a buffer that is decoded into
// it.
struct ReadPlace {
  explicit ReadPlace(const StoredTensor& source)
      : encoding(source.encoding.get()),
        tensor(at::empty(source.shape, tensor::to_torch(source.dtype))) {
    if (encoding) encoded = at::empty({static_cast<int64_t>(source.size_bytes)}, at::kByte);
  }

  std::byte* data() const { return bytes_of(encoding ? encoded : tensor); }
  // The tensor, once the bytes are here.
  at::Tensor finish() {
    if (encoding) {
      encoding->decode({bytes_of(encoded), encoded.nbytes()}, {bytes_of(tensor), tensor.nbytes()});
      encoded.reset();
    }
    return tensor;
  }

  const Encoding* encoding;
  at::Tensor tensor, encoded;
};

}  // namespace

namespace {
c10::weak_intrusive_ptr<c10::StorageImpl> storage_of(const at::Tensor& tensor) {
  return tensor.storage().getWeakStorageImpl();
}
}  // namespace

bool is_as_read(const BoundSlot& bound) {
  return bound.read_storage == storage_of(bound.slot.tensor) &&
         bound.read_version == version_of(bound.slot.tensor);
}

at::Tensor read_stored(const StoredTensor& source) {
  c10::InferenceMode off(false);
  ReadPlace place(source);
  if (source.size_bytes > 0)
    source.file->read_exact(source.offset, source.size_bytes, place.data());
  return place.finish();
}

at::Tensor read_tensor(const BoundSlot& bound) {
  c10::InferenceMode off(false);
  return read_stored(bound.source).to(bound.slot.dtype());
}

void load_resident(Binding& binding, io::ReadEngine& engine, const StopToken& stop) {
  c10::InferenceMode off(false);
  // As many reads in flight as there are tensors is harmless: the engine queues. The window bounds
  // what a cast or an encoding holds twice.
  constexpr size_t kWindow = 16;
  struct Pending {
    BoundSlot* bound;
    ReadPlace place;
    io::ReadTicketPtr ticket;
  };
  std::vector<Pending> pending;
  auto finish_oldest = [&] {
    stop.throw_if_stopped();
    Pending oldest = std::move(pending.front());
    pending.erase(pending.begin());
    engine.wait(oldest.ticket);
    at::Tensor slot_tensor = oldest.bound->slot.tensor;
    // To where the stub is: a model that was moved first is read straight to its device.
    slot_tensor.set_data(oldest.place.finish().to(slot_tensor.device(), slot_tensor.scalar_type()));
    oldest.bound->read_storage = storage_of(slot_tensor);
    oldest.bound->read_version = version_of(slot_tensor);
  };
  try {
    for (BoundSlot& bound : binding.slots) {
      if (!is_stub(bound.slot.tensor)) continue;
      if (pending.size() == kWindow) finish_oldest();
      const StoredTensor& from = bound.packed ? *bound.packed : bound.source;
      ReadPlace place(from);
      io::ReadRequest request{from.file, from.offset, from.size_bytes, from.size_bytes,
                              place.data()};
      std::vector<io::ReadRequest> requests;
      if (request.size_bytes > 0) requests.push_back(request);
      pending.push_back({&bound, std::move(place), engine.submit(std::move(requests))});
    }
    while (!pending.empty()) finish_oldest();
  } catch (...) {
    for (const Pending& entry : pending) engine.cancel(entry.ticket);
    throw;
  }
}

}  // namespace ferry::weights
