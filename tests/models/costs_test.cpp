// Operations against what Python's FlopCounterMode counts, memory against what the allocator does.
#include "ferry/models/costs.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <atomic>

#include "ferry/models/autoencoders/autoencoder_kl.h"
#include "ferry/models/text_encoders/clip_text_model.h"
#include "ferry/models/text_encoders/t5_encoder_model.h"
#include "ferry/models/transformers/transformer_flux.h"
#include "ferry/testing/allocation_counter.h"
#include "ferry/weights/slot.h"

namespace ferry::models {
namespace {

using ferry::testing::AllocationCounter;

int64_t peak_of(const std::function<void()>& body) {
  return AllocationCounter::peak_of(body);
}

// Small real weights, so that a forward runs.
void fill(const Model& model, at::ScalarType dtype) {
  for (const weights::Slot& slot : weights::collect_slots(model)) {
    at::Tensor tensor = slot.tensor;
    tensor.set_data(at::full(tensor.sizes(), 0.01, at::TensorOptions().dtype(dtype)));
  }
}

struct Measured {
  std::string what;
  double estimate, peak;
};

// The stated factor: the estimate is from above, and at most 1.6 times the peak.
void check(const Measured& m) {
  fmt::print("{}: estimated {:.1f} MB, allocated {:.1f} MB: {:.2f}\n", m.what, m.estimate / 1e6,
             m.peak / 1e6, m.estimate / m.peak);
  EXPECT_GE(m.estimate, m.peak) << m.what;
  EXPECT_LE(m.estimate, 1.6 * m.peak) << m.what;
}

double total(const Model& model, const Workload& workload) {
  double sum = 0;
  for (const auto& [layer, flops] : layer_flops(model, workload)) sum += flops;
  return sum;
}

FluxTransformer2DConfig flux_config(int64_t heads, int64_t layers, int64_t single_layers) {
  FluxTransformer2DConfig config;
  config.num_attention_heads = heads;
  config.num_layers = layers;
  config.num_single_layers = single_layers;
  config.guidance_embeds = false;
  return config;
}

AutoencoderKLConfig flux_vae_config() {
  AutoencoderKLConfig config;
  config.block_out_channels = {128, 256, 512, 512};
  config.down_block_types.assign(4, "DownEncoderBlock2D");
  config.up_block_types.assign(4, "UpDecoderBlock2D");
  config.latent_channels = 16;
  config.layers_per_block = 2;
  config.sample_size = 1024;
  config.use_quant_conv = config.use_post_quant_conv = false;
  return config;
}

T5Config t5_xxl_config() {
  T5Config config;
  config.d_model = 4096;
  config.d_ff = 10240;
  config.num_heads = 64;
  config.num_layers = 24;
  config.feed_forward_proj = "gated-gelu";
  return config;
}

// torch.utils.flop_counter.FlopCounterMode over diffusers 0.42.1 and transformers on the meta
// device.
TEST(Costs, OperationsAsPythonCounts) {
  const auto flux = [] {
    FluxTransformer2DConfig config = flux_config(24, 19, 38);
    config.guidance_embeds = true;
    return FluxTransformer2DModel(config);
  }();
  EXPECT_NEAR(total(flux, {.height = 1024, .width = 1024, .text_tokens = 512}) / 74.384653418e12, 1,
              0.005);
  EXPECT_NEAR(total(flux, {.height = 768, .width = 512, .text_tokens = 256}) / 25.398269706e12, 1,
              0.005);
  const AutoencoderKL vae(flux_vae_config());
  EXPECT_NEAR(total(vae, {.height = 1024, .width = 1024}) / 10.472204009e12, 1, 0.005);
  EXPECT_NEAR(total(vae, {.height = 512, .width = 768}) / 3.798227485e12, 1, 0.005);
  EXPECT_NEAR(total(T5EncoderModel(t5_xxl_config()), {.text_tokens = 512}) / 4.844723110e12, 1,
              0.005);
  CLIPTextConfig clip;
  clip.hidden_size = 768;
  clip.intermediate_size = 3072;
  clip.num_attention_heads = 12;
  EXPECT_NEAR(total(CLIPTextModel(clip), {}) / 0.01329850368e12, 1, 0.01);
}

// Tiles overlap, so they compute more: those of 512 pixels at steps of 384 cover 1024 pixels with
// 512 + 512 + 256 on each side.
TEST(Costs, TilesOverlap) {
  AutoencoderKLConfig config = flux_vae_config();
  config.sample_size = 512;
  config.mid_block_add_attention = false;
  const AutoencoderKL vae(config);
  const Workload whole{.height = 1024, .width = 1024},
      tiled{.height = 1024, .width = 1024, .tiled = true};
  EXPECT_NEAR(total(vae, tiled) / total(vae, whole), 1.25 * 1.25, 1e-9);
  EXPECT_LT(activation_bytes(vae, tiled), activation_bytes(vae, whole) / 2);
}

TEST(Costs, ActivationsOfFlux) {
  at::NoGradGuard no_grad;
  for (auto [dtype, size, text] : {std::tuple(at::kFloat, 512, 64),
                                   {at::kBFloat16, 512, 256},
                                   {at::kBFloat16, 768, 64},
                                   {at::kFloat, 256, 512}}) {
    FluxTransformer2DModel model(flux_config(4, 1, 2));
    fill(model, dtype);
    const auto options = at::TensorOptions().dtype(dtype);
    const int64_t tokens = size / 16 * size / 16;
    const Workload workload{
        .height = size, .width = size, .text_tokens = text, .dtype = dtype, .on_cpu = true};
    const int64_t peak = peak_of([&] {
      model.call([&, text = text] {
        return model.forward(at::randn({1, tokens, 64}, options),
                             at::randn({1, text, 4096}, options), at::randn({1, 768}, options),
                             at::ones({1}, options), at::zeros({tokens, 3}), at::zeros({text, 3}));
      });
    });
    check({fmt::format("flux {} + {} tokens {}", tokens, text, c10::toString(dtype)),
           static_cast<double>(activation_bytes(model, workload)), static_cast<double>(peak)});
  }
}

// What is alive when a block has ended.
class BetweenBlocks : public nn::ModuleHook {
 public:
  explicit BetweenBlocks(const AllocationCounter& counter) : counter_(counter) {}
  void after(nn::Module&) override { most = std::max(most, counter_.now); }
  int64_t most = 0;

 private:
  const AllocationCounter& counter_;
};

TEST(Costs, HeldBetweenBlocksOfFlux) {
  at::NoGradGuard no_grad;
  for (auto [dtype, size, text] : {std::tuple(at::kFloat, 512, 64), {at::kBFloat16, 512, 256}}) {
    FluxTransformer2DModel model(flux_config(4, 2, 2));
    fill(model, dtype);
    const auto options = at::TensorOptions().dtype(dtype);
    const int64_t tokens = size / 16 * size / 16;
    auto counter = std::make_shared<AllocationCounter>();
    auto hook = std::make_shared<BetweenBlocks>(*counter);
    for (const auto& block : *model.transformer_blocks) block->add_hook("held", hook);
    for (const auto& block : *model.single_transformer_blocks) block->add_hook("held", hook);
    AllocationCounter::count(counter, [&, text = text] {
      model.call([&] {
        return model.forward(at::randn({1, tokens, 64}, options),
                             at::randn({1, text, 4096}, options), at::randn({1, 768}, options),
                             at::ones({1}, options), at::zeros({tokens, 3}), at::zeros({text, 3}));
      });
    });
    const Workload workload{
        .height = size, .width = size, .text_tokens = text, .dtype = dtype, .on_cpu = true};
    check(
        {fmt::format("flux between blocks, {} + {} tokens {}", tokens, text, c10::toString(dtype)),
         static_cast<double>(held_bytes(model, workload)), static_cast<double>(hook->most)});
    EXPECT_LT(held_bytes(model, workload), activation_bytes(model, workload) / 3);
  }
}

TEST(Costs, ActivationsOfTheAutoencoder) {
  at::NoGradGuard no_grad;
  AutoencoderKLConfig config = flux_vae_config();
  config.block_out_channels = {32, 64, 128, 128};
  config.sample_size = 256;
  for (auto [dtype, height, width, tiled] : {std::tuple(at::kFloat, 256, 256, false),
                                             {at::kBFloat16, 512, 384, false},
                                             {at::kFloat, 512, 512, true},
                                             {at::kBFloat16, 512, 768, true}}) {
    AutoencoderKL model(config);
    fill(model, dtype);
    if (tiled) model.enable_tiling();
    const Workload workload{
        .height = height, .width = width, .dtype = dtype, .on_cpu = true, .tiled = tiled};
    at::Tensor latents =
        at::randn({1, 16, height / 8, width / 8}, at::TensorOptions().dtype(dtype));
    const int64_t peak = peak_of([&] { model.decode(latents); });
    check({fmt::format("vae {} x {}{} {}", height, width, tiled ? " tiled" : "",
                       c10::toString(dtype)),
           static_cast<double>(activation_bytes(model, workload)), static_cast<double>(peak)});
  }
}

TEST(Costs, ActivationsOfTextEncoders) {
  at::NoGradGuard no_grad;
  for (auto [dtype, tokens] : {std::tuple(at::kFloat, 128), {at::kBFloat16, 512}}) {
    T5Config config = t5_xxl_config();
    config.d_model = 512;
    config.d_ff = 1280;
    config.num_heads = 8;
    config.num_layers = 2;
    T5EncoderModel model(config);
    fill(model, dtype);
    const Workload workload{.text_tokens = tokens, .dtype = dtype, .on_cpu = true};
    at::Tensor ids = at::ones({1, tokens}, at::kLong);
    const int64_t peak = peak_of([&] { model.call([&] { return model.forward(ids); }); });
    check({fmt::format("t5 {} tokens {}", tokens, c10::toString(dtype)),
           static_cast<double>(activation_bytes(model, workload)), static_cast<double>(peak)});
  }
}

}  // namespace
}  // namespace ferry::models
