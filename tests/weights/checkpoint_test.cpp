#include "ferry/weights/checkpoint.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <torch/nn/module.h>

#include <filesystem>
#include <fstream>

#include "../widening_encoding.h"
#include "ferry/base/error.h"
#include "ferry/weights/binding.h"
#include "ferry/weights/stub.h"

namespace ferry::weights {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

class CheckpointTest : public testing::Test {
 protected:
  CheckpointTest() {
    std::string name = testing::TempDir() + "/checkpoint.XXXXXX";
    folder_ = ::mkdtemp(name.data());
  }
  ~CheckpointTest() override { fs::remove_all(folder_); }

  // Tensors of ones times `value`, float32.
  void write(const std::string& file,
             const std::vector<std::pair<std::string, std::vector<int64_t>>>& tensors,
             float value = 1) {
    std::vector<io::SafetensorsWriter::Entry> entries;
    for (const auto& [name, shape] : tensors) entries.push_back({name, io::Dtype::F32, shape});
    io::SafetensorsWriter writer(folder_ / file, entries);
    for (const auto& entry : tensors) {
      at::Tensor tensor = at::full(entry.second, value);
      writer.write({static_cast<const std::byte*>(tensor.const_data_ptr()),
                    static_cast<size_t>(tensor.nbytes())});
    }
    writer.finish();
  }
  void write_index(const std::string& weight_map) {
    std::ofstream(folder_ / "model.safetensors.index.json")
        << R"({"metadata":{},"weight_map":)" << weight_map << "}";
  }
  template <class E>
  std::string open_error() {
    try {
      Checkpoint::open_folder(folder_, "model");
    } catch (const E& error) {
      return error.what();
    }
    return "no error";
  }

  fs::path folder_;
};

TEST_F(CheckpointTest, ShardsAndVariants) {
  write("model-00001-of-00002.safetensors", {{"a", {2}}});
  write("model-00002-of-00002.safetensors", {{"b", {3}}});
  write_index(R"({"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"})");
  write("model.fp16.safetensors", {{"a", {4}}});
  auto checkpoint = Checkpoint::open_folder(folder_, "model");
  EXPECT_EQ(checkpoint->tensors().size(), 2u);
  EXPECT_EQ(checkpoint->find("b")->shape, std::vector<int64_t>{3});
  EXPECT_EQ(checkpoint->find("c"), nullptr);
  EXPECT_EQ(checkpoint->total_bytes(), 20u);
  EXPECT_EQ(Checkpoint::open_folder(folder_, "model", "fp16")->find("a")->shape,
            std::vector<int64_t>{4});
}

TEST_F(CheckpointTest, WhatIsWrongWithAFolderIsSaid) {
  EXPECT_THAT(open_error<IoError>(),
              AllOf(HasSubstr("model.safetensors"), HasSubstr("no weights")));
  write("one.safetensors", {{"a", {2}}});
  write_index(R"({"a":"one.safetensors","b":"two.safetensors"})");
  EXPECT_THAT(open_error<IoError>(), HasSubstr("two.safetensors is missing"));
  write("two.safetensors", {{"c", {2}}});
  EXPECT_THAT(open_error<FormatError>(), HasSubstr("\"b\" should be in two.safetensors"));
  write("two.safetensors", {{"a", {2}}, {"b", {2}}});
  EXPECT_THAT(open_error<FormatError>(), HasSubstr("\"a\" is in two shards"));
  for (const char* map : {R"({"a":"../one.safetensors"})", R"({"a":"/etc/passwd"})", R"({"a":""})",
                          R"({"a":3})", "[]"}) {
    write_index(map);
    EXPECT_NE(open_error<FormatError>(), "no error") << map;
  }
}

TEST_F(CheckpointTest, OfTensorsFindsThemByKey) {
  write("model.safetensors", {{"a", {2}}, {"b", {3}}});
  auto source = Checkpoint::open_folder(folder_, "model");
  std::vector<StoredTensor> tensors = source->tensors();
  tensors[1].key = "c";
  auto other = Checkpoint::of_tensors(tensors, {{"made", "here"}}, source->files());
  EXPECT_EQ(other->find("c")->shape, std::vector<int64_t>{3});
  EXPECT_EQ(other->find("b"), nullptr);
  EXPECT_EQ(other->metadata().at("made"), "here");
  EXPECT_EQ(other->files(), source->files());
  tensors[1].key = "a";
  EXPECT_THROW(Checkpoint::of_tensors(tensors, {}, source->files()), FormatError);
}

struct Model : torch::nn::Module {
  at::Tensor a = register_parameter("a", make_stub({2, 3}, at::kFloat), false);
  at::Tensor b = register_parameter("b", make_stub({4}, at::kFloat), false);
  at::Tensor c = register_parameter("c", make_stub({5}, at::kFloat), false);
};

TEST_F(CheckpointTest, BindTellsEverythingAtOnce) {
  write("model.safetensors", {{"a", {3, 2}}, {"b", {4}}, {"x.y", {1}}});
  Model model;
  try {
    weights::bind(model, Checkpoint::open_folder(folder_, "model"));
    FAIL() << "bound";
  } catch (const FormatError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("missing keys (1):\n    c"), HasSubstr("x.y"),
                                    HasSubstr("a: got [3, 2], expected [2, 3]")));
  }
  EXPECT_TRUE(is_stub(model.b)) << "a refused checkpoint changes nothing";
}

TEST_F(CheckpointTest, BindingMapsCastsAndLoads) {
  write("model.safetensors", {{"old.a", {2, 3}}, {"old.b", {4}}, {"dropped", {1}}}, 7);
  Model model;
  BindOptions options;
  options.map_key = [](const std::string& key) { return key == "dropped" ? "" : key.substr(4); };
  options.dtype = [](const std::string& slot, at::ScalarType stored) {
    return slot == "a" ? at::kBFloat16 : stored;
  };
  options.may_be_missing = [](const std::string& slot) { return slot == "c"; };
  auto binding = weights::bind(model, Checkpoint::open_folder(folder_, "model"), options);
  EXPECT_EQ(model.a.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(is_stub(model.a)) << "binding reads nothing";
  auto engine = io::make_read_engine();
  load_resident(*binding, *engine);
  EXPECT_TRUE(model.a.equal(at::full({2, 3}, 7, at::kBFloat16)));
  EXPECT_TRUE(model.b.equal(at::full({4}, 7, at::kFloat)));
  EXPECT_TRUE(is_stub(model.c));
}

// Every way to read a tensor decodes one that is stored encoded.
TEST_F(CheckpointTest, EncodedTensorsAreDecoded) {
  std::vector<at::Tensor> values = {at::randn({2, 3}).to(at::kBFloat16),
                                    at::randn({4}).to(at::kBFloat16)};
  io::SafetensorsWriter writer(
      folder_ / "model.safetensors",
      {{"a", io::Dtype::BF16, {2, 3}}, {"b", io::Dtype::BF16, {4}}, {"c", io::Dtype::BF16, {0}}});
  for (const at::Tensor& value : values) {
    writer.write({static_cast<const std::byte*>(value.const_data_ptr()),
                  static_cast<size_t>(value.nbytes())});
  }
  writer.finish();
  Model model;
  BindOptions options;
  options.may_be_missing = [](const std::string& slot) { return slot == "c"; };
  options.map_key = [](const std::string& key) { return key == "c" ? "" : key; };
  auto checkpoint = Checkpoint::open_folder(folder_, "model");
  auto binding = weights::bind(model, checkpoint, options);
  model.a.set_data(make_stub({2, 3}, at::kFloat));  // as stored
  model.b.set_data(make_stub({4}, at::kHalf));      // cast
  for (BoundSlot& bound : binding->slots) bound.source = widened(bound.source);
  EXPECT_EQ(binding->slots[0].source.size_bytes, 12u);
  EXPECT_EQ(binding->slots[0].source.plain_bytes(), 24u);
  EXPECT_EQ(checkpoint->find("a")->plain_bytes(), 12u);
  EXPECT_TRUE(read_stored(binding->slots[0].source).equal(values[0].to(at::kFloat)));
  EXPECT_TRUE(read_tensor(binding->slots[1]).equal(values[1].to(at::kHalf)));
  EXPECT_EQ(read_stored(widened(*checkpoint->find("c"))).numel(), 0);
  auto engine = io::make_read_engine();
  load_resident(*binding, *engine);
  EXPECT_TRUE(model.a.equal(values[0].to(at::kFloat)));
  EXPECT_TRUE(model.b.equal(values[1].to(at::kHalf)));

  model.a.set_data(make_stub({2, 3}, at::kFloat));
  binding->slots[0].source = widened(*checkpoint->find("a"), /*damaged=*/true);
  EXPECT_THROW(load_resident(*binding, *engine), FormatError);
  EXPECT_TRUE(is_stub(model.a));
}

}  // namespace
}  // namespace ferry::weights
