#include "ferry/testing/fake_memory.h"

#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>

#include "ferry/base/error.h"
#include "ferry/testing/fake_streams.h"

namespace ferry::testing::fake {

namespace {

constexpr size_t kAlignment = 512;
constexpr size_t kPage = 4096;
constexpr int kPoison = 0xff;  // NaN in every float type, -1 in integers
constexpr size_t kReservation = size_t{128} << 30;

constexpr size_t kAggregate = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);

size_t round_up(size_t size, size_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

std::byte* reserve(size_t bytes, int protection) {
  void* address =
      ::mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) return nullptr;
  ::madvise(address, bytes, MADV_DONTDUMP);
  return static_cast<std::byte*>(address);
}

// There is no cache: what is allocated, requested, reserved and active is the same.
std::array<c10::CachingAllocator::Stat*, 4> byte_stats(
    c10::CachingDeviceAllocator::DeviceStats& stats) {
  return {&stats.allocated_bytes[kAggregate], &stats.requested_bytes[kAggregate],
          &stats.reserved_bytes[kAggregate], &stats.active_bytes[kAggregate]};
}

c10::Device fake_device() {
  return {c10::DeviceType::PrivateUse1, 0};
}

}  // namespace

// ---- DeviceMemory ----

DeviceMemory& DeviceMemory::get() {
  static DeviceMemory* const memory = new DeviceMemory;  // tensors may be freed after main()
  return *memory;
}

DeviceMemory::DeviceMemory() {
  for (reserved_ = kReservation; reserved_ >= size_t{1} << 30; reserved_ /= 2) {
    shown_ = reserve(reserved_, PROT_NONE);
    backing_ = reserve(reserved_, PROT_READ | PROT_WRITE);
    if (shown_ && backing_) break;
    if (shown_) ::munmap(shown_, reserved_);
    if (backing_) ::munmap(backing_, reserved_);
  }
  if (!shown_ || !backing_) {
    throw_error<DeviceError>(
        "fake accelerator: no address space for two mappings of 1 GiB; is it limited (ulimit -v)?");
  }
  free_[0] = reserved_;
}

std::byte* DeviceMemory::bytes(const void* address) const {
  if (!address) return nullptr;
  TORCH_CHECK(owns(address), "fake accelerator: ", address, " is no address of its memory");
  return backing_ + (static_cast<const std::byte*>(address) - shown_);
}

bool DeviceMemory::owns(const void* address) const {
  return address >= shown_ && address < shown_ + reserved_;
}

c10::DataPtr DeviceMemory::allocate(size_t size) {
  if (size == 0) return {nullptr, fake_device()};
  Streams& streams = Streams::get();
  const uint64_t capacity = streams.options().capacity_bytes;
  const size_t rounded = round_up(size, kAlignment);
  auto over = [&] {
    std::lock_guard lock(mutex_);
    const auto live = static_cast<uint64_t>(stats_.allocated_bytes[kAggregate].current);
    return live + rounded > capacity && deferred_ > 0;
  };
  // As CUDA's allocator: what record_stream() holds back is waited for before it gives up.
  if (over()) {
    streams.count_host_synchronization("allocate (waits for record_stream)");
    streams.drain();
  }
  auto block = std::make_unique<Block>(take(rounded, capacity));
  block->stream = streams.current();
  std::byte* backing = backing_ + block->offset;
  streams.enqueue(block->stream,
                  {.run = [backing, rounded] { std::memset(backing, kPoison, rounded); }});
  std::byte* shown = shown_ + block->offset;
  return {shown, block.release(), &release, fake_device()};
}

DeviceMemory::Block DeviceMemory::take(size_t size, uint64_t capacity) {
  std::lock_guard lock(mutex_);
  const auto live = static_cast<uint64_t>(stats_.allocated_bytes[kAggregate].current);
  if (live + size > capacity) {
    ++stats_.num_ooms;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "fake accelerator: out of memory. Tried to allocate ",
                     size, " bytes; ", live, " of ", capacity, " bytes are in use");
  }
  const size_t range = size + kAlignment;  // a gap, so that a read past the end is poison
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      auto [offset, space] = *it;
      if (space < range) continue;
      free_.erase(it);
      if (space > range) free_[offset + range] = space - range;
      for (auto* stat : byte_stats(stats_)) stat->increase(size);
      stats_.allocation[kAggregate].increase(1);
      ++stats_.num_device_alloc;
      return {offset, size, 0};
    }
    for (auto [offset, space] : quarantine_) give_back_locked(offset, space);
    quarantine_.clear();
    quarantined_ = 0;
  }
  TORCH_CHECK_WITH(OutOfMemoryError, false, "fake accelerator: no range of ", size,
                   " bytes is left in its address space of ", reserved_);
}

c10::DeleterFnPtr DeviceMemory::raw_deleter() const {
  return nullptr;  // the context is no address
}

void DeviceMemory::release(void* block) {
  get().free(std::unique_ptr<Block>(static_cast<Block*>(block)));
}

void DeviceMemory::free(std::unique_ptr<Block> owned) {
  std::shared_ptr<Block> block = std::move(owned);
  std::set<int64_t> streams = block->used_on;
  const bool deferred = !streams.empty();
  streams.insert(block->stream);
  {
    std::lock_guard lock(mutex_);
    if (deferred) {
      ++deferred_;
    } else {
      // The stream's next allocation may have it: its work comes later in the same order.
      for (auto* stat : byte_stats(stats_)) stat->decrease(block->size);
    }
    stats_.allocation[kAggregate].decrease(1);
    ++stats_.num_device_free;
  }
  // The last stream to come here poisons; none waits for another, which would order them.
  auto left = std::make_shared<std::atomic<size_t>>(streams.size());
  for (int64_t stream : streams) {
    Streams::get().enqueue(stream, {.run = [this, block, left, deferred] {
                             if (--*left > 0) return;
                             std::memset(backing_ + block->offset, kPoison, block->size);
                             retire(*block, deferred);
                           }});
  }
}

void DeviceMemory::retire(const Block& block, bool counted) {
  const uint64_t limit = Streams::get().options().quarantine_bytes;
  std::lock_guard lock(mutex_);
  if (counted) {
    --deferred_;
    for (auto* stat : byte_stats(stats_)) stat->decrease(block.size);
  }
  quarantine_.emplace_back(block.offset, block.size + kAlignment);
  quarantined_ += block.size;
  while (quarantined_ > limit) {
    auto [offset, size] = quarantine_.front();
    quarantine_.pop_front();
    quarantined_ -= size - kAlignment;
    const size_t begin = round_up(offset, kPage), end = (offset + size) / kPage * kPage;
    if (end > begin && end - begin >= 16 * kPage)
      ::madvise(backing_ + begin, end - begin, MADV_DONTNEED);
    give_back_locked(offset, size);
  }
}

void DeviceMemory::give_back_locked(size_t offset, size_t size) {
  auto it = free_.emplace(offset, size).first;
  if (auto next = std::next(it); next != free_.end() && offset + size == next->first) {
    it->second += next->second;
    free_.erase(next);
  }
  if (it == free_.begin()) return;
  auto previous = std::prev(it);
  if (previous->first + previous->second != offset) return;
  previous->second += it->second;
  free_.erase(it);
}

void DeviceMemory::copy_data(void* to, const void* from, size_t count) const {
  std::byte* into = bytes(to);
  const std::byte* source = bytes(from);
  Streams& streams = Streams::get();
  streams.enqueue(streams.current(), {.kind = JobKind::operation,
                                      .name = "copy storage",
                                      .run = [=] { std::memcpy(into, source, count); }});
}

void DeviceMemory::recordStream(const c10::DataPtr& pointer, c10::Stream stream) {
  if (!pointer.get() || pointer.get_deleter() != &release) return;
  auto* block = static_cast<Block*>(pointer.get_context());
  std::lock_guard lock(mutex_);
  if (stream.id() != block->stream) block->used_on.insert(stream.id());
}

c10::CachingDeviceAllocator::DeviceStats DeviceMemory::getDeviceStats(c10::DeviceIndex) {
  std::lock_guard lock(mutex_);
  return stats_;
}

void DeviceMemory::resetAccumulatedStats(c10::DeviceIndex) {
  std::lock_guard lock(mutex_);
  for (auto* stat : byte_stats(stats_)) stat->reset_accumulated();
  stats_.allocation[kAggregate].reset_accumulated();
  stats_.num_ooms = stats_.num_device_alloc = stats_.num_device_free = 0;
}

void DeviceMemory::resetPeakStats(c10::DeviceIndex) {
  std::lock_guard lock(mutex_);
  for (auto* stat : byte_stats(stats_)) stat->reset_peak();
  stats_.allocation[kAggregate].reset_peak();
}

std::pair<size_t, size_t> DeviceMemory::getMemoryInfo(c10::DeviceIndex) {
  const uint64_t capacity = Streams::get().options().capacity_bytes;
  std::lock_guard lock(mutex_);
  const auto live = static_cast<uint64_t>(stats_.allocated_bytes[kAggregate].current);
  return {capacity - std::min(capacity, live), capacity};
}

// ---- PinnedMemory ----

PinnedMemory& PinnedMemory::get() {
  static PinnedMemory* const memory = new PinnedMemory;
  return *memory;
}

std::map<std::byte*, PinnedMemory::Block>::iterator PinnedMemory::find_locked(const void* address) {
  auto* byte = static_cast<std::byte*>(const_cast<void*>(address));
  auto it = blocks_.upper_bound(byte);
  if (it == blocks_.begin()) return blocks_.end();
  --it;
  return byte < it->first + it->second.size ? it : blocks_.end();
}

bool PinnedMemory::owns(const void* address) {
  std::lock_guard lock(mutex_);
  auto it = find_locked(address);
  return it != blocks_.end() && !it->second.freed;
}

uint64_t PinnedMemory::live_bytes() {
  std::lock_guard lock(mutex_);
  return static_cast<uint64_t>(bytes_.current);
}

c10::DataPtr PinnedMemory::allocate(size_t size) {
  if (size == 0) return {nullptr, c10::Device(c10::DeviceType::CPU)};
  const uint64_t capacity = Streams::get().options().pinned_capacity_bytes;
  std::lock_guard lock(mutex_);
  const auto live = static_cast<uint64_t>(bytes_.current);
  TORCH_CHECK(live <= capacity && size <= capacity - live, "fake accelerator: cannot pin ", size,
              " bytes of host memory: ", live, " of ", capacity, " bytes are pinned (memlock)");
  auto* address = static_cast<std::byte*>(std::aligned_alloc(kPage, round_up(size, kPage)));
  if (!address) throw std::bad_alloc();
  blocks_[address] = {size};
  bytes_.increase(size);
  return {address, address, &release, c10::Device(c10::DeviceType::CPU)};
}

c10::DeleterFnPtr PinnedMemory::raw_deleter() const {
  return &release;
}

void PinnedMemory::release(void* address) {
  PinnedMemory& memory = get();
  std::lock_guard lock(memory.mutex_);
  auto it = memory.blocks_.find(static_cast<std::byte*>(address));
  if (it == memory.blocks_.end()) return;
  it->second.freed = true;
  if (it->second.pending == 0) memory.free_locked(it);
}

void PinnedMemory::free_locked(std::map<std::byte*, Block>::iterator block) {
  bytes_.decrease(block->second.size);
  std::free(block->first);
  blocks_.erase(block);
}

void PinnedMemory::copy_data(void* to, const void* from, size_t count) const {
  std::memcpy(to, from, count);
}

bool PinnedMemory::record_event(void* address, void* context, c10::Stream stream) {
  std::byte* base = nullptr;
  {
    std::lock_guard lock(mutex_);
    auto it = find_locked(address);
    if (it == blocks_.end()) return false;
    ++it->second.pending;
    base = it->first;
  }
  Streams::get().enqueue(stream.id(), {.run = [this, base] {
                           std::lock_guard lock(mutex_);
                           auto it = blocks_.find(base);
                           if (--it->second.pending == 0 && it->second.freed) free_locked(it);
                         }});
  return true;
}

at::HostStats PinnedMemory::get_stats() {
  std::lock_guard lock(mutex_);
  at::HostStats stats;
  stats.allocated_bytes = stats.active_bytes = bytes_;
  return stats;
}

void PinnedMemory::reset_accumulated_stats() {
  std::lock_guard lock(mutex_);
  bytes_.reset_accumulated();
}

void PinnedMemory::reset_peak_stats() {
  std::lock_guard lock(mutex_);
  bytes_.reset_peak();
}

}  // namespace ferry::testing::fake
