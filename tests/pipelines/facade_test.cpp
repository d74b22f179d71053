#include "ferry/ferry.h"

#include <gtest/gtest.h>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"

namespace ferry {
namespace {

TEST(Facade, LoadsGeneratesAndSaves) {
  testing_io::TempFolder folder;
  auto pipeline =
      Pipeline::load(FERRY_FIXTURES "/pipelines/flux-tiny", {.weights_memory_bytes = 256 << 10});
  EXPECT_EQ(pipeline.class_name(), "FluxPipeline");
  int last = 0;
  PictureOptions options;
  options.prompt = "a red circle";
  options.width = 48;
  options.height = 32;
  options.steps = 2;
  options.max_sequence_length = 16;
  options.num_images = 2;
  options.seed = 3;
  options.on_progress = [&](const PictureProgress& p) {
    last = p.stage == "denoise" ? static_cast<int>(p.step) : last;
  };
  auto pictures = pipeline.generate(options);
  ASSERT_EQ(pictures.size(), 2u);
  EXPECT_EQ(last, 2);
  EXPECT_EQ(pictures[0].rgb.size(), 48u * 32 * 3);
  EXPECT_NE(pictures[0].rgb, pictures[1].rgb);
  EXPECT_EQ(pipeline.generate(options)[0].rgb, pictures[0].rgb);
  EXPECT_GT(pipeline.bytes_streamed(), 0u);
  pictures[0].save((folder / "a.png").string());
  EXPECT_EQ(testing_io::read_text(folder / "a.png").substr(1, 3), "PNG");
  EXPECT_THROW(pictures[0].save((folder / "a.xyz").string()), std::runtime_error);
}

TEST(Facade, TheDeviceIsChosenAtLoad) {
  const std::string folder = FERRY_FIXTURES "/pipelines/flux-tiny";
  EXPECT_NO_THROW(Pipeline::load(folder, {.device = "cpu"}));
  EXPECT_THROW(Pipeline::load(folder, {.device = "toaster"}), ArgumentError);
  EXPECT_THROW(Pipeline::load(folder, {.device = "cuda:99"}), DeviceError);
}

TEST(Facade, StopTokenStops) {
  auto pipeline = Pipeline::load(FERRY_FIXTURES "/pipelines/flux-tiny");
  std::stop_source stop;
  PictureOptions options;
  options.prompt = "a red circle";
  options.width = options.height = 32;
  options.max_sequence_length = 16;
  options.stop = stop.get_token();
  options.on_progress = [&](const PictureProgress& p) {
    if (p.stage == "denoise") stop.request_stop();
  };
  EXPECT_THROW(pipeline.generate(options), std::runtime_error);
}

}  // namespace
}  // namespace ferry
