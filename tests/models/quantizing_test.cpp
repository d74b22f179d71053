#include "ferry/models/quantizing.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "ferry/base/error.h"
#include "ferry/models/config.h"
#include "ferry/testing/model_case.h"

namespace ferry::models {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Pair;

const std::filesystem::path kFlux = FERRY_FIXTURES "/models/FluxTransformer2DModel-0";

template <class Body>
std::string message_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

void write(Quantizing& quantizing, const std::filesystem::path& folder, uint64_t shard_bytes) {
  quantizing.target().save_pretrained_from(
      [&](const weights::Slot& slot, io::SafetensorsWriter& writer) {
        quantizing.write(slot, writer);
      },
      folder, shard_bytes);
}

TEST(Quantizing, SkipsWhatIsNamedAndSaysSo) {
  auto model = load_model(kFlux);
  Quantizing quantizing(*model, {.scheme = "int8wo", .skip = {"transformer_blocks.0", "proj_out"}});
  EXPECT_THAT(quantizing.kept(), Contains(Pair("transformer_blocks.0.attn.to_q", "skipped")));
  EXPECT_THAT(quantizing.kept(), Contains(Pair("proj_out", "skipped")));
  for (const auto& [layer, reason] : quantizing.kept()) {
    // So single_transformer_blocks.0 and its proj_out are skipped too: diffusers looks for
    // "transformer_blocks.0." and "proj_out." anywhere in the name.
    EXPECT_TRUE(layer.find("transformer_blocks.0.") != std::string::npos ||
                layer.ends_with("proj_out"))
        << layer;
  }
  const auto config = quantizing.target().config_json()["quantization_config"];
  EXPECT_EQ(config["quant_method"], "torchao");
  EXPECT_EQ(config["modules_to_not_convert"].size(), 2u);
}

TEST(Quantizing, ShardsCarryTheWholeMetadata) {
  testing::TemporaryFolder folder;
  auto model = load_model(kFlux);
  Quantizing quantizing(*model, {.scheme = "int8wo"});
  write(quantizing, folder.path() / "many", 10'000);
  write(quantizing, folder.path() / "one", Model::kMaxShardSizeBytes);
  const auto index =
      read_config(folder.path() / "many/diffusion_pytorch_model.safetensors.index.json");
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path() / "many")) {
    if (entry.path().extension() != ".safetensors") continue;
    ++files;
    auto metadata = weights::Checkpoint::open_file(entry.path())->metadata();
    EXPECT_EQ(metadata.at("tensor_names"), index["metadata"]["tensor_names"]);
    EXPECT_THAT(metadata.at("proj_out.weight"), HasSubstr("Int8Tensor"));
    EXPECT_THAT(metadata.at("proj_out.bias"), HasSubstr("\"Tensor\""));
  }
  EXPECT_GT(files, 2u);
  const testing::ModelCase one{
      .name = "Flux", .folder = folder.path() / "one", .inputs = kFlux / "inputs.safetensors"};
  const testing::ModelCase many{
      .name = "Flux", .folder = folder.path() / "many", .inputs = one.inputs};
  testing::expect_equal(many.run(*many.load()), one.run(*one.load()));
}

TEST(Quantizing, RefusesWhatItCannotDo) {
  auto model = load_model(kFlux);
  auto quantize = [&](const QuantizeOptions& options) {
    return message_of([&] { Quantizing(*model, options); });
  };
  EXPECT_THAT(quantize({.scheme = "int9"}), HasSubstr("int8wo"));
  EXPECT_THAT(quantize({.scheme = "fp8wo", .group_size = 32}), HasSubstr("has no groups"));
  EXPECT_THAT(quantize({.scheme = "int8wo", .skip = {"no_such_layer"}}),
              HasSubstr("'no_such_layer' names no linear layer"));

  testing::TemporaryFolder folder;
  Quantizing quantizing(*model, {.scheme = "int8wo"});
  write(quantizing, folder.path() / "quantized", Model::kMaxShardSizeBytes);
  auto quantized = load_model(folder.path() / "quantized");
  EXPECT_THAT(message_of([&] { Quantizing(*quantized, {.scheme = "int8wo"}); }),
              HasSubstr("is quantized already"));
  EXPECT_THAT(message_of([&] {
                quantized->load_weights();
                quantized->fuse_qkv_projections();
              }),
              HasSubstr("quantized projections stay apart"));
}

TEST(Quantizing, AStopLeavesNothingBehind) {
  testing::TemporaryFolder folder;
  auto model = load_model(kFlux);
  StopSource stop;
  size_t layers = 0;
  QuantizeOptions options{.scheme = "int8wo", .stop = stop.token()};
  options.on_layer = [&](const QuantizedLayer&, size_t) {
    if (++layers == 3) stop.request_stop();
  };
  Quantizing quantizing(*model, options);
  EXPECT_THROW(write(quantizing, folder.path() / "stopped", Model::kMaxShardSizeBytes), Cancelled);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path() / "stopped"));
}

}  // namespace
}  // namespace ferry::models
