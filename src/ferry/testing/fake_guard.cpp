#include "ferry/testing/fake_guard.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "ferry/testing/fake_generator.h"
#include "ferry/testing/fake_memory.h"
#include "ferry/testing/fake_streams.h"

namespace ferry::testing::fake {

// fake_operators.cpp
void resize_storage(c10::StorageImpl& storage, size_t bytes);

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;

void check_device(c10::Device device) {
  TORCH_CHECK(device.type() == kType && device.index() <= 0,
              "fake accelerator: there is no device ", device, ", only fake:0");
}

c10::Stream stream_of(int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, 0), id);
}

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    check_device(device);
    return c10::Device(kType, 0);
  }
  c10::Device getDevice() const override { return c10::Device(kType, 0); }
  void setDevice(c10::Device device) const override { check_device(device); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }

  c10::Stream getStream(c10::Device device) const override {
    check_device(device);
    return stream_of(Streams::get().current());
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    check_device(device);
    return stream_of(0);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    check_device(device);
    return stream_of(Streams::get().next_pool_stream());
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return getStreamFromGlobalPool(device, false);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_of(Streams::get().exchange_current(stream.id()));
  }
  bool queryStream(const c10::Stream& stream) const override {
    return Streams::get().worker(stream.id()).idle();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Streams::get().synchronize(stream.id(), "synchronize stream");
  }
  void synchronizeDevice(c10::DeviceIndex) const override {
    Streams::get().synchronize_all("synchronize device");
  }
  void recordDataPtrOnStream(const c10::DataPtr& pointer,
                             const c10::Stream& stream) const override {
    DeviceMemory::get().recordStream(pointer, stream);
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag flag) const override {
    events::record(event, stream.id(), flag);
  }
  void block(void* event, const c10::Stream& stream) const override {
    events::block(event, stream.id());
  }
  bool queryEvent(void* event) const override { return events::query(event); }
  void synchronizeEvent(void* event) const override { events::synchronize(event); }
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    return events::elapsed_ms(first, second);
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    events::destroy(event);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    check_device(c10::Device(kType, index));
  }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    check_device(c10::Device(kType, index));
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::get().owns(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &PinnedMemory::get(); }
  at::Device getDeviceFromPtr(void*) const override { return c10::Device(kType, 0); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(*storage.unsafeGetStorageImpl(), bytes);
  }
};

}  // namespace

void register_device() {
  c10::register_privateuse1_backend("fake");
  c10::SetAllocator(kType, &DeviceMemory::get());
  at::setHostAllocator(kType, &PinnedMemory::get());
  // libtorch keeps both for the life of the process.
  c10::impl::registerDeviceGuard(kType, new Guard);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  at::globalContext().lazyInitDevice(kType);  // is_pinned() is false before
}

}  // namespace ferry::testing::fake
