// Device memory and pinned host memory of the fake accelerator (fake_accelerator.h).
#pragma once

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>

namespace ferry::testing::fake {

// Addresses that tensors show lie in a reservation that nobody may access; the bytes lie at the
// same offset of a second mapping, which only the workers use. A host that reads device memory
// faults.
class DeviceMemory final : public c10::DeviceAllocator {
 public:
  // Throws DeviceError if the address space is refused.
  static DeviceMemory& get();

  // The bytes behind an address that a tensor shows. For jobs.
  std::byte* bytes(const void* address) const;
  bool owns(const void* address) const;

  c10::DataPtr allocate(size_t size) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, size_t count) const override;
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t pool = {0, 0}) override {}  // there is no cache
  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override;
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override;
  void resetAccumulatedStats(c10::DeviceIndex device) override;
  void resetPeakStats(c10::DeviceIndex device) override;
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override;  // free, total

 private:
  struct Block {
    size_t offset, size;             // of the reservation; multiples of kAlignment
    int64_t stream;                  // current at allocation
    std::set<int64_t> used_on = {};  // other streams, by record_stream()
  };
  DeviceMemory();
  static void release(void* block);
  void free(std::unique_ptr<Block> block);
  // Takes a range of addresses. Throws c10::OutOfMemoryError over `capacity`.
  Block take(size_t size, uint64_t capacity);
  // Poisoned on all its streams: into the quarantine. `counted`: it is still in the live bytes.
  void retire(const Block& block, bool counted);
  void give_back_locked(size_t offset, size_t size);

  std::byte* shown_ = nullptr;
  std::byte* backing_ = nullptr;
  size_t reserved_ = 0;

  std::mutex mutex_;               // of everything below
  std::map<size_t, size_t> free_;  // offset -> size of ranges that can be handed out
  std::deque<std::pair<size_t, size_t>> quarantine_;
  size_t quarantined_ = 0;
  c10::CachingDeviceAllocator::DeviceStats stats_;
  size_t deferred_ = 0;  // frees that wait for record_stream()'s streams
};

// Not cached: each allocation is one of its own.
class PinnedMemory final : public at::HostAllocator {
 public:
  static PinnedMemory& get();

  bool owns(const void* address);
  uint64_t live_bytes();

  c10::DataPtr allocate(size_t size) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, size_t count) const override;
  // The block that holds `address` is not released before the stream has come here.
  bool record_event(void* address, void* context, c10::Stream stream) override;
  void empty_cache() override {}
  at::HostStats get_stats() override;
  void reset_accumulated_stats() override;
  void reset_peak_stats() override;

 private:
  struct Block {
    size_t size;
    int pending = 0;  // record_event()s that the streams have not reached
    bool freed = false;
  };
  static void release(void* address);
  // The block that holds the address, or end().
  std::map<std::byte*, Block>::iterator find_locked(const void* address);
  void free_locked(std::map<std::byte*, Block>::iterator block);

  std::mutex mutex_;
  std::map<std::byte*, Block> blocks_;
  c10::CachingAllocator::Stat bytes_;
};

}  // namespace ferry::testing::fake
