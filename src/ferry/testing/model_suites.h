// Suites that every model passes: ModelTester, AttentionTester (and memory_suites.h's
// MemoryTester). Parameterised by ModelCase:
//
//   INSTANTIATE_TEST_SUITE_P(Flux, ModelTester, ::testing::ValuesIn(cases), case_name);
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "ferry/base/error.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/io/safetensors.h"
#include "ferry/nn/attention_dispatch.h"
#include "ferry/testing/model_case.h"
#include "ferry/weights/stub.h"

namespace ferry::testing {

// ---- ModelTester: config, save and load, determinism, dtype, missing keys ----

class ModelTester : public ::testing::TestWithParam<ModelCase> {};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ModelTester);

TEST_P(ModelTester, ConfigRoundTrips) {
  auto model = GetParam().load();
  nlohmann::ordered_json config = model->config_json();
  config["a_key_of_the_future"] = {1, "two"};
  auto again = models::make_model(model->class_name(), config);
  EXPECT_EQ(again->config_json().dump(), config.dump());  // in its order, too
}

TEST_P(ModelTester, IsDeterministic) {
  auto model = GetParam().load();
  expect_equal(GetParam().run(*model), GetParam().run(*model));
}

TEST_P(ModelTester, SavedAndLoadedGivesTheSame) {
  auto model = GetParam().load();
  auto expected = GetParam().run(*model);
  for (uint64_t shard_bytes : {uint64_t{1} << 40, uint64_t{20000}}) {
    TemporaryFolder folder;
    model->save_pretrained(folder.path(), shard_bytes);
    auto loaded = models::load_model(folder.path());
    expect_equal(GetParam().run(*loaded), expected);
  }
}

// How far bfloat16 may be off is a model's own matter: the parity test compares with Python's.
TEST_P(ModelTester, RunsInBfloat16) {
  auto model = GetParam().load({.dtype = at::kBFloat16});
  for (const auto& [name, tensor] : GetParam().run(*model)) {
    if (!at::isFloatingType(tensor.scalar_type())) continue;
    EXPECT_EQ(tensor.scalar_type(), at::kBFloat16) << name;
    EXPECT_TRUE(at::isfinite(tensor).all().item<bool>()) << name;
  }
}

TEST_P(ModelTester, TellsAllMissingAndUnexpectedKeysAtOnce) {
  auto model = GetParam().load({.load_now = true});
  TemporaryFolder folder;
  model->save_pretrained(folder.path());
  const auto path = folder.path() / (model->weights_base() + ".safetensors");
  std::vector<weights::StoredTensor> tensors = weights::Checkpoint::open_file(path)->tensors();
  ASSERT_GE(tensors.size(), 4u);
  std::vector<io::SafetensorsWriter::Entry> entries;
  std::vector<at::Tensor> values;
  for (size_t i = 2; i < tensors.size(); ++i) {  // the first two are left out
    entries.push_back({tensors[i].key, tensors[i].dtype, tensors[i].shape});
    values.push_back(weights::read_stored(tensors[i]));
  }
  entries.push_back({"nobody.knows.this", io::Dtype::F32, {1}});
  values.push_back(at::zeros({1}));
  io::SafetensorsWriter writer(path, entries);
  for (const at::Tensor& value : values)
    writer.write({static_cast<const std::byte*>(value.const_data_ptr()), value.nbytes()});
  writer.finish();
  try {
    models::load_model(folder.path());
    FAIL() << "loaded";
  } catch (const FormatError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find(tensors[0].key), std::string::npos) << text;
    EXPECT_NE(text.find(tensors[1].key), std::string::npos) << text;
    EXPECT_NE(text.find("nobody.knows.this"), std::string::npos) << text;
  }
}

TEST_P(ModelTester, WithoutWeightsTheOutputIsLoud) {
  auto loaded = GetParam().load();
  auto model = models::make_model(loaded->class_name(), loaded->config_json());
  for (const auto& [name, tensor] : GetParam().run(*model)) {
    if (at::isFloatingType(tensor.scalar_type())) {
      EXPECT_TRUE(at::isnan(tensor).any().item<bool>()) << name;
    }
  }
}

// ---- AttentionTester: backends, processors and fused projections agree ----

class AttentionTester : public ::testing::TestWithParam<ModelCase> {
 protected:
  void SetUp() override {
    model_ = GetParam().load({.dtype = at::kFloat});
    expected_ = GetParam().run(*model_);
    for (const auto& entry : model_->named_modules()) {
      if (auto* attention = dynamic_cast<nn::AttentionModule*>(entry.value().get()))
        attentions_.emplace(entry.key(), attention);
    }
  }
  // The model computes what it did at first, but for rounding.
  void expect_agreement(const std::string& what) {
    for (const auto& [name, tensor] : GetParam().run(*model_)) {
      at::Tensor reference = expected_.at(name);
      EXPECT_LT((tensor - reference).abs().max().item<double>(),
                1e-5 * std::max(1.0, reference.abs().max().item<double>()))
          << what << ": " << name;
    }
  }

  std::shared_ptr<models::Model> model_;
  models::NamedTensors expected_;
  std::map<std::string, nn::AttentionModule*> attentions_;  // by path
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(AttentionTester);

TEST_P(AttentionTester, BackendsAgree) {
  for (const char* backend : {"math", "native"}) {
    model_->set_attention_backend(backend);
    for (const auto& [path, attention] : attentions_)
      EXPECT_EQ(attention->attention_backend(), nn::parse_attention_backend(backend)) << path;
    expect_agreement(backend);
  }
  EXPECT_THROW(model_->set_attention_backend("no such backend"), ArgumentError);
}

TEST_P(AttentionTester, ProcessorsAgree) {
  std::map<std::string, std::string> defaults = model_->attn_processors();
  ASSERT_FALSE(attentions_.empty());
  ASSERT_EQ(defaults.size(), attentions_.size());
  for (const auto& [path, attention] : attentions_) {
    std::vector<std::string> available = attention->available_processors();
    ASSERT_FALSE(available.empty()) << path;
    EXPECT_EQ(available.front(), defaults.at(path)) << path << ": the default comes first";
    for (const std::string& name : available) {
      attention->set_processor(name);
      EXPECT_EQ(model_->attn_processors().at(path), name);
      expect_agreement(path + " with " + name);
    }
    attention->set_processor(available.front());
    try {
      attention->set_processor("NoSuchProcessor");
      ADD_FAILURE() << path << ": took a processor that there is not";
    } catch (const ArgumentError& error) {
      for (const std::string& name : available)
        EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
    EXPECT_EQ(attention->processor_name(), available.front());
  }
  EXPECT_EQ(model_->attn_processors(), defaults);
  EXPECT_THROW(model_->set_attn_processor("NoSuchProcessor"), ArgumentError);
}

// A class whose attention joins no projections passes as it is; that it should, the parity tool
// tells from Python's class.
TEST_P(AttentionTester, FusedProjectionsAgreeAndComeApart) {
  auto names = [&] {
    std::vector<std::string> found;
    for (const weights::Slot& slot : weights::collect_slots(*model_)) found.push_back(slot.name());
    return found;
  };
  const std::vector<std::string> apart = names();
  model_->fuse_qkv_projections();
  bool any = false;
  for (const auto& [path, attention] : attentions_) any |= attention->fused_projections();
  EXPECT_EQ(names() != apart, any);
  expect_agreement("fused");
  model_->fuse_qkv_projections();  // once more changes nothing
  expect_agreement("fused twice");
  model_->unfuse_qkv_projections();
  for (const auto& [path, attention] : attentions_)
    EXPECT_FALSE(attention->fused_projections()) << path;
  EXPECT_EQ(names(), apart);
  expect_equal(GetParam().run(*model_), expected_);
}

TEST_P(AttentionTester, FusingNeedsWeights) {
  auto model = models::make_model(model_->class_name(), model_->config_json());
  bool fuses = false;
  model_->fuse_qkv_projections();
  for (const auto& [path, attention] : attentions_) fuses |= attention->fused_projections();
  if (fuses) {
    EXPECT_THROW(model->fuse_qkv_projections(), ArgumentError);
  } else {
    EXPECT_NO_THROW(model->fuse_qkv_projections());
  }
}

}  // namespace ferry::testing
