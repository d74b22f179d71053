// MemoryTester: whatever the options of offloading, a model computes bit for bit what it computes
// with its weights resident on test_device(), trains to the same gradients, keeps its parameters'
// identity, and saves the weights that it has. Parameterised by ModelCase, as ModelTester.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/testing/model_case.h"
#include "ferry/weights/lossless_pack.h"
#include "ferry/weights/stub.h"

namespace ferry::testing {

class MemoryTester : public ::testing::TestWithParam<ModelCase> {
 protected:
  using Offloading = std::shared_ptr<hooks::GroupOffloading>;
  // Where streamed weights wait.
  enum class Home { disk, host, pack };
  static constexpr auto kTypes = {hooks::OffloadType::leaf_level, hooks::OffloadType::block_level};
  static constexpr uint64_t kPlenty = 1 << 30;

  // Tiny tensors gain nothing from threads, and a busy machine makes them wait for each other.
  MemoryTester() { at::set_num_threads(1); }
  ~MemoryTester() override { at::set_num_threads(threads_before_); }

  static std::vector<Home> homes() {
    if (!test_device().is_cpu()) return {Home::disk, Home::host};
    return {Home::disk, Home::pack};
  }
  std::shared_ptr<models::Model> load_from(Home home) {
    models::LoadOptions options;
    if (home == Home::pack) {
      options.pack = folder_.path() / "weights.pack";
      if (!std::filesystem::exists(options.pack))
        weights::write_lossless_pack(*GetParam().load()->binding()->checkpoint, options.pack);
    }
    return GetParam().load(options);
  }
  static Offloading offload(models::Model& model, uint64_t budget, Home home = Home::disk,
                            const hooks::GroupOffloadingConfig& config = {}) {
    offload::EngineOptions options;
    options.device = test_device();
    options.weights_memory_bytes = budget;
    options.host_memory_bytes = home == Home::host ? offload::EngineOptions::kAllWeights : 0;
    options.preferred_arena_bytes = 64 << 10;
    options.small_slot_bytes = 0;
    return hooks::apply_group_offloading(model, model.binding(),
                                         std::make_shared<offload::Engine>(options), config);
  }
  // The least with which it runs, a quarter of the weights (or what lies between the least and all
  // of them), and all.
  static std::vector<uint64_t> budgets(models::Model& model, Home home,
                                       hooks::GroupOffloadingConfig config) {
    config.use_stream = false;
    const uint64_t least = offload(model, 0, home, config)->client().plan().peak_bytes();
    const uint64_t bytes = weights::total_bytes(weights::collect_slots(model));
    return {least, bytes / 4 > least ? bytes / 4 : least + bytes / 8, 4 * bytes + (1 << 20)};
  }

  // The gradients of all parameters of the model, of a loss over all its outputs.
  static models::NamedTensors gradients(models::Model& model) {
    at::AutoGradMode with_graph(true);
    for (auto& item : model.named_parameters()) {
      if (!at::isFloatingType(item.value().scalar_type())) continue;
      item.value().requires_grad_();
      item.value().mutable_grad().reset();
    }
    auto inputs = to_device(GetParam().read_inputs(model.dtype()), model.device());
    at::Tensor loss;
    for (const auto& [name, out] :
         model.forward_named(GetParam().method, inputs, GetParam().arguments)) {
      if (!out.requires_grad()) continue;
      const at::Tensor part = out.square().mean();
      loss = loss.defined() ? loss + part : part;
    }
    loss.backward();
    models::NamedTensors result;
    for (const auto& item : model.named_parameters()) {
      if (item.value().grad().defined())
        result[item.key()] = item.value().grad().detach().to(at::kCPU, item.value().scalar_type(),
                                                             /*non_blocking=*/false, /*copy=*/true);
    }
    return result;
  }

  // But for rounding: where a tensor is used three times, its gradients are added up a module at a
  // time here, and one by one in a graph of the whole model; and a device may choose another kernel
  // where a graph is made, which only one of the two forwards of a recomputation makes.
  static void expect_gradients(const models::NamedTensors& got,
                               const models::NamedTensors& expected, const std::string& when) {
    ASSERT_EQ(got.size(), expected.size()) << when;
    for (const auto& [name, tensor] : expected) {
      ASSERT_TRUE(got.contains(name)) << name << when;
      EXPECT_LE((got.at(name) - tensor).abs().max().item<double>(),
                1e-5 * std::max(tensor.abs().max().item<double>(), 1e-2))
          << name << when;
    }
  }

 private:
  const int threads_before_ = at::get_num_threads();
  TemporaryFolder folder_;
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(MemoryTester);

TEST_P(MemoryTester, OffloadedEqualsResidentBitForBit) {
  std::map<int, models::NamedTensors> expected;
  auto resident = GetParam().load();
  for (int threads : {2, 1}) {
    at::set_num_threads(threads);
    expected[threads] = GetParam().run(*resident);
  }
  for (Home home : homes()) {
    for (auto type : kTypes) {
      auto model = load_from(home);
      auto check = [&](uint64_t budget, bool use_stream, int threads) {
        at::set_num_threads(threads);
        Offloading offloading =
            offload(*model, budget, home, {.offload_type = type, .use_stream = use_stream});
        const std::string when =
            fmt::format(", {} level, home {}, {} bytes, use_stream {}, {} threads",
                        type == hooks::OffloadType::leaf_level ? "leaf" : "block",
                        static_cast<int>(home), budget, use_stream, threads);
        for (int pass = 0; pass < 2; ++pass)
          expect_equal(GetParam().run(*model), expected.at(threads), when);
        EXPECT_LE(offloading->engine()->report().peak_bytes, budget) << when;
      };
      const std::vector<uint64_t> sizes = budgets(*model, home, {.offload_type = type});
      for (uint64_t budget : sizes) {
        for (bool use_stream : {true, false}) check(budget, use_stream, 1);
      }
      // An accelerator's kernels have no threads of ours.
      if (test_device().is_cpu()) check(sizes[1], true, 2);
    }
  }
}

TEST_P(MemoryTester, TablesThatAreStreamedEqualTablesWhoseRowsAreRead) {
  auto expected = GetParam().run(*GetParam().load());
  auto model = GetParam().load();
  for (auto type : kTypes) {
    const hooks::GroupOffloadingConfig config{.offload_type = type, .gather_embeddings = false};
    for (uint64_t budget : budgets(*model, Home::disk, config)) {
      Offloading offloading = offload(*model, budget, Home::disk, config);
      for (int pass = 0; pass < 2; ++pass) expect_equal(GetParam().run(*model), expected);
      EXPECT_LE(offloading->engine()->report().peak_bytes, budget);
    }
  }
}

TEST_P(MemoryTester, ParametersKeepTheirIdentity) {
  using Impls = std::vector<const c10::TensorImpl*>;
  auto impls = [](const models::Model& model) {
    Impls found;
    for (const weights::Slot& slot : weights::collect_slots(model))
      found.push_back(slot.tensor.unsafeGetTensorImpl());
    return found;
  };
  struct Watch : nn::ModuleHook {
    std::function<Impls()> look;
    Impls seen;
    void after(nn::Module&) override { seen = look(); }
  };
  auto model = GetParam().load();
  const Impls before = impls(*model);
  auto watch = std::make_shared<Watch>();
  watch->look = [&] { return impls(*model); };
  for (auto type : kTypes) {
    const uint64_t budget = budgets(*model, Home::disk, {.offload_type = type}).front();
    Offloading offloading = offload(*model, budget, Home::disk, {.offload_type = type});
    EXPECT_EQ(impls(*model), before);
    // Within the forward, too: of the last module that runs, while its weights are there.
    for (const auto& child : model->modules(/*include_self=*/false)) {
      if (auto* module = dynamic_cast<nn::Module*>(child.get())) {
        module->remove_hook("watch");  // one that two parents hold
        module->add_hook("watch", watch);
      }
    }
    watch->seen.clear();
    GetParam().run(*model);
    EXPECT_EQ(watch->seen, before);
    EXPECT_EQ(impls(*model), before);
    for (const auto& child : model->modules(/*include_self=*/false))
      if (auto* module = dynamic_cast<nn::Module*>(child.get())) module->remove_hook("watch");
    offloading->remove();
    EXPECT_EQ(impls(*model), before);
  }
}

TEST_P(MemoryTester, UnleasedSlotsAreLoud) {
  auto model = GetParam().load();
  Offloading offloading = offload(*model, kPlenty);
  GetParam().run(*model);
  offloading->client().unload();
  for (const weights::Slot& slot : weights::collect_slots(*model)) {
    EXPECT_TRUE(weights::is_stub(slot.tensor)) << slot.name();
  }
}

// state_dict(): names, shapes, dtypes and devices are those of the weights, and each value is there
// while its lease is held.
TEST_P(MemoryTester, TheStateDictIsCompleteWhileOffloaded) {
  auto resident = GetParam().load({.load_now = true});
  auto model = GetParam().load();
  for (auto type : kTypes) {
    Offloading offloading = offload(*model, kPlenty, Home::disk, {.offload_type = type});
    GetParam().run(*model);
    offloading->client().unload();
    const std::vector<weights::Slot> expected = weights::collect_slots(*resident);
    const std::vector<weights::Slot> got = weights::collect_slots(*model);
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
      const std::string& name = got[i].name();
      EXPECT_EQ(got[i].names, expected[i].names);
      EXPECT_EQ(got[i].shape(), expected[i].shape()) << name;
      EXPECT_EQ(got[i].dtype(), expected[i].dtype()) << name;
      EXPECT_EQ(got[i].tensor.device(), expected[i].tensor.device()) << name;
      offload::Lease lease = offloading->lease(name);
      if (weights::is_stub(got[i].tensor)) continue;  // a table whose rows are read
      EXPECT_TRUE(
          at::equal(got[i].tensor.detach().to(at::kCPU), expected[i].tensor.detach().to(at::kCPU)))
          << name;
    }
  }
}

TEST_P(MemoryTester, SavingWhileOffloadedSavesTheWeights) {
  auto expected = GetParam().run(*GetParam().load());
  for (auto type : kTypes) {
    auto model = GetParam().load();
    Offloading offloading = offload(*model, kPlenty, Home::disk, {.offload_type = type});
    for (bool resident_too : {false, true}) {  // nothing there, or what the last pass brought
      if (resident_too) GetParam().run(*model);
      TemporaryFolder folder;
      model->save_pretrained(folder.path());
      auto loaded = models::load_model(folder.path());
      loaded->to(test_device());
      expect_equal(GetParam().run(*loaded), expected);
    }
    expect_equal(GetParam().run(*model), expected);
  }
}

TEST_P(MemoryTester, MovingAndCastingIsRefusedWhileOffloaded) {
  auto expected = GetParam().run(*GetParam().load());
  for (auto type : kTypes) {
    auto model = GetParam().load();
    Offloading offloading = offload(*model, kPlenty, Home::disk, {.offload_type = type});
    const std::vector<std::function<void()>> moves = {
        [&] { model->to(at::kBFloat16); }, [&] { model->to(at::Device(at::kCPU)); },
        [&] { model->to(test_device(), at::kDouble); }};
    for (const auto& move : moves) {
      try {
        move();
        ADD_FAILURE() << "moved";
      } catch (const ArgumentError& error) {
        EXPECT_NE(std::string(error.what()).find("offloading is on"), std::string::npos)
            << error.what();
      }
    }
    expect_equal(GetParam().run(*model), expected);
    offloading->remove();
    model->to(at::kBFloat16);
    EXPECT_EQ(model->dtype(), at::kBFloat16);
  }
}

TEST_P(MemoryTester, GradientsEqualResidentOnes) {
  auto resident = GetParam().load({.dtype = at::kFloat, .load_now = true});
  const models::NamedTensors expected = gradients(*resident);
  ASSERT_GE(expected.size(), 4u);
  for (auto type : kTypes) {
    const hooks::GroupOffloadingConfig config{.offload_type = type, .gather_embeddings = false};
    auto model = GetParam().load({.dtype = at::kFloat});
    for (uint64_t budget : budgets(*model, Home::disk, config)) {
      Offloading offloading = offload(*model, budget, Home::disk, config);
      for (int step = 0; step < 2; ++step) {
        expect_gradients(gradients(*model), expected,
                         fmt::format(", {} bytes, step {}", budget, step));
      }
      EXPECT_LE(offloading->engine()->report().peak_bytes, budget);
    }
  }
}

}  // namespace ferry::testing
