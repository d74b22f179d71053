#include "ferry/testing/fake_generator.h"

#include <ATen/CPUGeneratorImpl.h>

namespace ferry::testing::fake {

namespace {

// A CPU generator that says that it is the device's.
class FakeGenerator final : public c10::GeneratorImpl {
 public:
  explicit FakeGenerator(at::Generator cpu)
      : GeneratorImpl(c10::Device(c10::DeviceType::PrivateUse1, 0),
                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu_(std::move(cpu)) {}

  const at::Generator& cpu() const { return cpu_; }

  void set_current_seed(uint64_t seed) override { cpu_.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu_.set_offset(offset); }
  uint64_t get_offset() const override { return cpu_.get_offset(); }
  uint64_t current_seed() const override { return cpu_.current_seed(); }
  uint64_t seed() override { return cpu_.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu_.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu_.unsafeGetGeneratorImpl()->get_state();
  }

 private:
  FakeGenerator* clone_impl() const override { return new FakeGenerator(cpu_.clone()); }

  at::Generator cpu_;
};

}  // namespace

at::Generator new_generator() {
  return at::make_generator<FakeGenerator>(at::detail::createCPUGenerator());
}

at::Generator cpu_generator(const at::Generator& generator) {
  if (!generator.defined() || generator.device().type() != c10::DeviceType::PrivateUse1)
    return generator;
  return static_cast<FakeGenerator*>(generator.unsafeGetGeneratorImpl())->cpu();
}

}  // namespace ferry::testing::fake
