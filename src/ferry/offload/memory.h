// A run of bytes where compute happens or on its way there: host memory, pinned host memory, or an
// accelerator's.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstddef>
#include <cstdint>

namespace ferry::offload {

// Shared ownership: views keep the bytes alive. Host memory starts on a page, as O_DIRECT wants.
class Memory {
 public:
  Memory() = default;
  // On the CPU fresh pages, touched when first used. On an accelerator its allocator's memory;
  // throws c10::OutOfMemoryError.
  static Memory on(at::Device device, uint64_t size_bytes);
  // Pinned for transfers to `device`; pageable where pinning is refused, which is logged once
  // (memlock limit, no memory left to pin).
  static Memory pinned_for(at::Device device, uint64_t size_bytes);

  uint64_t size_bytes() const { return size_; }
  bool is_pinned() const { return pinned_; }
  // REQUIRES: host memory.
  std::byte* data() const { return data_; }
  // uint8, for copies.
  at::Tensor bytes(uint64_t offset, uint64_t size_bytes) const;
  // A contiguous tensor over these bytes; no view for autograd, with a version counter of its own.
  // REQUIRES: `offset` is a multiple of the item size.
  at::Tensor view(uint64_t offset, at::IntArrayRef shape, at::ScalarType dtype) const;

 private:
  at::Tensor bytes_;    // uint8; begins at or before the first page
  uint64_t begin_ = 0;  // of our bytes in bytes_
  uint64_t size_ = 0;
  std::byte* data_ = nullptr;  // host memory only
  bool pinned_ = false;
};

}  // namespace ferry::offload
