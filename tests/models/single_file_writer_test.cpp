#include "ferry/models/single_file_writer.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../fixture_tensors.h"
#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/models/single_file.h"
#include "ferry/weights/binding.h"

namespace ferry::models {
namespace {

using namespace ferry::testing_io;
using io::GgmlType;
using nlohmann::ordered_json;
using ::testing::HasSubstr;

std::filesystem::path file(const std::string& name) {
  return std::string(FERRY_FIXTURES) + "/quant/single_file/" + name;
}

std::string folder(const std::string& name) {
  return std::string(FERRY_FIXTURES) + "/models/" + name;
}

// The way there and back: the tensors of the file that Python's converter was held against.
TEST(SingleFileWriter, SafetensorsAsTheFileThatWasRead) {
  struct Case {
    const char* name;
    ordered_json config;
    std::string prefix;
  };
  const Case cases[] = {
      {"flux_bfl.safetensors", {{"axes_dims_rope", {4, 2, 2}}}, "model.diffusion_model."},
      {"ae_ldm.safetensors", {{"norm_num_groups", 2}}, ""}};
  TempFolder out;
  for (const Case& one : cases) {
    auto model = load_single_file(file(one.name), {}, "", one.config);
    size_t reported = 0;
    WriteSingleFileOptions options;
    options.on_tensor = [&](size_t done, size_t count) { reported += done <= count; };
    write_single_file(*model, out / one.name, options);
    auto expected = ferry::testing::read_fixture_tensors(file(one.name));
    auto written = ferry::testing::read_fixture_tensors(out / one.name);
    EXPECT_EQ(written.size(), expected.size());
    EXPECT_EQ(reported, expected.size());
    for (const auto& [name, tensor] : written) {
      ASSERT_TRUE(expected.contains(one.prefix + name)) << name;
      EXPECT_TRUE(at::equal(tensor, expected.at(one.prefix + name))) << name;
    }
  }
}

// A folder of diffusers as GGUF, opened again: the same names, and values within a step.
TEST(SingleFileWriter, GgufOfEachType) {
  TempFolder out;
  auto t5 = load_model(folder("T5EncoderModel-0"));
  std::map<std::string, at::Tensor> exact;
  for (const weights::BoundSlot& bound : t5->binding()->slots)
    exact[bound.slot.name()] = weights::read_tensor(bound);
  for (GgmlType type : {GgmlType::F16, GgmlType::BF16, GgmlType::Q8_0, GgmlType::Q4_0}) {
    write_single_file(*t5, out / "t5.gguf", {.gguf_type = type});
    SingleFile single = open_single_file(out / "t5.gguf");
    EXPECT_EQ(single.class_name, "T5EncoderModel");
    EXPECT_EQ(*io::find_value(single.gguf, "general.architecture")->as_string(), "t5encoder");
    const ordered_json config = t5->config_json();
    for (const char* key : {"d_ff", "d_kv", "d_model", "num_heads", "num_layers", "vocab_size",
                            "layer_norm_epsilon", "feed_forward_proj"}) {
      EXPECT_EQ(single.config[key], config[key]) << key;
    }
    // Rows of 24 are no whole blocks: what does not fit is F16, and nothing is lost there.
    const bool has_blocks = io::block_elements(type) > 1;
    EXPECT_EQ(single.weights.quantized.empty(), true) << "24 columns";
    for (const weights::StoredTensor& stored : single.weights.plain) {
      at::Tensor values = weights::read_stored(stored);
      const double bound = type == GgmlType::BF16 ? 1e-2 : 1e-3;
      EXPECT_LT(ferry::testing::relative_error(values, exact.at(stored.key)), bound) << stored.key;
      if (values.numel() <= 1024 || values.dim() == 1) {
        EXPECT_EQ(values.scalar_type(), at::kFloat) << stored.key;
      } else if (has_blocks) {
        EXPECT_EQ(values.scalar_type(), at::kHalf) << stored.key;
      }
    }
  }
}

TEST(SingleFileWriter, BlocksOfFlux) {
  TempFolder out;
  // Dequantized weights of a model whose rows are whole blocks.
  SingleFile source = open_single_file(file("flux_bfl.gguf"));
  dequantize_when_read(source, io::Dtype::F32);
  LoadOptions load;
  load.dtype = at::kFloat;
  auto model = bind_single_file(std::move(source), load, {{"axes_dims_rope", {8, 4, 4}}});
  std::map<std::string, at::Tensor> exact;
  for (const weights::BoundSlot& bound : model->binding()->slots)
    exact[bound.slot.name()] = weights::read_tensor(bound);
  const std::pair<GgmlType, double> types[] = {{GgmlType::Q8_0, 0.02},
                                               {GgmlType::Q5_1, 0.1},
                                               {GgmlType::Q5_0, 0.1},
                                               {GgmlType::Q4_1, 0.2},
                                               {GgmlType::Q4_0, 0.2}};
  for (const auto& [type, bound] : types) {
    write_single_file(*model, out / "flux.gguf", {.gguf_type = type});
    SingleFile single = open_single_file(out / "flux.gguf");
    EXPECT_EQ(single.weights.quantized.size() + single.weights.plain.size(), exact.size());
    EXPECT_GT(single.weights.quantized.size(), 25u);
    for (const auto& [name, quantized] : single.weights.quantized) {
      EXPECT_EQ(quantized.weight->scheme(), fmt::format("GGUF {}", io::name(type)));
      std::vector<at::Tensor> blocks{weights::read_stored(quantized.components[0])};
      at::Tensor values = quantized.weight->dequantize(blocks, at::kFloat);
      EXPECT_LT(ferry::testing::relative_error(values, exact.at(name)), bound) << name;
    }
  }
}

TEST(SingleFileWriter, RefusesWhatItDoesNotWrite) {
  TempFolder out;
  auto error = [&](Model& model, WriteSingleFileOptions options) {
    return error_of<ArgumentError>([&] { write_single_file(model, out / "a", options); });
  };
  auto clip = load_model(folder("CLIPTextModel-0"));
  EXPECT_THAT(error(*clip, {}), HasSubstr("CLIPTextModel: ferry writes single files of Flux"));
  auto t5 = load_model(folder("T5EncoderModel-0"));
  EXPECT_THAT(error(*t5, {.gguf_type = GgmlType::Q4_K}), HasSubstr("GGUF Q4_K: ferry writes F32"));
  auto autoencoder = load_model(folder("AutoencoderKL-0"));
  EXPECT_THAT(error(*autoencoder, {.gguf_type = GgmlType::F16}), HasSubstr("AutoencoderKL"));
  auto blocks = load_single_file(file("t5.gguf"));
  EXPECT_THAT(error(*blocks, {}), HasSubstr("part of a quantized weight"));
  StopSource stop;
  stop.request_stop();
  EXPECT_THROW(write_single_file(*t5, out / "a", {.stop = stop.token()}), Cancelled);
  EXPECT_EQ(out.entries(), 0u);
}

}  // namespace
}  // namespace ferry::models
