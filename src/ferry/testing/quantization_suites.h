// QuantizationTester: every model in every scheme that ferry quantizes to. A quantized model loads
// and is as small as its scheme promises, computes near what the plain one does, saves and loads
// again unchanged, keeps its components' dtypes and identity, and streams bit for bit as it
// computes resident. Parameterised by model and scheme.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/models/quantizing.h"
#include "ferry/nn/linear.h"
#include "ferry/testing/model_case.h"
#include "ferry/weights/stub.h"

namespace ferry::testing {

// What a scheme promises.
struct SchemeCase {
  std::string scheme;
  int64_t group_size;        // 0: the scheme's
  double bits;               // a value,
  double bytes_a_row;        // and beside the values, at most: a row,
  double bytes_a_group;      // a group of values (group_size, or 64 where that is 0),
  double bytes_a_weight;     // a weight
  double least_weight_sqnr;  // in decibels, of each layer's weight
  double least_output_sqnr;  // of the model's outputs, against the plain model's

  friend void PrintTo(const SchemeCase& value, std::ostream* out) { *out << value.scheme; }
};

// Scheme, group size; bits a value, and bytes a row, group and weight of float32; the ratios of
// signal to noise that its arithmetic gives normal weights (about 6 dB a bit, less what the row's
// peak costs) and that a tiny model's output keeps of them.
inline const std::vector<SchemeCase>& scheme_cases() {
  static const std::vector<SchemeCase> cases = {
      {"int8wo", 0, 8, 5, 0, 0, 35, 25}, {"int8da8w", 0, 8, 5, 0, 0, 35, 20},
      {"fp8wo", 0, 8, 4, 0, 0, 25, 20},  {"fp8da8w", 0, 8, 4, 0, 0, 25, 15},
      {"int4wo", 8, 4, 0, 8, 0, 15, 8},  {"nf4", 64, 4, 0, 4, 64, 15, 8},
  };
  return cases;
}

// What one fixture of a class shows, the others would.
inline std::vector<ModelCase> one_of_each_class(const std::filesystem::path& folder) {
  std::vector<ModelCase> cases = cases_in(folder);
  std::erase_if(cases, [](const ModelCase& one) { return !one.name.ends_with("0"); });
  return cases;
}

inline std::string quantization_case_name(
    const ::testing::TestParamInfo<std::tuple<ModelCase, SchemeCase>>& info) {
  return std::get<0>(info.param).name + "_" + std::get<1>(info.param).scheme;
}

inline double output_sqnr_db(const models::NamedTensors& got,
                             const models::NamedTensors& expected) {
  double signal = 0, noise = 0;
  for (const auto& [name, tensor] : expected) {
    if (!at::isFloatingType(tensor.scalar_type())) continue;
    signal += tensor.to(at::kDouble).square().sum().item<double>();
    noise += (tensor.to(at::kDouble) - got.at(name).to(at::kDouble)).square().sum().item<double>();
  }
  return 10 * std::log10(signal / noise);
}

class QuantizationTester : public ::testing::TestWithParam<std::tuple<ModelCase, SchemeCase>> {
 protected:
  QuantizationTester() { at::set_num_threads(1); }
  ~QuantizationTester() override { at::set_num_threads(threads_before_); }

  const ModelCase& model_case() const { return std::get<0>(GetParam()); }
  const SchemeCase& scheme() const { return std::get<1>(GetParam()); }
  models::QuantizeOptions options() const {
    return {.scheme = scheme().scheme, .group_size = scheme().group_size};
  }

  // The quantized folder; empty where no layer of the model fits the scheme.
  std::filesystem::path quantized_folder(std::vector<models::QuantizedLayer>* layers = nullptr) {
    std::filesystem::path folder = folder_.path() / "quantized";
    auto model = models::load_model(model_case().folder);
    std::unique_ptr<models::Quantizing> quantizing;
    try {
      quantizing = std::make_unique<models::Quantizing>(*model, options());
    } catch (const ArgumentError&) {
      return {};
    }
    quantizing->target().save_pretrained_from(
        [&](const weights::Slot& slot, io::SafetensorsWriter& writer) {
          quantizing->write(slot, writer);
        },
        folder);
    if (layers) *layers = quantizing->layers();
    return folder;
  }
  // On test_device().
  static std::shared_ptr<models::Model> load(const std::filesystem::path& folder) {
    auto model = models::load_model(folder);
    model->to(test_device());
    return model;
  }
  static std::map<std::string, nn::Linear*> quantized_layers(models::Model& model) {
    std::map<std::string, nn::Linear*> layers;
    for (const auto& entry : model.named_modules()) {
      auto* linear = dynamic_cast<nn::Linear*>(entry.value().get());
      if (linear && linear->quantized_weight()) layers.emplace(entry.key(), linear);
    }
    return layers;
  }

  // The least under which the model runs.
  static uint64_t a_tight_budget(models::Model& model, offload::EngineOptions options,
                                 hooks::GroupOffloadingConfig config) {
    options.weights_memory_bytes = 0;
    config.use_stream = false;
    return hooks::apply_group_offloading(model, model.binding(),
                                         std::make_shared<offload::Engine>(options), config)
        ->client()
        .plan()
        .peak_bytes();
  }

  TemporaryFolder folder_;

 private:
  int threads_before_ = at::get_num_threads();
};

TEST_P(QuantizationTester, LoadsAsSmallAsPromised) {
  std::vector<models::QuantizedLayer> layers;
  const auto folder = quantized_folder(&layers);
  if (folder.empty()) GTEST_SKIP() << "no layer fits";
  auto model = load(folder);
  const auto quantized = quantized_layers(*model);
  ASSERT_EQ(quantized.size(), layers.size());
  for (const auto& [name, layer] : quantized) {
    const auto rows = static_cast<double>(layer->out_features());
    const double values = rows * static_cast<double>(layer->in_features());
    const auto group = static_cast<double>(scheme().group_size > 0 ? scheme().group_size : 64);
    EXPECT_LE(static_cast<double>(layer->quantized_weight()->size_bytes()),
              std::ceil(values * scheme().bits / 8) + rows * scheme().bytes_a_row +
                  std::ceil(values / group) * scheme().bytes_a_group + scheme().bytes_a_weight)
        << name;
    EXPECT_FALSE(layer->weight.defined()) << name;
  }
  for (const models::QuantizedLayer& layer : layers)
    EXPECT_GE(layer.sqnr_db, scheme().least_weight_sqnr) << layer.name;
}

TEST_P(QuantizationTester, ComputesNearThePlainModel) {
  const auto folder = quantized_folder();
  if (folder.empty()) GTEST_SKIP() << "no layer fits";
  auto plain = model_case().load();
  auto model = load(folder);
  const double sqnr = output_sqnr_db(model_case().run(*model), model_case().run(*plain));
  RecordProperty("output_sqnr_db", std::to_string(sqnr));
  EXPECT_GE(sqnr, scheme().least_output_sqnr);
}

TEST_P(QuantizationTester, SavesAndLoadsAgain) {
  const auto folder = quantized_folder();
  if (folder.empty()) GTEST_SKIP() << "no layer fits";
  auto model = load(folder);
  const auto expected = model_case().run(*model);
  model->save_pretrained(folder_.path() / "again");
  auto again = load(folder_.path() / "again");
  expect_equal(model_case().run(*again), expected);
  EXPECT_EQ(again->config_json().dump(), model->config_json().dump());
}

TEST_P(QuantizationTester, CastsAndMovesLeaveComponentsAlone) {
  const auto folder = quantized_folder();
  if (folder.empty()) GTEST_SKIP() << "no layer fits";
  auto model = load(folder);
  std::map<std::string, std::vector<at::ScalarType>> before;
  for (const auto& [name, layer] : quantized_layers(*model)) {
    for (const at::Tensor& component : layer->components())
      before[name].push_back(component.scalar_type());
  }
  model->to(at::kBFloat16);
  model->to(at::Device(at::kCPU));
  for (const auto& [name, layer] : quantized_layers(*model)) {
    for (size_t i = 0; i < layer->components().size(); ++i)
      EXPECT_EQ(layer->components()[i].scalar_type(), before[name][i]) << name;
    if (layer->bias.defined()) {
      EXPECT_EQ(layer->bias.scalar_type(), at::kBFloat16);
    }
  }
  EXPECT_EQ(model->dtype(), at::kBFloat16);
}

// The components are slots as any: nothing here is about quantization but the model.
TEST_P(QuantizationTester, StreamsAsItComputesResident) {
  const auto folder = quantized_folder();
  if (folder.empty()) GTEST_SKIP() << "no layer fits";
  auto resident = load(folder);
  const auto expected = model_case().run(*resident);
  for (auto type : {hooks::OffloadType::leaf_level, hooks::OffloadType::block_level}) {
    for (bool host : {false, true}) {
      if (host && test_device().is_cpu()) continue;
      auto model = load(folder);
      std::vector<const c10::TensorImpl*> identities;
      for (const weights::Slot& slot : weights::collect_slots(*model))
        identities.push_back(slot.tensor.unsafeGetTensorImpl());
      offload::EngineOptions options;
      options.device = test_device();
      options.host_memory_bytes = host ? offload::EngineOptions::kAllWeights : 0;
      options.preferred_arena_bytes = 64 << 10;
      options.small_slot_bytes = 0;
      const hooks::GroupOffloadingConfig config{.offload_type = type};
      options.weights_memory_bytes = a_tight_budget(*model, options, config);
      auto offloading = hooks::apply_group_offloading(
          *model, model->binding(), std::make_shared<offload::Engine>(options), config);
      const std::string when = fmt::format(
          " ({}, {})", type == hooks::OffloadType::leaf_level ? "leaf_level" : "block_level",
          host ? "host" : "disk");
      for (int pass = 0; pass < 2; ++pass) expect_equal(model_case().run(*model), expected, when);
      size_t i = 0, streamed = 0;
      for (const weights::Slot& slot : weights::collect_slots(*model)) {
        EXPECT_EQ(slot.tensor.unsafeGetTensorImpl(), identities[i++]) << slot.name() << when;
        streamed += weights::is_stub(slot.tensor);
      }
      EXPECT_GT(streamed, 0u) << "nothing was streamed" << when;
    }
  }
}

TEST_P(QuantizationTester, OnTheFlyEqualsTheFolder) {
  const auto folder = quantized_folder();
  if (folder.empty()) GTEST_SKIP() << "no layer fits";
  auto expected = model_case().run(*load(folder));
  for (int time = 0; time < 2; ++time) {  // made, then found in the cache
    auto model = model_case().load({.quantize = options()});
    expect_equal(model_case().run(*model), expected);
  }
}

}  // namespace ferry::testing
