#include "ferry/models/key_maps.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/quant/gguf.h"
#include "ferry/weights/binding.h"

namespace ferry::models {
namespace {

using namespace ferry::testing_io;
using ::testing::HasSubstr;

// One int8 block of 32 elements with the scale 1.
std::vector<std::byte> block_of(int first) {
  std::vector<std::byte> block(34);
  block[1] = std::byte{0x3c};
  for (int i = 0; i < 32; ++i) block[2 + i] = static_cast<std::byte>(first + i);
  return block;
}

// A vector of blocks is dequantized as it is read, so that its rows are no range of the file.
TEST(KeyMaps, RowsAndHalvesOfEncodedTensors) {
  TempFolder folder;
  io::GgufWriter writer(folder / "a.gguf",
                        {{"double_blocks.7.txt_attn.qkv.bias", io::GgmlType::Q8_0, {96}},
                         {"final_layer.adaLN_modulation.1.bias", io::GgmlType::Q8_0, {64}}});
  for (int block = 0; block < 3; ++block) writer.write(block_of(block * 32));
  for (int block = 0; block < 2; ++block) writer.write(block_of(block * 32));
  writer.finish();
  quant::StoredWeights mapped = map_flux(quant::open_gguf(folder / "a.gguf").weights);
  ASSERT_EQ(mapped.plain.size(), 4u);
  std::map<std::string, at::Tensor> tensors;
  for (const weights::StoredTensor& stored : mapped.plain)
    tensors[stored.key] = weights::read_stored(stored);
  for (int part = 0; part < 3; ++part) {
    const char* names[] = {"add_q_proj", "add_k_proj", "add_v_proj"};
    std::string name = fmt::format("transformer_blocks.7.attn.{}.bias", names[part]);
    ASSERT_TRUE(tensors.contains(name)) << name;
    EXPECT_TRUE(at::equal(tensors[name], at::arange(part * 32, part * 32 + 32, at::kFloat)));
  }
  at::Tensor swapped = at::cat({at::arange(32, 64, at::kFloat), at::arange(0, 32, at::kFloat)});
  EXPECT_TRUE(at::equal(tensors.at("norm_out.linear.bias"), swapped));

  // Again: rows of what is encoded already.
  weights::StoredTensor rows = rows_of(rows_of(swap_halves(mapped.plain[0]), 4, 20), 3, 5);
  at::Tensor whole = tensors.at(mapped.plain[0].key);
  at::Tensor halves = at::cat({whole.narrow(0, 16, 16), whole.narrow(0, 0, 16)});
  EXPECT_TRUE(at::equal(weights::read_stored(rows), halves.narrow(0, 7, 5)));
}

TEST(KeyMaps, NamesThatAreNotKnownStay) {
  TempFolder folder;
  const std::vector<std::string> names = {"double_blocks.x.img_mlp.0.weight",
                                          "double_blocks.0.new.weight",
                                          "single_blocks.0",
                                          "img_in_2.weight",
                                          "encoder.down.0.new.weight",
                                          "enc.blk.0.new.weight"};
  std::vector<io::GgufWriter::Entry> entries;
  for (const std::string& name : names) entries.push_back({name, io::GgmlType::F32, {1}});
  io::GgufWriter writer(folder / "a.gguf", entries);
  writer.write(std::vector<std::byte>(names.size() * 4));
  writer.finish();
  quant::StoredWeights weights = quant::open_gguf(folder / "a.gguf").weights;
  for (const weights::StoredTensor& stored : map_flux(weights).plain)
    EXPECT_THAT(names, ::testing::Contains(stored.key));
  for (const weights::StoredTensor& stored : map_t5(weights).plain)
    EXPECT_THAT(names, ::testing::Contains(stored.key));
  EXPECT_EQ(map_autoencoder(weights).plain[4].key, "encoder.down_blocks.0.new.weight");
}

TEST(KeyMaps, TwoTensorsOfOneNameAreRefused) {
  TempFolder folder;
  io::GgufWriter writer(folder / "a.gguf", {{"img_in.weight", io::GgmlType::Q8_0, {1, 32}},
                                            {"x_embedder.weight", io::GgmlType::Q8_0, {1, 32}}});
  writer.write(block_of(0));
  writer.write(block_of(0));
  writer.finish();
  quant::StoredWeights weights = quant::open_gguf(folder / "a.gguf").weights;
  EXPECT_THAT(error_of<FormatError>([&] { map_flux(weights); }),
              HasSubstr("two tensors are 'x_embedder.weight'"));
}

}  // namespace
}  // namespace ferry::models
