#include "ferry/offload/measurements.h"

#include <gtest/gtest.h>

#include <fstream>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"

namespace ferry::offload {
namespace {

using testing_io::TempFolder;

MeasurementKey key_of(int64_t width) {
  return {.component = "abc-123",
          .device = "cpu",
          .dtype = "bf16",
          .width = width,
          .height = 64,
          .text_tokens = 77};
}

TEST(Measurements, AreKeptByComponentResolutionAndDtype) {
  TempFolder folder;
  const std::filesystem::path below = folder / "a/b";
  EXPECT_FALSE(Measurements(below).find(key_of(64)));
  Measurements(below).store(key_of(64), {1000, {{"block.0", 0.5}, {"block.1", 0.25}}});
  Measurements(below).store(key_of(128), {2000, {}});
  const Measurements again(below);
  ASSERT_TRUE(again.find(key_of(64)));
  EXPECT_EQ(again.find(key_of(64))->activation_bytes, 1000u);
  EXPECT_EQ(again.find(key_of(64))->compute_s.at("block.1"), 0.25);
  EXPECT_EQ(again.find(key_of(128))->activation_bytes, 2000u);
  for (auto change :
       {+[](MeasurementKey& k) { k.dtype = "fp32"; }, +[](MeasurementKey& k) { k.tiled = true; },
        +[](MeasurementKey& k) { k.threads = 2; }, +[](MeasurementKey& k) { k.batch = 2; },
        +[](MeasurementKey& k) { k.device = "cuda"; },
        +[](MeasurementKey& k) { k.text_tokens = 512; },
        +[](MeasurementKey& k) { k.component = "abd"; }}) {
    MeasurementKey other = key_of(64);
    change(other);
    EXPECT_FALSE(again.find(other));
  }
}

TEST(Measurements, ThePeakNeverShrinksAndTimesAreTheLast) {
  TempFolder folder;
  const Measurements measurements(folder.path());
  measurements.store(key_of(64), {1000, {{"g", 1.0}}});
  measurements.store(key_of(64), {600, {{"g", 2.0}}});
  EXPECT_EQ(measurements.find(key_of(64))->activation_bytes, 1000u);
  EXPECT_EQ(measurements.find(key_of(64))->compute_s.at("g"), 2.0);
}

TEST(Measurements, ABrokenOrForeignFileCountsAsAbsent) {
  TempFolder folder;
  const Measurements measurements(folder.path());
  for (const char* text : {"{", "[]", R"({"version": 99, "entries": {}})", R"({"version": "x"})",
                           R"({"version": 1, "entries": 3})", ""}) {
    std::ofstream(folder / "abc-123.json") << text;
    EXPECT_FALSE(measurements.find(key_of(64))) << text;
  }
  measurements.store(key_of(64), {5, {}});
  EXPECT_EQ(measurements.find(key_of(64))->activation_bytes, 5u);
  for (const char* name : {"", "../x", ".x", "a/b"}) {
    MeasurementKey bad = key_of(64);
    bad.component = name;
    EXPECT_THROW(measurements.store(bad, {}), ArgumentError) << name;
  }
}

TEST(Measurements, GroupsThatWereNotMeasuredAreScaled) {
  std::vector<GroupCost> groups(3);
  for (size_t i = 0; i < 3; ++i) {
    groups[i].name = std::to_string(i);
    groups[i].compute_s = 1 + static_cast<double>(i);
  }
  groups = with_measured_times(groups, {{"0", 3.0}, {"1", 6.0}, {"elsewhere", 9.0}});
  EXPECT_EQ(groups[0].compute_s, 3.0);
  EXPECT_EQ(groups[1].compute_s, 6.0);
  EXPECT_EQ(groups[2].compute_s, 9.0);
}

}  // namespace
}  // namespace ferry::offload
