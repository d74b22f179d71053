#include "ferry/testing/fake_accelerator.h"

#include <atomic>
#include <cstdlib>
#include <mutex>

#include "ferry/testing/fake_guard.h"
#include "ferry/testing/fake_memory.h"
#include "ferry/testing/fake_streams.h"

namespace ferry::testing {

namespace {

constexpr size_t kAggregate = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
std::atomic<bool> is_installed = false;

}  // namespace

at::Device FakeAccelerator::install(const FakeAcceleratorOptions& options) {
  static std::once_flag once;
  std::call_once(once, [] {
    fake::DeviceMemory::get();  // throws before anything is registered
    fake::register_device();
    fake::register_operators();
    // Workers use what libtorch destroys at exit.
    std::atexit([] { fake::Streams::get().stop(); });
    is_installed = true;
  });
  set_options(options);
  return device();
}

bool FakeAccelerator::installed() {
  return is_installed;
}

at::Device FakeAccelerator::device() {
  return {at::DeviceType::PrivateUse1, 0};
}

void FakeAccelerator::set_options(const FakeAcceleratorOptions& options) {
  fake::Streams::get().set_options(options);
}

FakeAcceleratorOptions FakeAccelerator::options() {
  return fake::Streams::get().options();
}

uint64_t FakeAccelerator::live_bytes() {
  auto stats = fake::DeviceMemory::get().getDeviceStats(0);
  return static_cast<uint64_t>(stats.allocated_bytes[kAggregate].current);
}

uint64_t FakeAccelerator::peak_bytes() {
  auto stats = fake::DeviceMemory::get().getDeviceStats(0);
  return static_cast<uint64_t>(stats.allocated_bytes[kAggregate].peak);
}

void FakeAccelerator::reset_peak() {
  fake::DeviceMemory::get().resetPeakStats(0);
}

uint64_t FakeAccelerator::pinned_bytes() {
  return fake::PinnedMemory::get().live_bytes();
}

FakeCounters FakeAccelerator::counters() {
  return fake::Streams::get().counters();
}

void FakeAccelerator::reset_counters() {
  fake::Streams::get().reset_counters();
}

std::vector<FakeOperation> FakeAccelerator::log() {
  return fake::Streams::get().log();
}

void FakeAccelerator::clear_log() {
  fake::Streams::get().clear_log();
}

void FakeAccelerator::drain() {
  fake::Streams::get().drain();
}

}  // namespace ferry::testing
