// ferry convert: single files to folders and back.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../fixture_tensors.h"
#include "run_ferry.h"

namespace ferry {
namespace {

using ::testing::HasSubstr;
using testing_apps::ferry;
using testing_apps::Result;
using testing_io::TempFolder;
using testing_io::write_text;

const std::string kFiles = std::string(FERRY_FIXTURES) + "/quant/single_file/";

TEST(ConvertCli, FluxToAFolderAndBack) {
  TempFolder folder;
  write_text(folder / "sizes.json", R"({"axes_dims_rope": [4, 2, 2]})");
  Result result = ferry({"convert", kFiles + "flux_bfl.safetensors", "--config",
                         folder / "sizes.json", "--out", folder / "transformer"});
  ASSERT_EQ(result.code, 0) << result.err;
  auto config = testing::read_fixture_json(folder / "transformer/config.json");
  EXPECT_EQ(config["_class_name"], "FluxTransformer2DModel");
  EXPECT_EQ(config["axes_dims_rope"], (std::vector<int>{4, 2, 2}));
  EXPECT_EQ(config["guidance_embeds"], true);
  auto tensors =
      testing::read_fixture_tensors(folder / "transformer/diffusion_pytorch_model.safetensors");
  EXPECT_EQ(tensors.size(), testing::read_fixture_json(kFiles + "flux_bfl.json").size());

  result = ferry({"convert", folder / "transformer", "--out", folder / "again.safetensors"});
  ASSERT_EQ(result.code, 0) << result.err;
  auto expected = testing::read_fixture_tensors(kFiles + "flux_bfl.safetensors");
  auto again = testing::read_fixture_tensors(folder / "again.safetensors");
  EXPECT_EQ(again.size(), expected.size());
  for (const auto& [name, tensor] : again)
    EXPECT_TRUE(at::equal(tensor, expected.at("model.diffusion_model." + name))) << name;
}

TEST(ConvertCli, BlocksAreDequantizedAndMadeAgain) {
  TempFolder folder;
  Result result =
      ferry({"convert", kFiles + "t5.gguf", "--dtype", "fp32", "--out", folder / "text_encoder_2"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("text_encoder_2"));
  auto tensors = testing::read_fixture_tensors(folder / "text_encoder_2/model.safetensors");
  const std::string name = "encoder.block.0.layer.1.DenseReluDense.wo.weight";
  EXPECT_EQ(tensors.at(name).scalar_type(), at::kFloat);

  result = ferry(
      {"convert", folder / "text_encoder_2", "--gguf-type", "Q8_0", "--out", folder / "t5.gguf"});
  ASSERT_EQ(result.code, 0) << result.err;
  result = ferry({"convert", folder / "t5.gguf", "--dtype", "fp32", "--out", folder / "back"});
  ASSERT_EQ(result.code, 0) << result.err;
  auto back = testing::read_fixture_tensors(folder / "back/model.safetensors");
  EXPECT_EQ(back.size(), tensors.size());
  EXPECT_LT(testing::relative_error(back.at(name), tensors.at(name)), 0.01);
  EXPECT_FALSE(at::equal(back.at(name), tensors.at(name)));
}

TEST(ConvertCli, WrongUse) {
  TempFolder folder;
  const std::string t5 = std::string(FERRY_FIXTURES) + "/models/T5EncoderModel-0";
  struct Case {
    std::vector<std::string> arguments;
    int code;
    const char* message;
  };
  const Case cases[] = {
      {{t5, "--out", folder / "a.gguf"}, 2, "needs --gguf-type"},
      {{t5, "--gguf-type", "Q8_0", "--out", folder / "a.bin"}, 2, "has to end in .gguf"},
      {{t5, "--gguf-type", "Q9_9", "--out", folder / "a.gguf"}, 2, "Q9_9"},
      {{t5, "--gguf-type", "Q4_K", "--out", folder / "a.gguf"}, 2, "ferry writes F32"},
      {{kFiles + "t5.gguf", "--gguf-type", "Q8_0", "--out", folder / "a"}, 2, "is a file"},
      {{kFiles + "t5.gguf", "--class", "AutoencoderKL", "--out", folder / "a"}, 1, "holds no"},
      {{kFiles + "flux_bfl.gguf", "--out", folder / "a"}, 1, "axes_dims_rope"},
      {{folder / "none.gguf", "--out", folder / "a"}, 1, "none.gguf"},
  };
  for (const Case& one : cases) {
    std::vector<std::string> arguments = {"convert"};
    arguments.insert(arguments.end(), one.arguments.begin(), one.arguments.end());
    Result result = ferry(arguments);
    EXPECT_EQ(result.code, one.code) << result.err;
    EXPECT_THAT(result.err, HasSubstr(one.message));
  }
  EXPECT_EQ(folder.entries(), 0u);
}

}  // namespace
}  // namespace ferry
