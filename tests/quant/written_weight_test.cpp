#include "ferry/quant/written_weight.h"

#include <nlohmann/json.hpp>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/quant/bitsandbytes_4bit.h"
#include "ferry/quant/bitsandbytes_int8.h"
#include "ferry/quant/registry.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

using Json = nlohmann::json;

// What a library wrote, read and described anew, is what it wrote.
void expect_described(const std::string& name, const std::vector<std::string>& parameters) {
  auto checkpoint = weights::Checkpoint::open_file(fixture(name + ".safetensors"));
  StoredWeights weights = read_weights(*checkpoint);
  for (const std::string& parameter : parameters) {
    SCOPED_TRACE(parameter);
    const StoredQuantized& stored = weights.quantized.at(parameter);
    WrittenWeight written = written_weight(parameter, *stored.weight, at::kBFloat16);
    for (const WrittenTensor& tensor : written.tensors) {
      const weights::StoredTensor* original = checkpoint->find(tensor.key);
      ASSERT_NE(original, nullptr) << tensor.key;
      EXPECT_EQ(original->dtype, tensor.dtype);
      if (tensor.component) {
        EXPECT_EQ(original->shape, tensor.shape);
      } else {
        at::Tensor text = weights::read_stored(*original);
        EXPECT_EQ(Json::parse(tensor.bytes),
                  Json::parse(std::string(static_cast<char*>(text.data_ptr()), text.nbytes())));
      }
    }
    if (!written.metadata.empty()) {
      EXPECT_EQ(Json::parse(written.metadata), Json::parse(checkpoint->metadata().at(parameter)));
    }
  }
}

TEST(WrittenWeight, IsDescribedAsTorchAoDoes) {
  expect_described("torchao_float8", {"row.weight", "group.weight", "tensor.weight", "block.weight",
                                      "dynamic_row.weight"});
  expect_described("torchao_int8",
                   {"row.weight", "without_zero_point.weight", "group.weight", "dynamic.weight"});
  expect_described("torchao_int4", {"g32.weight", "g64.weight", "g128.weight"});
}

TEST(WrittenWeight, IsDescribedAsBitsAndBytesDoes) {
  expect_described("bitsandbytes_4bit", {"nf4.weight", "fp4.weight", "bf16_storage.weight"});
}

TEST(WrittenWeight, IsReadBackBitForBit) {
  testing_io::TempFolder folder;
  at::Tensor weight = (at::arange(32 * 128, at::kFloat).view({32, 128}) * 0.37f).sin();
  for (const Scheme& scheme : schemes()) {
    SCOPED_TRACE(scheme.name);
    Quantized made = quantize(scheme, weight);
    WrittenWeight written = written_weight("layer.weight", *made.weight, at::kFloat);
    std::vector<io::SafetensorsWriter::Entry> entries{{"layer.bias", io::Dtype::F32, {1}}};
    for (const WrittenTensor& tensor : written.tensors)
      entries.push_back({tensor.key, tensor.dtype, tensor.shape});
    std::map<std::string, std::string> metadata{{"format", "pt"}};
    if (!written.metadata.empty())
      metadata = torchao_metadata({{"layer.weight", written.metadata}, {"layer.bias", ""}});
    const auto path = folder / (std::string(scheme.name) + ".safetensors");
    io::SafetensorsWriter writer(path, entries, metadata);
    const float bias = 1;
    writer.write(std::as_bytes(std::span(&bias, 1)));
    for (const WrittenTensor& tensor : written.tensors) {
      if (tensor.component) {
        const at::Tensor& component = made.components[*tensor.component];
        writer.write(
            {static_cast<const std::byte*>(component.const_data_ptr()), component.nbytes()});
      } else {
        writer.write(std::as_bytes(std::span(tensor.bytes)));
      }
    }
    writer.finish();
    StoredWeights read = read_weights(*weights::Checkpoint::open_file(path));
    EXPECT_EQ(plain_names(read), std::vector<std::string>{"layer.bias"});
    const StoredQuantized& stored = read.quantized.at("layer.weight");
    EXPECT_EQ(stored.weight->activation(), made.weight->activation());
    expect_dequantizes(stored, made.weight->dequantize(made.components, at::kFloat));
  }
}

TEST(WrittenWeight, WhatIsNotWrittenIsRefused) {
  EXPECT_THROW(written_weight("a.weight", BitsAndBytesInt8Weight({4, 8}), at::kFloat),
               ArgumentError);
  BitsAndBytes4bitWeight nested(
      {4, 64}, {.nested = BitsAndBytes4bitWeight::Nested{.block_size = 256, .offset = 0}});
  EXPECT_THROW(written_weight("a.weight", nested, at::kFloat), ArgumentError);
  Quantized made = quantize(find_scheme("int8wo"), at::ones({4, 8}));
  EXPECT_THROW(written_weight("table", *made.weight, at::kFloat), ArgumentError);
}

}  // namespace
}  // namespace ferry::quant
