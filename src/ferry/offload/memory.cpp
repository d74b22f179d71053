#include "ferry/offload/memory.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <atomic>
#include <memory>

#include "ferry/base/log.h"
#include "ferry/base/units.h"
#include "ferry/io/read_engine.h"

namespace ferry::offload {

namespace {

constexpr uint64_t kPage = 4096;

void log_pageable_once(uint64_t size_bytes, const std::string& why) {
  static std::atomic<bool> logged{false};
  if (logged.exchange(true)) return;
  log::warn(
      "pinned memory refused ({} asked for: {}): copies go through pageable memory, which is "
      "slower; raise the memlock limit (ulimit -l) or lower --host-memory",
      format_bytes(size_bytes), why);
}

at::Tensor host_bytes(uint64_t size_bytes) {
  auto buffer = std::make_shared<io::AlignedBuffer>(std::max<uint64_t>(size_bytes, 1), kPage);
  void* data = buffer->data();
  return at::from_blob(
      data, {static_cast<int64_t>(size_bytes)}, [buffer](void*) mutable { buffer.reset(); },
      at::TensorOptions().dtype(at::kByte));
}

}  // namespace

Memory Memory::on(at::Device device, uint64_t size_bytes) {
  // Ordinary tensors also where the caller runs in inference mode: set_data() wants them.
  c10::InferenceMode off(false);
  Memory memory;
  memory.size_ = size_bytes;
  if (device.is_cpu()) {
    memory.bytes_ = host_bytes(size_bytes);
    memory.data_ = static_cast<std::byte*>(memory.bytes_.mutable_data_ptr());
  } else {
    memory.bytes_ = at::empty({static_cast<int64_t>(size_bytes)},
                              at::TensorOptions().dtype(at::kByte).device(device));
  }
  return memory;
}

Memory Memory::pinned_for(at::Device device, uint64_t size_bytes) {
  c10::InferenceMode off(false);
  if (device.is_cpu()) return on(device, size_bytes);
  Memory memory;
  memory.size_ = size_bytes;
  try {
    auto pinned = [](uint64_t bytes) {
      return at::empty({static_cast<int64_t>(bytes)},
                       at::TensorOptions().dtype(at::kByte).pinned_memory(true));
    };
    // On a page's boundary as a rule. (CUDA's allocator takes the next power of two: a page more
    // than one would be twice as much.)
    memory.bytes_ = pinned(size_bytes);
    if (reinterpret_cast<uintptr_t>(memory.bytes_.mutable_data_ptr()) % kPage != 0)
      memory.bytes_ = pinned(size_bytes + kPage);
    memory.pinned_ = true;
  } catch (const c10::Error& error) {
    log_pageable_once(size_bytes, error.what_without_backtrace());
    return on(at::kCPU, size_bytes);
  }
  auto* data = static_cast<std::byte*>(memory.bytes_.mutable_data_ptr());
  memory.begin_ = (kPage - reinterpret_cast<uintptr_t>(data) % kPage) % kPage;
  memory.data_ = data + memory.begin_;
  return memory;
}

at::Tensor Memory::bytes(uint64_t offset, uint64_t size_bytes) const {
  c10::InferenceMode off(false);
  return bytes_.narrow(0, static_cast<int64_t>(begin_ + offset), static_cast<int64_t>(size_bytes));
}

at::Tensor Memory::view(uint64_t offset, at::IntArrayRef shape, at::ScalarType dtype) const {
  c10::InferenceMode off(false);
  at::Tensor view = at::empty({0}, at::TensorOptions().dtype(dtype).device(bytes_.device()));
  view.set_(bytes_.storage(), static_cast<int64_t>((begin_ + offset) / c10::elementSize(dtype)),
            shape);
  return view;
}

}  // namespace ferry::offload
