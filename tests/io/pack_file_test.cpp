#include "ferry/io/pack_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "ferry/io/safetensors.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using testing::HasSubstr;

PackManifest example() {
  PackManifest manifest;
  manifest.recipe = "a recipe";
  manifest.sources = {{"a.safetensors", {1, 2, 3, -4}, "abc"}};
  manifest.metadata = {{"format", "pt"}};
  manifest.tensors = {{"w", Dtype::BF16, {3, 4}, PackCoding::raw, 4096, 24, 7},
                      {"b", Dtype::F32, {0}, PackCoding::raw, 8192, 0, 8},
                      {"v", Dtype::F32, {10, 10}, PackCoding::planes, 8192, 300, 9}};
  return manifest;
}

// A pack of zeros around the manifest.
std::string file_of(const PackManifest& manifest, uint64_t data_end = 8492) {
  std::string file(data_end, '\0');
  file.replace(0, kPackMagic.size(), kPackMagic);
  return file + write_pack_end(manifest, data_end);
}

TEST(PackFile, ManifestAndBack) {
  TempFolder folder;
  write_text(folder / "a.pack", file_of(example()));
  PackManifest read = read_pack_manifest(*File::open(folder / "a.pack"));
  EXPECT_EQ(read.recipe, "a recipe");
  EXPECT_EQ(read.sources, example().sources);
  EXPECT_EQ(read.metadata, example().metadata);
  ASSERT_EQ(read.tensors.size(), 3u);
  const PackTensor& last = read.tensors[2];
  EXPECT_EQ(last.key, "v");
  EXPECT_EQ(last.dtype, Dtype::F32);
  EXPECT_EQ(last.shape, (std::vector<int64_t>{10, 10}));
  EXPECT_EQ(last.coding, PackCoding::planes);
  EXPECT_EQ(last.offset, 8192u);
  EXPECT_EQ(last.size_bytes, 300u);
  EXPECT_EQ(last.checksum, 9u);
  EXPECT_EQ(last.plain_bytes(), 400u);
}

TEST(PackFile, EveryTornFileIsRefused) {
  TempFolder folder;
  const std::string file = file_of(example());
  for (size_t size :
       {size_t{0}, size_t{8}, size_t{4096}, size_t{8492}, file.size() - 33, file.size() - 1}) {
    write_text(folder / "a.pack", file.substr(0, size));
    EXPECT_THAT(error_of<FormatError>([&] { read_pack_manifest(*File::open(folder / "a.pack")); }),
                HasSubstr("torn"))
        << size;
  }
  write_text(folder / "a.pack", file + "x");
  EXPECT_THROW(read_pack_manifest(*File::open(folder / "a.pack")), FormatError);
}

TEST(PackFile, EveryFlippedByteOfTheEndIsFound) {
  TempFolder folder;
  const std::string file = file_of(example());
  for (size_t at = 0; at < file.size(); at = at == 7 ? 8492 : at + 1) {
    std::string flipped = file;
    flipped[at] = static_cast<char>(flipped[at] ^ 4);
    write_text(folder / "a.pack", flipped);
    EXPECT_THROW(read_pack_manifest(*File::open(folder / "a.pack")), FormatError) << at;
  }
}

TEST(PackFile, ManifestsThatLieAreRefused) {
  const std::string end = write_pack_end(example(), 8492);
  const std::string text = end.substr(0, end.size() - kPackFooterBytes);
  ASSERT_NO_THROW(parse_pack_manifest(text, 8492, "here"));
  auto refused = [&](const std::function<void(nlohmann::json&)>& change) {
    nlohmann::json json = nlohmann::json::parse(text);
    change(json);
    return error_of<FormatError>([&] { parse_pack_manifest(json.dump(), 8492, "here"); });
  };
  using J = nlohmann::json&;
  EXPECT_THAT(refused([](J j) { j["format"] = "other"; }), HasSubstr("reads ferry-pack version 1"));
  EXPECT_THAT(refused([](J j) { j["version"] = 2; }), HasSubstr("reads ferry-pack version 1"));
  EXPECT_THAT(refused([](J j) { j.erase("recipe"); }), HasSubstr("\"recipe\" is missing"));
  EXPECT_THAT(refused([](J j) { j["sources"] = 3; }), HasSubstr("expected an array"));
  EXPECT_THAT(refused([](J j) { j["sources"][0]["inode"] = -1; }), HasSubstr("\"inode\""));
  EXPECT_THAT(refused([](J j) { j["metadata"]["x"] = 1; }), HasSubstr("metadata \"x\""));
  EXPECT_THAT(refused([](J j) { j["tensors"] = nlohmann::json::object(); }), HasSubstr("array"));
  EXPECT_THAT(refused([](J j) { j["tensors"][0] = 5; }), HasSubstr("expected an object"));
  EXPECT_THAT(refused([](J j) { j["tensors"][0]["dtype"] = "F7"; }), HasSubstr("\"F7\""));
  EXPECT_THAT(refused([](J j) { j["tensors"][0]["coding"] = "magic"; }), HasSubstr("newer ferry"));
  EXPECT_THAT(refused([](J j) { j["tensors"][0]["shape"] = {3, -4}; }), HasSubstr("\"shape\""));
  EXPECT_THAT(refused([](J j) {
                j["tensors"][0]["shape"] = {1 << 30, 1 << 30, 1 << 30};
              }),
              HasSubstr("too many elements"));
  EXPECT_THAT(refused([](J j) { j["tensors"][0]["shape"] = {3, 5}; }), HasSubstr("expected 30"));
  EXPECT_THAT(refused([](J j) { j["tensors"][0]["checksum"] = "7"; }), HasSubstr("hexadecimal"));
  EXPECT_THAT(refused([](J j) { j["tensors"][2]["size_bytes"] = 10; }), HasSubstr("expected 24"));
  EXPECT_THAT(refused([](J j) { j["tensors"][2]["size_bytes"] = 500; }), HasSubstr("to 424"));
  EXPECT_THAT(refused([](J j) { j["tensors"][2]["dtype"] = "I64"; }), HasSubstr("never split"));
  EXPECT_THAT(refused([](J j) { j["tensors"][2]["offset"] = 4096; }), HasSubstr("multiple of"));
  EXPECT_THAT(refused([](J j) { j["tensors"][2]["offset"] = 8200; }), HasSubstr("multiple of"));
  EXPECT_THAT(refused([](J j) { j["tensors"][2]["offset"] = 12288; }), HasSubstr("multiple of"));
  EXPECT_THAT(refused([](J j) { j["tensors"][2]["size_bytes"] = 320; }), HasSubstr("of data"));
}

TEST(PackFile, ASourceIsToldFromItsLikes) {
  TempFolder folder;
  auto write = [&](const std::string& name, const std::string& value) {
    SafetensorsWriter writer(folder / name, {{"a", Dtype::U8, {4}}});
    writer.write(std::as_bytes(std::span(value.data(), value.size())));
    writer.finish();
    return describe_source(*File::open(folder / name));
  };
  const PackSource first = write("a.safetensors", "1234");
  EXPECT_EQ(describe_source(*File::open(folder / "a.safetensors")), first);
  EXPECT_EQ(source_difference(first, first), "");
  const PackSource second = write("b.safetensors", "5678");
  EXPECT_EQ(first.header_sha256, second.header_sha256);
  EXPECT_THAT(
      source_difference(first, second),
      testing::AllOf(HasSubstr("name b.safetensors (packed: a.safetensors)"), HasSubstr("inode")));
  const PackSource again = write("a.safetensors", "9999");           // the same name, another file
  EXPECT_THAT(source_difference(first, again), HasSubstr("inode"));  // times may tick slowly
  write_text(folder / "short", "abc");
  EXPECT_THROW(describe_source(*File::open(folder / "short")), FormatError);
  write_text(folder / "long", std::string(8, '\x7f'));
  EXPECT_THROW(describe_source(*File::open(folder / "long")), FormatError);
}

}  // namespace
}  // namespace ferry::io
