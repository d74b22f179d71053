// Modules with everything that offloading has to cope with, and a fixture that runs its tests where
// compute is on the CPU and where it is on an accelerator (the fake one).
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ferry/hooks/group_offloading.h"
#include "ferry/io/safetensors.h"
#include "ferry/nn/embedding.h"
#include "ferry/nn/linear.h"
#include "ferry/testing/fake_accelerator.h"
#include "ferry/weights/stub.h"

namespace ferry::hooks {

// A parameter and a buffer of its own, two linears, and a choice whether the second runs.
class Block : public nn::Module {
 public:
  Block() {
    scale_ = stub_parameter("scale", {48});
    shift_ = stub_buffer("shift", {48});
    first_ = nn::make<nn::Linear>(48, 96);
    second_ = nn::make<nn::Linear>(96, 48);
    register_module("first", first_);
    register_module("second", second_);
  }
  at::Tensor forward(const at::Tensor& x, bool skip) {
    at::Tensor hidden = first_(x * scale_ + shift_);
    return skip ? x + hidden.narrow(-1, 0, 48) : x + second_(at::gelu(hidden));
  }

 private:
  at::Tensor scale_, shift_;
  nn::Ptr<nn::Linear> first_, second_;
};

// A table, blocks in a list, and a head. Blocks may be used in any order, also twice.
class Net : public nn::Module {
 public:
  static constexpr const char* kFile = "net.safetensors";
  Net() {
    table_ = nn::make<nn::Embedding>(100, 48);
    blocks_ = nn::make<nn::ModuleList<Block>>();
    out_ = nn::make<nn::Linear>(48, 48);
    register_module("table", table_);
    register_module("blocks", blocks_);
    register_module("out", out_);
    for (int i = 0; i < 5; ++i) blocks_->push_back(nn::make<Block>());
  }
  at::Tensor forward(const at::Tensor& ids, bool skip = false) {
    at::Tensor x = table_(ids);
    for (const auto& block : *blocks_) x = block(x, skip);
    return out_(x);
  }
  // A second entry: the blocks of `order`.
  at::Tensor run(const at::Tensor& ids, const std::vector<size_t>& order) {
    return call([&] {
      at::Tensor x = table_(ids);
      for (size_t block : order) x = (*blocks_)[block](x, false);
      return out_(x);
    });
  }

 private:
  nn::Ptr<nn::Embedding> table_;
  nn::Ptr<nn::ModuleList<Block>> blocks_;
  nn::Ptr<nn::Linear> out_;
};

// A head without a weight of its own.
class TiedHead : public nn::Module {
 public:
  explicit TiedHead(const at::Tensor& weight) : weight_(weight) {
    register_parameter("weight", weight_, /*requires_grad=*/false);
  }
  at::Tensor forward(const at::Tensor& x) { return at::linear(x, weight_); }

 private:
  at::Tensor weight_;
};

// A block whose second linear is another one's too.
class SharingBlock : public nn::Module {
 public:
  explicit SharingBlock(const nn::Ptr<nn::Linear>& shared) : shared_(shared) {
    own_ = nn::make<nn::Linear>(48, 48);
    register_module("own", own_);
    register_module("shared", shared_);
  }
  at::Tensor forward(const at::Tensor& x) { return x + shared_(at::gelu(own_(x))); }

 private:
  nn::Ptr<nn::Linear> own_, shared_;
};

// Blocks that share a module, and a head whose weight is the table's.
class SharedNet : public nn::Module {
 public:
  static constexpr const char* kFile = "shared.safetensors";
  SharedNet() {
    table_ = nn::make<nn::Embedding>(100, 48);
    blocks_ = nn::make<nn::ModuleList<SharingBlock>>();
    head_ = nn::make<TiedHead>(table_->weight);
    register_module("table", table_);
    register_module("blocks", blocks_);
    register_module("head", head_);
    auto shared = nn::make<nn::Linear>(48, 48);
    for (int i = 0; i < 4; ++i) blocks_->push_back(nn::make<SharingBlock>(shared));
  }
  at::Tensor forward(const at::Tensor& ids) {
    at::Tensor x = table_(ids);
    for (const auto& block : *blocks_) x = block(x);
    return head_(x);
  }

 private:
  nn::Ptr<nn::Embedding> table_;
  nn::Ptr<nn::ModuleList<SharingBlock>> blocks_;
  nn::Ptr<TiedHead> head_;
};

// Parameterised by the device: "cpu", "fake".
class OffloadFixture : public ::testing::TestWithParam<const char*> {
 protected:
  OffloadFixture() {
    // Also for tests on the CPU: libtorch counts its devices once.
    const at::Device fake = testing::FakeAccelerator::install();
    device_ = on_accelerator() ? fake : at::Device(at::kCPU);
    std::string name = ::testing::TempDir() + "/hooks.XXXXXX";
    folder_ = ::mkdtemp(name.data());
    at::manual_seed(2);
    write<Net>();
    write<SharedNet>();
    ids_ = at::randint(100, {2, 7}).to(device_);
    auto net = resident<Net>();
    expected_ = net(ids_, false);
    expected_skip_ = net(ids_, true);
  }
  ~OffloadFixture() override {
    testing::FakeAccelerator::set_options({});
    std::filesystem::remove_all(folder_);
  }
  static bool on_accelerator() { return std::string(GetParam()) == "fake"; }

  template <class M>
  void write() {
    std::vector<io::SafetensorsWriter::Entry> entries;
    std::vector<at::Tensor> values;
    auto net = nn::make<M>();
    for (const weights::Slot& slot : weights::collect_slots(*net)) {
      entries.push_back({slot.name(), io::Dtype::F32, slot.shape().vec()});
      values.push_back(at::randn(slot.shape()) * 0.2);
    }
    io::SafetensorsWriter writer(folder_ / M::kFile, entries);
    for (const at::Tensor& value : values) {
      writer.write({static_cast<const std::byte*>(value.const_data_ptr()),
                    static_cast<size_t>(value.nbytes())});
    }
    writer.finish();
  }

  template <class M = Net>
  std::pair<nn::Ptr<M>, std::shared_ptr<weights::Binding>> load(
      std::optional<at::ScalarType> dtype = {}) {
    auto net = nn::make<M>();
    weights::BindOptions options;
    if (dtype) options.dtype = [=](const std::string&, at::ScalarType) { return *dtype; };
    auto binding = weights::bind(*net, weights::Checkpoint::open_file(folder_ / M::kFile), options);
    return {net, binding};
  }
  // With all its weights, on the device.
  template <class M = Net>
  nn::Ptr<M> resident(std::optional<at::ScalarType> dtype = {}) {
    auto [net, binding] = load<M>(dtype);
    read_all(*net, *binding);
    return net;
  }
  void read_all(nn::Module& net, weights::Binding& binding) {
    auto reader = io::make_read_engine();
    weights::load_resident(binding, *reader);
    net.to(device_);
  }

  offload::EngineOptions engine_options(uint64_t budget, uint64_t small = 0) const {
    offload::EngineOptions options;
    options.device = device_;
    options.weights_memory_bytes = budget;
    options.preferred_arena_bytes = 48 << 10;
    options.small_slot_bytes = small;
    return options;
  }
  std::shared_ptr<offload::Engine> engine(uint64_t budget, uint64_t small = 0) const {
    return std::make_shared<offload::Engine>(engine_options(budget, small));
  }

  at::Device device_{at::kCPU};
  std::filesystem::path folder_;
  at::Tensor ids_, expected_, expected_skip_;
};

inline std::string device_name(const ::testing::TestParamInfo<const char*>& info) {
  return info.param;
}

}  // namespace ferry::hooks
