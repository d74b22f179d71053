// Single files in place of a pipeline's components, made from the tiny Flux pipeline.
#include "ferry/pipelines/loose_files.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "ferry/io/gguf.h"
#include "ferry/models/single_file_writer.h"
#include "ferry/pipelines/flux/pipeline_flux.h"
#include "ferry/text/sentencepiece_model.h"

namespace ferry::pipelines {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using testing_io::error_of;
using testing_io::TempFolder;

const fs::path kFolder = fs::path(FERRY_FIXTURES) / "pipelines/flux-tiny";

at::Tensor latents(DiffusionPipeline& pipeline) {
  TextToImageArguments a;
  a.prompt = "a large red circle on a white background";
  a.height = 32;
  a.width = 48;
  a.num_inference_steps = 2;
  a.max_sequence_length = 32;
  a.output_type = OutputType::latent;
  a.generator = {tensor::Generator().manual_seed(7)};
  return pipeline.text_to_image(a).tensor;
}

// Each model of the tiny pipeline as a file of its own, and the options that keep its dtypes.
struct Files : ::testing::Test {
  TempFolder folder;
  LooseFiles files;
  PipelineLoadOptions options;

  Files() {
    options.dtype = DtypeMap::parse("fp32");
    for (const char* component : {"transformer", "vae", "text_encoder_2"}) {
      auto model = models::load_model(kFolder / component);
      const bool t5 = std::string(component) == "text_encoder_2";
      const fs::path path = folder / (std::string(component) + (t5 ? ".gguf" : ".safetensors"));
      models::WriteSingleFileOptions write;
      if (t5) write.gguf_type = io::GgmlType::F32;
      models::write_single_file(*model, path, write);
      files.models[component] = path;
    }
    files.models["text_encoder"] = kFolder / "text_encoder/model.safetensors";
  }
};

TEST_F(Files, InAFoldersPlaceGiveTheSamePicture) {
  auto expected = latents(*load_pipeline(kFolder.string(), {}, options));
  auto pipeline = load_pipeline(kFolder.string(), files, options);
  EXPECT_TRUE(at::equal(latents(*pipeline), expected));
  // Streamed too: they are slots as any.
  offload::EngineOptions engine;
  pipeline->enable_group_offload(std::make_shared<offload::Engine>(engine));
  EXPECT_TRUE(at::equal(latents(*pipeline), expected));
}

TEST_F(Files, QuantizedOnesStreamBitForBit) {
  auto model = models::load_model(kFolder / "transformer");
  files.models["transformer"] = folder / "q8.gguf";
  models::write_single_file(*model, folder / "q8.gguf", {.gguf_type = io::GgmlType::Q8_0});
  auto expected = latents(*load_pipeline(kFolder.string(), files, options));
  auto pipeline = load_pipeline(kFolder.string(), files, options);
  pipeline->enable_group_offload(std::make_shared<offload::Engine>(offload::EngineOptions{}));
  EXPECT_TRUE(at::equal(latents(*pipeline), expected));
}

TEST_F(Files, WhatIsMissingIsNamed) {
  EXPECT_THAT(
      error_of<ArgumentError>([&] {
        load_pipeline("", {.models = {{"text_encoder", files.models["text_encoder"]}}}, options);
      }),
      AllOf(HasSubstr("--transformer"), HasSubstr("--vae"), HasSubstr("--tokenizer")));
  EXPECT_THAT(error_of<ArgumentError>([&] { load_pipeline("", {}, options); }),
              HasSubstr("neither a pipeline's folder nor files"));
  EXPECT_THAT(
      error_of<ArgumentError>([&] {
        load_pipeline(kFolder.string(), {.models = {{"unet", files.models["vae"]}}}, options);
      }),
      HasSubstr("expected transformer, text_encoder"));
  options.quantize = parse_quantize("int8wo");
  EXPECT_THAT(error_of<ArgumentError>([&] { load_pipeline(kFolder.string(), files, options); }),
              HasSubstr("is a single file"));
}

TEST_F(Files, AFileOfAnotherModelIsRefused) {
  LooseFiles wrong;
  wrong.models["transformer"] = files.models["vae"];
  EXPECT_THAT(error_of<FormatError>([&] { load_pipeline(kFolder.string(), wrong, options); }),
              HasSubstr("FluxTransformer2DModel"));
}

// A GGUF file of T5 with llama.cpp's tokenizer fields encodes as the folder's spiece.model.
TEST_F(Files, T5BringsItsTokenizer) {
  const fs::path tokenizer = fs::path(FERRY_FIXTURES) / "tokenizers/t5-spiece";
  const fs::path spiece = tokenizer / "spiece.model";
  const auto model = text::SentencePieceModel::read(spiece);
  auto pieces = text::Tokenizer::from_sentencepiece(model, "t5.gguf");
  auto folders = text::Tokenizer::from_pretrained(tokenizer, "T5Tokenizer");
  for (const char* text : {"a large red circle", "  two\tblanks ", "naïve — 円 🙂", ""})
    EXPECT_EQ(pieces->encode(text).ids, folders->encode(text).ids) << text;
  EXPECT_THAT(error_of<ArgumentError>([&] { pieces->save_pretrained(folder / "t"); }),
              HasSubstr("GGUF"));
}

TEST(Quantize, IsParsed) {
  QuantizeMap map = parse_quantize("transformer=int4wo:64,text_encoder_2=nf4");
  EXPECT_EQ(map.at("transformer").scheme, "int4wo");
  EXPECT_EQ(map.at("transformer").group_size, 64);
  EXPECT_EQ(map.at("text_encoder_2").scheme, "nf4");
  EXPECT_EQ(parse_quantize("int8wo").begin()->first, "transformer");
  EXPECT_TRUE(parse_quantize("").empty());
  EXPECT_THROW(parse_quantize("int4wo:many"), ArgumentError);
  EXPECT_THROW(parse_quantize("int3"), ArgumentError);
}

}  // namespace
}  // namespace ferry::pipelines
