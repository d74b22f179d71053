#include "ferry/ferry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/base/log_sink.h"

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

// One budget for everything; sizes decide what it leaves for weights, and may change.
TEST(Facade, OneBudgetForEverything) {
  testing_io::TempFolder cache;
  setenv("FERRY_CACHE_DIR", cache.path().c_str(), 1);
  const std::string folder = FERRY_FIXTURES "/pipelines/flux-tiny";
  PictureOptions options;
  options.prompt = "a red circle";
  options.width = 48;
  options.height = 32;
  options.steps = 2;
  options.max_sequence_length = 16;
  options.seed = 3;
  const auto expected = Pipeline::load(folder).generate(options);
  std::vector<std::string> lines;
  struct Sink {
    explicit Sink(std::vector<std::string>& lines) {
      log::set_sink([&](log::Level, std::string_view line) { lines.emplace_back(line); });
    }
    ~Sink() { log::set_sink(nullptr); }
  } sink(lines);
  for (const char* memory : {"auto", "8GiB"}) {
    lines.clear();
    auto pipeline = Pipeline::load(folder, {.memory = memory, .reserve_bytes = 64 << 20});
    EXPECT_EQ(pipeline.generate(options)[0].rgb, expected[0].rgb) << memory;
    EXPECT_EQ(pipeline.generate(options)[0].rgb, expected[0].rgb) << memory;
    EXPECT_THAT(lines, ::testing::Contains(::testing::HasSubstr("64.0 MiB reserved")))
        << "it says what it chose";
    PictureOptions wider = options;
    wider.width = 64;
    EXPECT_EQ(pipeline.generate(wider)[0].width, 64);
  }
  unsetenv("FERRY_CACHE_DIR");
  auto small = Pipeline::load(folder, {.memory = "1MiB"});
  EXPECT_THROW(small.generate(options), BudgetError);
  EXPECT_THROW(Pipeline::load(folder, {.memory = "a lot"}), ArgumentError);
  EXPECT_THROW(Pipeline::load(folder, {.weights_memory_bytes = 1 << 20, .memory = "auto"}),
               ArgumentError);
  EXPECT_THROW(Pipeline::load(folder, {.reserve_bytes = 1 << 20}), ArgumentError);
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
