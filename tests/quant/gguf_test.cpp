#include "ferry/quant/gguf.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../fixture_tensors.h"
#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/quant/gguf_blocks.h"
#include "ferry/weights/binding.h"

namespace ferry::quant {
namespace {

using namespace ferry::testing_io;
using io::GgmlType;
using ::testing::HasSubstr;

constexpr const char* kTypes[] = {"Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K",   "Q2_K",
                                  "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"};

std::map<std::string, at::Tensor> fixture(const std::string& name) {
  return ferry::testing::read_fixture_tensors(std::string(FERRY_FIXTURES) + "/quant/" + name);
}

std::filesystem::path fixture_path(const std::string& name) {
  return std::string(FERRY_FIXTURES) + "/quant/" + name;
}

TEST(Gguf, DequantizesAsPythonBitForBit) {
  auto tensors = fixture("gguf_blocks.safetensors");
  for (std::string name : kTypes) {
    const at::Tensor &blocks = tensors.at(name + ".blocks"), &values = tensors.at(name + ".values");
    Gguf weight(values.sizes().vec(), *io::parse_ggml_type(name));
    EXPECT_EQ(weight.scheme(), "GGUF " + name);
    EXPECT_EQ(weight.components().size(), 1u);
    EXPECT_EQ(weight.components()[0].name, "blocks");
    EXPECT_EQ(at::IntArrayRef(weight.components()[0].shape), blocks.sizes());
    EXPECT_EQ(weight.size_bytes(), blocks.nbytes());
    std::vector<at::Tensor> components{blocks};
    at::Tensor whole = weight.dequantize(components, at::kFloat);
    // As bits: -0 is not 0.
    EXPECT_TRUE(at::equal(whole.view(at::kInt), values.view(at::kInt))) << name;
    EXPECT_TRUE(at::equal(weight.dequantize(components, at::kBFloat16), values.to(at::kBFloat16)));
    for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
      at::Tensor rows = at::empty({3, weight.columns()}, dtype);
      weight.dequantize_rows(components, 2, 3, dtype, rows.mutable_data_ptr());
      EXPECT_TRUE(at::equal(rows, values.narrow(0, 2, 3).to(dtype))) << name;
    }
  }
}

TEST(Gguf, RefusesShapesAndTypes) {
  auto error = [](std::vector<int64_t> shape, GgmlType type) {
    return error_of<ArgumentError>([&] { Gguf(std::move(shape), type); });
  };
  EXPECT_THAT(error({4, 100}, GgmlType::Q4_K), HasSubstr("GGUF Q4_K: got the shape [4, 100]"));
  EXPECT_THAT(error({32}, GgmlType::Q4_0), HasSubstr("expected [out, in]"));
  EXPECT_THAT(error({4, 256}, GgmlType::IQ2_XS), HasSubstr("IQ2_XS"));
  EXPECT_THAT(error({4, 256}, GgmlType::F16), HasSubstr("F16"));
}

// Plain tensors as read, quantized ones dequantized: in their true shapes, under their names.
TEST(Gguf, OpensFilesOfComfyUI) {
  GgufCheckpoint checkpoint = open_gguf(fixture_path("gguf_shapes.gguf"));
  EXPECT_EQ(*io::find_value(checkpoint.metadata, "general.architecture")->as_string(), "sdxl");
  auto expected = fixture("gguf_shapes.safetensors");
  EXPECT_EQ(checkpoint.weights.quantized.size(), 1u);
  EXPECT_EQ(checkpoint.weights.plain.size() + 1, expected.size());
  for (const weights::StoredTensor& stored : checkpoint.weights.plain) {
    const at::Tensor& values = expected.at(stored.key);
    at::Tensor got = weights::read_stored(stored);
    EXPECT_EQ(got.sizes(), values.sizes()) << stored.key;
    EXPECT_TRUE(at::equal(got.to(at::kFloat), values)) << stored.key;
  }
  const StoredQuantized& linear = checkpoint.weights.quantized.at("linear.weight");
  std::vector<at::Tensor> blocks{weights::read_stored(linear.components[0])};
  EXPECT_TRUE(
      at::equal(linear.weight->dequantize(blocks, at::kFloat), expected.at("linear.weight")));

  // Rows of it, without reading.
  StoredQuantized rows = linear.weight->rows_of(linear.components, 2, 3);
  EXPECT_EQ(rows.weight->shape(), at::IntArrayRef({3, 64}));
  std::vector<at::Tensor> cut{weights::read_stored(rows.components[0])};
  EXPECT_TRUE(at::equal(rows.weight->dequantize(cut, at::kFloat),
                        expected.at("linear.weight").narrow(0, 2, 3)));

  // As a table is read.
  for (io::Dtype dtype : {io::Dtype::F32, io::Dtype::BF16}) {
    at::Tensor table = weights::read_stored(dequantized_when_read(linear, dtype));
    EXPECT_TRUE(at::equal(table, expected.at("linear.weight").to(table.scalar_type())));
    EXPECT_EQ(table.element_size(), dtype == io::Dtype::F32 ? 4 : 2);
  }
}

struct BadFile {
  const char* what;
  std::vector<io::GgufWriter::Entry> entries;
  io::GgufMetadata metadata;
  std::vector<std::string> message;
};

TEST(Gguf, RefusesFilesThatItCannotTake) {
  using io::GgufType;
  TempFolder folder;
  auto shape = [](std::vector<int64_t> extents) {
    return io::GgufValue{GgufType::i32, std::move(extents)};
  };
  const std::string key = "comfy.gguf.orig_shape.w";
  const BadFile bad[] = {
      {"type", {{"w", GgmlType::IQ3_S, {2, 256}}}, {}, {"\"w\"", "[2, 256]", "IQ3_S", "Q6_K"}},
      {"empty", {{"w", GgmlType::Q8_0, {0, 32}}}, {}, {"\"w\"", "[0, 32]"}},
      {"size", {{"w", GgmlType::F32, {2, 3}}}, {{key, shape({7})}}, {key, "[2, 3]", "[7]"}},
      {"negative", {{"w", GgmlType::F32, {2, 3}}}, {{key, shape({-2, -3})}}, {key, "[-2, -3]"}},
      {"overflow",
       {{"w", GgmlType::F32, {2, 3}}},
       {{key, shape({1 << 30, 1 << 30, 1 << 30})}},
       {key}},
      {"no list",
       {{"w", GgmlType::F32, {2, 3}}},
       {{key, {GgufType::string, std::string("2x3")}}},
       {key, "no list of whole numbers"}},
      {"both names",
       {{"w", GgmlType::F32, {1}}, {"model.diffusion_model.w", GgmlType::F32, {1}}},
       {},
       {"\"w\"", "with and without \"model.diffusion_model.\""}},
      {"part",
       {{"w", GgmlType::F32, {1}}},
       {{"split.count", {GgufType::u16, uint64_t{3}}}},
       {"one of 3 parts"}},
  };
  for (const BadFile& file : bad) {
    const std::filesystem::path path = folder / "a.gguf";
    io::GgufWriter writer(path, file.entries, file.metadata);
    for (const auto& entry : file.entries) {
      int64_t elements = 1;
      for (int64_t extent : entry.shape) elements *= extent;
      writer.write(std::vector<std::byte>(static_cast<size_t>(
          elements / io::block_elements(entry.type) * io::block_bytes(entry.type))));
    }
    writer.finish();
    std::string message = error_of<FormatError>([&] { open_gguf(path); });
    EXPECT_THAT(message, HasSubstr(path.string())) << file.what;
    for (const std::string& part : file.message) EXPECT_THAT(message, HasSubstr(part)) << file.what;
  }
  EXPECT_THROW(open_gguf(folder / "none.gguf"), IoError);
}

}  // namespace
}  // namespace ferry::quant
