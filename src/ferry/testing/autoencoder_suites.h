// AutoencoderTester: what every autoencoder of pictures does, whatever its blocks are. Asserts as
// diffusers' own tests of autoencoders; that the values are Python's is the parity test's matter.
//
//   INSTANTIATE_TEST_SUITE_P(Kl, AutoencoderTester, ::testing::Values(AutoencoderCase{…}), …);
#pragma once

#include <limits>

#include "ferry/models/autoencoders/autoencoder.h"
#include "ferry/tensor/generator.h"
#include "ferry/testing/model_suites.h"

namespace ferry::testing {

struct AutoencoderCase {
  std::string name;              // letters and digits: part of the test's name
  std::filesystem::path folder;  // config.json and weights
  int64_t in_channels = 3;
  int64_t latent_channels = 4;
  // Latent values of a side: several tiles of `tile` of them, not a whole number. A tile's quarter,
  // its overlap, has to be a whole number, or the tiles do not add up (as in diffusers).
  int64_t height = 21, width = 13;
  int64_t tile = 8;
  // Of the output's largest magnitude. Slices round differently, since a convolution may choose
  // another kernel for another batch. In a tile the norms see other pixels, so that random weights
  // are hard on it; a misplaced or unblended tile is far beyond (an output of another place: 2).
  double slicing_bound = 1e-5;
  double tiling_bound = 1.0;

  friend void PrintTo(const AutoencoderCase& value, std::ostream* out) { *out << value.name; }
};

class AutoencoderTester : public ::testing::TestWithParam<AutoencoderCase> {
 protected:
  void SetUp() override {
    model_ = models::load_model(GetParam().folder, {.dtype = at::kFloat});
    vae_ = dynamic_cast<models::AutoencoderMixin*>(model_.get());
    ASSERT_NE(vae_, nullptr) << model_->class_name() << " is no AutoencoderMixin";
    ASSERT_EQ(model_->methods(), (std::vector<std::string>{"forward", "encode", "decode"}));
  }

  // [batch, channels, height, width] of noise, as float32.
  static at::Tensor noise(at::IntArrayRef shape) {
    return tensor::randn_tensor(shape, {tensor::Generator().manual_seed(0)});
  }
  at::Tensor picture(int64_t batch, int64_t height, int64_t width) const {
    int64_t factor = vae_->scale_factor();
    return noise({batch, GetParam().in_channels, factor * height, factor * width}).clamp(-1, 1);
  }
  at::Tensor picture(int64_t batch) const {
    return picture(batch, GetParam().height, GetParam().width);
  }
  at::Tensor latents(int64_t batch) const {
    return noise({batch, GetParam().latent_channels, GetParam().height, GetParam().width});
  }
  at::Tensor encode(const at::Tensor& sample) const {
    at::NoGradGuard no_grad;
    return model_->forward_named("encode", {{"sample", sample}}, {}).at("mean");
  }
  at::Tensor decode(const at::Tensor& z) const {
    at::NoGradGuard no_grad;
    return model_->forward_named("decode", {{"z", z}}, {}).at("sample");
  }
  void tile() {
    vae_->enable_tiling({.tile_sample_min_size = GetParam().tile * vae_->scale_factor(),
                         .tile_latent_min_size = GetParam().tile});
  }
  // Relative to the largest magnitude of `expected`; infinite for another shape.
  static double distance(const at::Tensor& got, const at::Tensor& expected) {
    if (got.sizes() != expected.sizes()) return std::numeric_limits<double>::infinity();
    return (got - expected).abs().max().item<double>() / expected.abs().max().item<double>();
  }

  std::shared_ptr<models::Model> model_;
  models::AutoencoderMixin* vae_ = nullptr;
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(AutoencoderTester);

TEST_P(AutoencoderTester, ShapesFollowTheFactor) {
  const auto& p = GetParam();
  at::NoGradGuard no_grad;
  auto encoded = model_->forward_named("encode", {{"sample", picture(2)}}, {});
  for (const char* name : {"mean", "logvar"}) {
    EXPECT_EQ(encoded.at(name).sizes(), at::IntArrayRef({2, p.latent_channels, p.height, p.width}))
        << name;
  }
  int64_t factor = vae_->scale_factor();
  at::Tensor decoded = decode(latents(2));
  EXPECT_EQ(decoded.size(0), 2);
  EXPECT_EQ(decoded.size(2), factor * p.height);
  EXPECT_EQ(decoded.size(3), factor * p.width);
}

TEST_P(AutoencoderTester, ForwardDecodesTheMode) {
  at::NoGradGuard no_grad;
  at::Tensor sample = picture(1);
  at::Tensor forward = model_->forward_named("forward", {{"sample", sample}}, {}).at("sample");
  EXPECT_TRUE(at::equal(forward, decode(encode(sample))));
}

// Each entry is one call point of the root, so that hooks (offloading, stopping) see it.
TEST_P(AutoencoderTester, EveryMethodIsACallPoint) {
  struct Counter : nn::ModuleHook {
    int entered = 0, left = 0;
    void before(nn::Module&) override { ++entered; }
    void after(nn::Module&) override { ++left; }
  };
  auto counter = std::make_shared<Counter>();
  model_->add_hook("counter", counter);
  encode(picture(1));
  EXPECT_EQ(counter->entered, 1);
  decode(latents(1));
  EXPECT_EQ(counter->entered, 2);
  at::NoGradGuard no_grad;
  model_->forward_named("forward", {{"sample", picture(1)}}, {});
  EXPECT_EQ(counter->entered, 3);
  EXPECT_EQ(counter->left, 3);
}

TEST_P(AutoencoderTester, SlicingChangesNothing) {
  at::Tensor sample = picture(3), z = latents(3);
  at::Tensor mean = encode(sample), decoded = decode(z);
  vae_->enable_slicing();
  EXPECT_TRUE(vae_->slicing());
  EXPECT_LT(distance(encode(sample), mean), GetParam().slicing_bound);
  EXPECT_LT(distance(decode(z), decoded), GetParam().slicing_bound);
  // Bit for bit what the samples alone give: so slicing is really on.
  EXPECT_TRUE(at::equal(decode(z)[1], decode(z.narrow(0, 1, 1))[0]));
  vae_->disable_slicing();
  EXPECT_FALSE(vae_->slicing());
  EXPECT_TRUE(at::equal(decode(z), decoded));
}

TEST_P(AutoencoderTester, TilingStaysNearAndCanBeTurnedOff) {
  at::Tensor sample = picture(1), z = latents(1);
  at::Tensor mean = encode(sample), decoded = decode(z);
  tile();
  EXPECT_TRUE(vae_->tiling());
  double encode_distance = distance(encode(sample), mean),
         decode_distance = distance(decode(z), decoded);
  EXPECT_LT(encode_distance, GetParam().tiling_bound);
  EXPECT_LT(decode_distance, GetParam().tiling_bound);
  EXPECT_GT(encode_distance, 0) << "the tiles were not used";
  EXPECT_GT(decode_distance, 0) << "the tiles were not used";
  vae_->disable_tiling();
  EXPECT_FALSE(vae_->tiling());
  EXPECT_TRUE(at::equal(encode(sample), mean));
  EXPECT_TRUE(at::equal(decode(z), decoded));
}

TEST_P(AutoencoderTester, WhatFitsIntoOneTileStaysAsItIs) {
  const int64_t side = GetParam().tile;
  at::Tensor sample = picture(1, side, side);
  at::Tensor z = latents(1).slice(2, 0, side).slice(3, 0, side).contiguous();
  at::Tensor mean = encode(sample), decoded = decode(z);
  tile();
  EXPECT_TRUE(at::equal(encode(sample), mean));
  EXPECT_TRUE(at::equal(decode(z), decoded));
}

TEST_P(AutoencoderTester, TilesThatCannotBeAreRefused) {
  EXPECT_THROW(vae_->enable_tiling({.tile_sample_min_size = 0}), ArgumentError);
  EXPECT_THROW(
      vae_->enable_tiling(
          {.tile_sample_min_size = 16, .tile_latent_min_size = 8, .tile_overlap_factor = 1.0}),
      ArgumentError);
  EXPECT_FALSE(vae_->tiling()) << "a refused call changed something";
}

TEST_P(AutoencoderTester, SlicedAndTiledStreamsBitForBit) {
  at::Tensor z = latents(2);
  vae_->enable_slicing();
  tile();
  at::Tensor expected = decode(z);
  offload::EngineOptions options;
  options.weights_memory_bytes = weights::total_bytes(weights::collect_slots(*model_)) / 2;
  options.preferred_arena_bytes = 64 << 10;
  options.small_slot_bytes = 0;
  auto engine = std::make_shared<offload::Engine>(options);
  auto offloading = hooks::apply_group_offloading(*model_, model_->binding(), engine);
  EXPECT_TRUE(at::equal(decode(z), expected));
  EXPECT_GT(engine->report().bytes_read, 0u);
}

}  // namespace ferry::testing
