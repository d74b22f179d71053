// The device: memory, streams, events, copies, counters. Kernels: fake_kernels_test.cpp; whole
// models: fake_models_test.cpp.
#include "ferry/testing/fake_accelerator.h"

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <functional>
#include <thread>

namespace ferry::testing {
namespace {

constexpr auto kType = at::DeviceType::PrivateUse1;

class FakeAcceleratorTest : public ::testing::Test {
 protected:
  void SetUp() override { reset({}); }
  void TearDown() override {
    c10::impl::VirtualGuardImpl(kType).exchangeStream(default_stream());
    reset({});
  }
  static void reset(const FakeAcceleratorOptions& options) {
    device = FakeAccelerator::install(options);
    FakeAccelerator::drain();
    FakeAccelerator::reset_counters();
    FakeAccelerator::clear_log();
    FakeAccelerator::reset_peak();
  }
  static c10::Stream default_stream() {
    return c10::impl::VirtualGuardImpl(kType).getDefaultStream(FakeAccelerator::device());
  }
  static c10::Stream pool_stream() {
    return c10::impl::VirtualGuardImpl(kType).getStreamFromGlobalPool(FakeAccelerator::device());
  }
  static at::Tensor pinned(at::IntArrayRef shape, float value) {
    return at::empty(shape, at::TensorOptions().pinned_memory(true)).fill_(value);
  }
  static bool is_poison(const at::Tensor& on_device) {
    return at::isnan(on_device.to(at::kCPU)).all().item<bool>();
  }
  static size_t host_waits() { return FakeAccelerator::counters().host_synchronizations.size(); }

  static inline at::Device device{at::kCPU};
};

double milliseconds(const std::function<void()>& work) {
  auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

// ---- the device as libtorch sees it ----

TEST_F(FakeAcceleratorTest, IsTheAccelerator) {
  EXPECT_EQ(at::accelerator::getAccelerator(), kType);
  EXPECT_EQ(at::accelerator::deviceCount(), 1);
  EXPECT_EQ(at::Device("fake"), at::Device(kType));
  EXPECT_EQ(device.str(), "fake:0");
  EXPECT_TRUE(at::globalContext().getAcceleratorHooksInterface().isAvailable());
}

TEST_F(FakeAcceleratorTest, CurrentStreamsArePerThreadAndGuarded) {
  c10::Stream before = at::accelerator::getCurrentStream(0);
  EXPECT_EQ(before, default_stream());
  c10::Stream other = pool_stream();
  EXPECT_NE(other, before);
  {
    c10::StreamGuard guard(other);
    EXPECT_EQ(at::accelerator::getCurrentStream(0), other);
    std::thread([&] { EXPECT_EQ(at::accelerator::getCurrentStream(0), before); }).join();
  }
  EXPECT_EQ(at::accelerator::getCurrentStream(0), before);
}

// ---- memory ----

TEST_F(FakeAcceleratorTest, HostCannotReadDeviceMemory) {
  at::Tensor x = at::ones({16}, device);
  at::accelerator::synchronizeDevice(0);
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  // A system call reports what an access by this program would die of.
  EXPECT_EQ(::write(ends[1], x.const_data_ptr(), 4), -1);
  EXPECT_EQ(errno, EFAULT);
  ::close(ends[0]);
  ::close(ends[1]);
  EXPECT_TRUE(at::equal(x.to(at::kCPU), at::ones({16})));
}

TEST_F(FakeAcceleratorTest, FreshMemoryIsPoison) {
  EXPECT_TRUE(is_poison(at::empty({100}, device)));
  EXPECT_TRUE(is_poison(at::empty({100}, at::TensorOptions(device).dtype(at::kBFloat16))));
}

TEST_F(FakeAcceleratorTest, FreedMemoryIsPoison) {
  at::Tensor x = at::ones({100}, device);
  // A view whose owner is gone: what a dangling pointer sees.
  at::Tensor dangling = at::empty({100}, device);
  dangling.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(
      c10::DataPtr(x.mutable_data_ptr(), device));
  EXPECT_TRUE(at::equal(dangling.to(at::kCPU), at::ones({100})));
  x.reset();
  EXPECT_TRUE(is_poison(dangling));
}

TEST_F(FakeAcceleratorTest, CountsLiveAndPeakBytes) {
  const uint64_t before = FakeAccelerator::live_bytes();
  at::Tensor x = at::empty({1024}, device);  // 4096 bytes
  EXPECT_EQ(FakeAccelerator::live_bytes() - before, 4096u);
  {
    at::Tensor y = at::empty({1}, device);
    EXPECT_EQ(FakeAccelerator::live_bytes() - before, 4096u + 512u);
  }
  EXPECT_EQ(FakeAccelerator::live_bytes() - before, 4096u);
  EXPECT_EQ(FakeAccelerator::peak_bytes() - before, 4096u + 512u);
  at::accelerator::resetPeakStats(0);
  EXPECT_EQ(FakeAccelerator::peak_bytes() - before, 4096u);
  auto stats = at::accelerator::getDeviceStats(0);
  EXPECT_EQ(static_cast<uint64_t>(stats.allocated_bytes[0].current), FakeAccelerator::live_bytes());
}

TEST_F(FakeAcceleratorTest, OverCapacityThrows) {
  reset({.capacity_bytes = FakeAccelerator::live_bytes() + (1 << 20)});
  auto [free, total] = at::accelerator::getMemoryInfo(0);
  EXPECT_EQ(free, 1u << 20);
  EXPECT_EQ(total, FakeAccelerator::options().capacity_bytes);
  at::Tensor half = at::empty({1 << 17}, device);
  EXPECT_THROW(at::empty({(1 << 17) + 1}, device), c10::OutOfMemoryError);
  at::Tensor other_half = at::empty({1 << 17}, device);
  EXPECT_EQ(at::accelerator::getMemoryInfo(0).first, 0u);
  EXPECT_THROW(at::empty({1}, device), c10::OutOfMemoryError);
  half.reset();
  EXPECT_NO_THROW(at::empty({1}, device));
  at::accelerator::emptyCache();
}

TEST_F(FakeAcceleratorTest, AddressesAreReusedAndStayApart) {
  reset({.quarantine_bytes = 1 << 16});
  std::vector<at::Tensor> kept;
  for (int i = 0; i < 300; ++i) {
    at::Tensor x = at::full({1000 + i}, static_cast<float>(i), device);
    if (i % 10 == 0) kept.push_back(x);
  }
  for (size_t i = 0; i < kept.size(); ++i)
    EXPECT_TRUE(at::equal(kept[i].to(at::kCPU), at::full_like(kept[i], i * 10.0, at::kCPU)));
}

// A tensor of one stream that another one reads, dropped by the host while that is outstanding.
TEST_F(FakeAcceleratorTest, RecordStreamDefersTheFree) {
  for (bool record : {false, true}) {
    reset({});
    const uint64_t before = FakeAccelerator::live_bytes();
    at::Tensor x = at::ones({1000}, device);
    at::accelerator::synchronizeDevice(0);
    c10::Stream side = pool_stream();
    FakeAccelerator::set_options({.op_delay_ms = 10});
    at::Tensor y;
    {
      c10::StreamGuard guard(side);
      y = x + 1;
    }
    if (record) x.record_stream(side);
    x.reset();
    EXPECT_EQ(FakeAccelerator::live_bytes() - before, record ? 8192u : 4096u);
    FakeAccelerator::drain();
    EXPECT_EQ(FakeAccelerator::live_bytes() - before, 4096u);
    c10::StreamGuard guard(side);
    EXPECT_EQ(is_poison(y), !record);
    EXPECT_EQ(at::equal(y.to(at::kCPU), at::full({1000}, 2.0)), record);
  }
}

TEST_F(FakeAcceleratorTest, AllocationWaitsForDeferredFreesBeforeItGivesUp) {
  reset({.capacity_bytes = FakeAccelerator::live_bytes() + 4096});
  at::Tensor x = at::ones({1024}, device);
  c10::Stream side = pool_stream();
  {
    c10::StreamGuard guard(side);
    FakeAccelerator::set_options(
        {.capacity_bytes = FakeAccelerator::options().capacity_bytes, .op_delay_ms = 5});
    x.fill_(2);
  }
  x.record_stream(side);
  x.reset();
  FakeAccelerator::reset_counters();
  EXPECT_NO_THROW(at::empty({1024}, device));
  EXPECT_EQ(FakeAccelerator::counters().host_synchronizations,
            std::vector<std::string>{"allocate (waits for record_stream)"});
}

// ---- pinned memory ----

TEST_F(FakeAcceleratorTest, PinnedMemoryIsCountedAndCanBeRefused) {
  const uint64_t before = FakeAccelerator::pinned_bytes();
  at::Tensor x = pinned({256}, 1);
  EXPECT_TRUE(x.is_pinned());
  EXPECT_TRUE(x.narrow(0, 8, 8).is_pinned());
  EXPECT_FALSE(at::ones({256}).is_pinned());
  EXPECT_TRUE(at::ones({4}).pin_memory().is_pinned());
  EXPECT_EQ(FakeAccelerator::pinned_bytes() - before, 1024u);
  auto data = at::getHostAllocator(kType)->allocate(100);
  EXPECT_EQ(FakeAccelerator::pinned_bytes() - before, 1124u);
  data.clear();
  FakeAccelerator::set_options({.pinned_capacity_bytes = before + 1024});
  EXPECT_THROW(pinned({1}, 1), c10::Error);
  EXPECT_THROW(at::getHostAllocator(kType)->allocate(1), c10::Error);
  x.reset();
  EXPECT_NO_THROW(pinned({256}, 1));
}

TEST_F(FakeAcceleratorTest, PinnedMemoryOutlivesItsCopies) {
  reset({.copy_delay_ms = 5});
  const uint64_t before = FakeAccelerator::pinned_bytes();
  at::Tensor x = pinned({1000}, 3);
  at::Tensor y = x.to(device, /*non_blocking=*/true);
  x.reset();
  EXPECT_EQ(FakeAccelerator::pinned_bytes() - before, 4000u);
  EXPECT_TRUE(at::equal(y.to(at::kCPU), at::full({1000}, 3.0)));
  EXPECT_EQ(FakeAccelerator::pinned_bytes(), before);
}

// ---- copies ----

TEST_F(FakeAcceleratorTest, CopiesAreAsynchronousOnlyWithNonBlockingAndPinned) {
  at::Tensor target = at::zeros({1000}, device), host = at::zeros({1000});
  at::Tensor pinned_host = pinned({1000}, 0);
  for (bool non_blocking : {false, true}) {
    for (bool pin : {false, true}) {
      for (bool to_device : {true, false}) {
        at::Tensor side = pin ? pinned_host : host;
        FakeAccelerator::drain();
        FakeAccelerator::reset_counters();
        if (to_device)
          target.copy_(side, non_blocking);
        else
          side.copy_(target, non_blocking);
        FakeCounters counters = FakeAccelerator::counters();
        EXPECT_EQ(counters.host_synchronizations.empty(), non_blocking && pin);
        EXPECT_EQ(counters.host_to_device_bytes, to_device ? 4000u : 0u);
        EXPECT_EQ(counters.device_to_host_bytes, to_device ? 0u : 4000u);
        EXPECT_EQ(counters.host_to_device_copies + counters.device_to_host_copies, 1u);
      }
    }
  }
  // Another dtype, or another order, goes through pageable memory.
  FakeAccelerator::reset_counters();
  target.copy_(pinned({1000}, 1).to(at::kDouble).pin_memory(), true);
  EXPECT_EQ(host_waits(), 1u);
  at::zeros({20, 50}, device).copy_(pinned({50, 20}, 1).t(), true);
  EXPECT_EQ(host_waits(), 2u);
}

TEST_F(FakeAcceleratorTest, CopiesKeepValuesOverDtypesAndStrides) {
  at::Tensor x = at::arange(24, at::kFloat).view({2, 3, 4});
  for (auto dtype : {at::kFloat, at::kBFloat16, at::kLong, at::kBool}) {
    at::Tensor y = at::empty({4, 3, 2}, at::TensorOptions(device).dtype(dtype)).permute({2, 1, 0});
    y.copy_(x);
    EXPECT_TRUE(at::equal(y.to(at::kCPU), x.to(dtype))) << dtype;
    at::Tensor z = at::empty({3, 4, 2}).permute({2, 0, 1});
    z.copy_(y);
    EXPECT_TRUE(at::equal(z, x.to(dtype).to(at::kFloat))) << dtype;
    at::Tensor wide = at::empty({5, 2, 3, 4}, device);
    wide.copy_(x);  // broadcast
    EXPECT_TRUE(at::equal(wide.to(at::kCPU), x.expand({5, 2, 3, 4})));
  }
}

// What the host reads before it waited is what was there before.
TEST_F(FakeAcceleratorTest, CopiesToTheHostArriveLater) {
  at::Tensor x = at::ones({100}, device), host = pinned({100}, 7);
  reset({.copy_delay_ms = 10});
  host.copy_(x, /*non_blocking=*/true);
  EXPECT_TRUE(at::equal(host, at::full({100}, 7.0)));
  at::accelerator::getCurrentStream(0).synchronize();
  EXPECT_TRUE(at::equal(host, at::ones({100})));
}

TEST_F(FakeAcceleratorTest, BandwidthPacesEachDirection) {
  at::Tensor host = pinned({1 << 18}, 1), x = at::empty({1 << 18}, device);  // 1 MiB
  x.copy_(host);
  reset({.host_to_device_bytes_per_second = 50e6, .device_to_host_bytes_per_second = 100e6});
  EXPECT_GE(milliseconds([&] { x.copy_(host); }), 20);  // 1 MiB at 50 MB/s: 21 ms
  double back = milliseconds([&] { host.copy_(x); });
  EXPECT_GE(back, 10);
  // Two streams share a direction.
  c10::Stream side = pool_stream();
  at::Tensor y = at::empty({1 << 18}, device);
  FakeAccelerator::drain();
  EXPECT_GE(milliseconds([&] {
              x.copy_(host, true);
              {
                c10::StreamGuard guard(side);
                y.copy_(host, true);
              }
              at::accelerator::synchronizeDevice(0);
            }),
            41);
}

// ---- events ----

TEST_F(FakeAcceleratorTest, EventsOrderQueryAndTime) {
  reset({.op_delay_ms = 5});
  c10::Event begin(kType, c10::EventFlag::BACKEND_DEFAULT);
  c10::Event end(kType, c10::EventFlag::BACKEND_DEFAULT);
  c10::Event never(kType);
  EXPECT_TRUE(never.query());
  at::Tensor x = at::empty({10}, device);
  c10::Stream stream = at::accelerator::getCurrentStream(0);
  begin.record(stream);
  for (int i = 0; i < 4; ++i) x.fill_(i);
  end.record(stream);
  EXPECT_FALSE(end.query());
  EXPECT_FALSE(stream.query());
  end.synchronize();
  EXPECT_TRUE(end.query());
  // Recording the event was the stream's last work, which ends a moment after the event is seen.
  for (int i = 0; i < 1000 && !stream.query(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_TRUE(stream.query());
  EXPECT_GE(begin.elapsedTime(end), 19.9);
  EXPECT_EQ(FakeAccelerator::counters().host_synchronizations,
            std::vector<std::string>{"synchronize event"});
  c10::Event untimed(kType);
  untimed.record(stream);
  untimed.synchronize();
  EXPECT_ANY_THROW(begin.elapsedTime(untimed));
}

TEST_F(FakeAcceleratorTest, AnEventMayGoBeforeItsStreamComesToIt) {
  reset({.op_delay_ms = 5});
  c10::Stream side = pool_stream();
  at::Tensor x = at::zeros({10}, device);
  {
    c10::Event event(kType);
    event.record(at::accelerator::getCurrentStream(0));
    event.block(side);
  }
  c10::StreamGuard guard(side);
  EXPECT_TRUE(at::equal(x.to(at::kCPU), at::zeros({10})));
}

// ---- a ring of two slots that a copy stream fills and compute empties ----

struct Waits {
  bool copied = true;  // compute waits for the copy
  bool freed = true;   // the copy into a slot waits for the compute that read it before
};

// Sums eight weights that pass through two slots; 36 where the order is kept.
float stream_weights(const Waits& waits) {
  constexpr int kWeights = 8, kSlots = 2;
  c10::impl::VirtualGuardImpl impl(kType);
  at::Device device = FakeAccelerator::device();
  c10::Stream compute = impl.getDefaultStream(device);
  static const c10::Stream copy = impl.getStreamFromGlobalPool(device);
  std::vector<at::Tensor> host, slots;
  for (int i = 0; i < kWeights; ++i)
    host.push_back(at::empty({256}, at::TensorOptions().pinned_memory(true)).fill_(i + 1));
  for (int i = 0; i < kSlots; ++i) slots.push_back(at::zeros({256}, device));
  at::Tensor sum = at::zeros({256}, device);
  at::accelerator::synchronizeDevice(0);

  std::vector<c10::Event> copied, freed;
  for (int i = 0; i < kSlots; ++i) {
    copied.emplace_back(kType);
    freed.emplace_back(kType);
  }
  for (int i = 0; i < kWeights; ++i) {
    const auto slot = static_cast<size_t>(i % kSlots);
    {
      c10::StreamGuard guard(copy);
      if (waits.freed && i >= kSlots) freed[slot].block(copy);
      slots[slot].copy_(host[static_cast<size_t>(i)], /*non_blocking=*/true);
      copied[slot].record(copy);
    }
    if (waits.copied) copied[slot].block(compute);
    sum.add_(slots[slot]);
    freed[slot].record(compute);
  }
  at::accelerator::synchronizeDevice(0);
  at::Tensor result = sum.to(at::kCPU);
  return result.eq(result[0]).all().item<bool>() ? result[0].item<float>() : -1;
}

constexpr float kRight = 36;

TEST_F(FakeAcceleratorTest, TheRightScheduleIsRightHoweverLateThingsAre) {
  for (const FakeAcceleratorOptions& options :
       {FakeAcceleratorOptions{.copy_delay_ms = 3}, FakeAcceleratorOptions{.op_delay_ms = 3}}) {
    reset(options);
    for (int run = 0; run < 5; ++run) EXPECT_EQ(stream_weights({}), kRight);
  }
  for (uint64_t seed = 0; seed < 10; ++seed) {
    reset({.random_delay_ms = 1, .seed = seed});
    EXPECT_EQ(stream_weights({}), kRight) << "seed " << seed;
  }
}

TEST_F(FakeAcceleratorTest, AMissingWaitForTheCopyGivesWrongResults) {
  reset({.copy_delay_ms = 3});
  for (int run = 0; run < 10; ++run) EXPECT_NE(stream_weights({.copied = false}), kRight);
}

TEST_F(FakeAcceleratorTest, AMissingWaitForTheSlotGivesWrongResults) {
  reset({.op_delay_ms = 3});
  for (int run = 0; run < 10; ++run) EXPECT_NE(stream_weights({.freed = false}), kRight);
}

TEST_F(FakeAcceleratorTest, TheStepNeedsNoHostSynchronisation) {
  reset({.op_delay_ms = 2});
  at::Tensor host = pinned({256}, 1), x = at::zeros({256}, device), w = at::ones({16, 256}, device);
  FakeAccelerator::drain();
  FakeAccelerator::reset_counters();
  for (int i = 0; i < 10; ++i) {
    x.copy_(host, true);
    at::Tensor y = at::layer_norm(at::linear(x.unsqueeze(0), w), {16}) + 1;
    at::softmax(y, -1).to(at::kBFloat16).contiguous();
  }
  EXPECT_FALSE(at::accelerator::getCurrentStream(0).query());
  EXPECT_TRUE(FakeAccelerator::counters().host_synchronizations.empty())
      << FakeAccelerator::counters().host_synchronizations.front();
  x[0].item<float>();
  EXPECT_EQ(FakeAccelerator::counters().host_synchronizations,
            std::vector<std::string>{"aten::_local_scalar_dense"});
}

// 8 x (20 ms copy + 20 ms compute): 180 ms at best on two streams, 320 ms on one.
TEST_F(FakeAcceleratorTest, CopiesOverlapCompute) {
  at::Tensor host = pinned({1 << 16}, 1), x = at::zeros({16}, device);  // 256 KiB
  std::vector<at::Tensor> weights;
  for (int i = 0; i < 8; ++i) weights.push_back(at::empty({1 << 16}, device));
  c10::Stream side = pool_stream(), compute = default_stream();
  auto run = [&](const c10::Stream& copy) {
    FakeAccelerator::drain();
    return milliseconds([&] {
      for (at::Tensor& weight : weights) {
        c10::Event copied(kType);
        {
          c10::StreamGuard guard(copy);
          weight.copy_(host, true);
          copied.record(copy);
        }
        copied.block(compute);
        x.add_(weight[0]);
      }
      FakeAccelerator::drain();
    });
  };
  run(side);  // threads start
  reset({.host_to_device_bytes_per_second = (1 << 18) / 20e-3, .op_delay_ms = 20});
  double two = run(side), one = run(compute);
  RecordProperty("two_streams_ms", static_cast<int>(two));
  RecordProperty("one_stream_ms", static_cast<int>(one));
  EXPECT_GE(two, 179);
  EXPECT_GE(one, 319);
  EXPECT_LT(two, 0.8 * one);
}

// ---- the rest ----

TEST_F(FakeAcceleratorTest, LogsWhatEachStreamExecuted) {
  reset({.record_log = true});
  at::Tensor host = pinned({10}, 1);
  c10::Stream side = pool_stream();
  c10::StreamGuard guard(side);
  at::Tensor x = host.to(device, true);
  at::Tensor y = at::mul(x, x);
  FakeAccelerator::drain();
  std::vector<FakeOperation> log = FakeAccelerator::log();
  ASSERT_EQ(log.size(), 2u);
  EXPECT_EQ(log[0].name, "copy host to device");
  EXPECT_EQ(log[0].bytes, 40u);
  EXPECT_EQ(log[1].name.rfind("aten::mul", 0), 0u) << log[1].name;
  EXPECT_EQ(log[1].stream_id, side.id());
  EXPECT_LE(log[0].end_ms, log[1].begin_ms);
}

TEST_F(FakeAcceleratorTest, AnErrorOnAWorkerThrowsAtTheNextWait) {
  at::Tensor weight = at::ones({4, 4}, device);
  at::Tensor ids = at::full({1}, 9, at::TensorOptions(device).dtype(at::kLong));
  at::Tensor x;
  EXPECT_NO_THROW(x = at::embedding(weight, ids));
  EXPECT_THROW(at::accelerator::synchronizeDevice(0), c10::Error);
  EXPECT_NO_THROW(at::accelerator::synchronizeDevice(0));
}

TEST_F(FakeAcceleratorTest, SynchronousComputeFinishesInTheCall) {
  reset({.op_delay_ms = 5, .asynchronous_compute = false});
  at::Tensor x = at::zeros({4}, device);
  EXPECT_TRUE(at::accelerator::getCurrentStream(0).query());
}

}  // namespace
}  // namespace ferry::testing
