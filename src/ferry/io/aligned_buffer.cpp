#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/io/read_engine.h"

namespace ferry::io {
namespace {

// From here on memory comes from mmap: malloc may keep what is freed to it.
constexpr size_t kMapBytes = 64 << 10;
constexpr size_t kPageBytes = 4096;
// Buffers of at least a huge page begin on one and ask for more of them. To the kernel a read is
// then a few segments instead of one a page: a request of 1 MiB in small pages has to be split
// (virtual and SATA disks take 254 segments), which moves it from the caller to a kernel thread,
// and pinning the pages takes about 40 ms of CPU a GB. Kernels also miss the TLB less.
constexpr size_t kHugePageBytes = 2 << 20;

// `alignment` beyond a page is had by mapping more and giving back what is in excess.
std::byte* map_aligned(size_t size, size_t alignment) {
  size_t slack = alignment > kPageBytes ? alignment : 0;
  if (size > SIZE_MAX - slack) return nullptr;
  void* mapped =
      ::mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(mapped);
  if (slack == 0) return begin;
  auto address = reinterpret_cast<uintptr_t>(begin);
  size_t lead = (alignment - address % alignment) % alignment;
  if (lead > 0) ::munmap(begin, lead);
  if (slack > lead) ::munmap(begin + lead + size, slack - lead);
  return begin + lead;
}

size_t round_up(size_t size, size_t unit) {
  return (size + unit - 1) / unit * unit;
}

}  // namespace

AlignedBuffer::AlignedBuffer(size_t size_bytes, size_t alignment) : size_(size_bytes) {
  if (alignment == 0 || (alignment & (alignment - 1)) != 0) {
    throw_error<ArgumentError>("AlignedBuffer: alignment {} is no power of two", alignment);
  }
  if (size_ == 0) return;
  alignment = std::max<size_t>(alignment, 64);
  if (size_ > SIZE_MAX - kPageBytes) throw std::bad_alloc();
  if (size_ >= kMapBytes) {
    const bool huge = size_ >= kHugePageBytes;
    if (huge) alignment = std::max(alignment, kHugePageBytes);
    data_ = map_aligned(round_up(size_, kPageBytes), alignment);
    // Refused where huge pages are switched off: small ones serve as well, more slowly.
    if (huge && data_ != nullptr) ::madvise(data_, round_up(size_, kPageBytes), MADV_HUGEPAGE);
  } else {
    data_ = static_cast<std::byte*>(std::aligned_alloc(alignment, round_up(size_, alignment)));
  }
  if (data_ == nullptr) throw std::bad_alloc();
}

AlignedBuffer::~AlignedBuffer() {
  if (data_ == nullptr) return;
  if (size_ >= kMapBytes) {
    ::munmap(data_, round_up(size_, kPageBytes));
  } else {
    std::free(data_);
  }
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace ferry::io
