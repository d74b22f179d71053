#include "ferry/offload/hardware.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include <fstream>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"

namespace ferry::offload {
namespace {

using testing_io::TempFolder;

TEST(Hardware, EveryPresetStatesWhereItsFiguresComeFrom) {
  for (const Hardware& hardware : hardware_presets()) {
    SCOPED_TRACE(hardware.name);
    EXPECT_GT(hardware.source.size(), 40u);
    EXPECT_FALSE(hardware.description.empty());
    EXPECT_GT(hardware.memory_bytes, 4ull << 30);
    EXPECT_TRUE(hardware.rates().known());
    EXPECT_GT(hardware.bf16_flops, 1e12);
    EXPECT_EQ(parse_hardware(hardware.name).description, hardware.description);
    // The link is slower than the memory behind it and faster than a disk.
    if (hardware.link_bytes_per_s > 0) {
      EXPECT_GT(hardware.link_bytes_per_s, hardware.disk_bytes_per_s);
      EXPECT_LT(hardware.link_bytes_per_s, hardware.memory_bytes_per_s);
    }
  }
}

TEST(Hardware, AnotherDisk) {
  const Hardware hardware = parse_hardware("rtx-4060,sata");
  EXPECT_EQ(hardware.disk_bytes_per_s, 0.56e9);
  EXPECT_EQ(hardware.link_bytes_per_s, parse_hardware("rtx-4060").link_bytes_per_s);
  // 8 lanes of 1.97 GB/s, 0.8 of it.
  EXPECT_NEAR(hardware.link_bytes_per_s, 12.6e9, 0.05e9);
}

TEST(Hardware, ComputeIsBoundByOperationsOrByReadingWeights) {
  Hardware hardware;
  hardware.bf16_flops = 100e12;
  hardware.flops_efficiency = 0.5;
  hardware.memory_bytes_per_s = 1e12;
  EXPECT_DOUBLE_EQ(hardware.compute_s(50e12, 1'000'000), 1.0);
  EXPECT_DOUBLE_EQ(hardware.compute_s(1, 2'000'000'000), 0.002);
}

TEST(Hardware, FilesGoBothWays) {
  TempFolder folder;
  const std::string path = (folder.path() / "mine.json").string();
  std::ofstream(path)
      << R"({"preset": "rtx-3090", "memory_bytes": "20GiB", "disk_bytes_per_s": "5GB/s"})";
  const Hardware mine = parse_hardware(path);
  EXPECT_EQ(mine.name, "mine");
  EXPECT_EQ(mine.memory_bytes, 20ull << 30);
  EXPECT_EQ(mine.disk_bytes_per_s, 5e9);
  EXPECT_EQ(mine.bf16_flops, parse_hardware("rtx-3090").bf16_flops);

  const std::string again = (folder.path() / "again.json").string();
  std::ofstream(again) << to_json(mine).dump();
  Hardware read = parse_hardware(again);
  read.name = mine.name;
  EXPECT_EQ(to_json(read), to_json(mine));
}

TEST(Hardware, WrongInputIsNamed) {
  TempFolder folder;
  auto message = [&](const std::string& text) {
    const std::string path = (folder.path() / "bad.json").string();
    std::ofstream(path) << text;
    try {
      parse_hardware(path);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_THAT(message(R"({"disk": 1})"), testing::HasSubstr("'disk' is unknown"));
  EXPECT_THAT(message(R"({"memory_bytes": -1})"), testing::HasSubstr("memory_bytes: expected"));
  EXPECT_THAT(message(R"({"disk_bytes_per_s": [1]})"), testing::HasSubstr("disk_bytes_per_s"));
  EXPECT_THAT(message(R"({})"), testing::HasSubstr("must be given"));
  EXPECT_THAT(message("{"), testing::HasSubstr("bad.json"));
  for (const char* text : {"gtx-1", "rtx-4060,tape"}) {
    try {
      parse_hardware(text);
      FAIL() << "accepted " << text;
    } catch (const ArgumentError& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr("rtx-4090"));
      EXPECT_THAT(error.what(), testing::HasSubstr("nvme-7"));
    }
  }
}

}  // namespace
}  // namespace ferry::offload
