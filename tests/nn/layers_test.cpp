// Layers against diffusers' (tests/fixtures/nn/make_fixtures.py).
#include <gtest/gtest.h>

#include "../fixture_tensors.h"
#include "ferry/base/error.h"
#include "ferry/nn/conv.h"
#include "ferry/nn/embedding.h"
#include "ferry/nn/embeddings.h"
#include "ferry/nn/feed_forward.h"
#include "ferry/nn/normalization.h"
#include "ferry/weights/slot.h"

namespace ferry::nn {
namespace {

using testing::relative_error;
constexpr double kTolerance = 1e-6;

class Layers : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    tensors_ = testing::read_fixture_tensors(FERRY_FIXTURES "/nn/layers.safetensors");
  }
  static const at::Tensor& get(const std::string& name) { return tensors_.at(name); }

  // Gives `module` the weights of the case; every parameter has to be there, and nothing else.
  template <class M>
  static Ptr<M> load(Ptr<M> module, const std::string& name) {
    std::string prefix = name + ".weight.";
    size_t found = 0;
    for (const weights::Slot& slot : weights::collect_slots(*module)) {
      const at::Tensor& value = get(prefix + slot.name());
      EXPECT_EQ(value.sizes(), slot.shape()) << slot.name();
      at::Tensor(slot.tensor).set_data(value);
      ++found;
    }
    size_t expected = 0;
    for (const auto& entry : tensors_) expected += entry.first.rfind(prefix, 0) == 0;
    EXPECT_EQ(found, expected) << name;
    return module;
  }

  static std::map<std::string, at::Tensor> tensors_;
};
std::map<std::string, at::Tensor> Layers::tensors_;

TEST_F(Layers, FeedForward) {
  for (const char* act :
       {"gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"}) {
    std::string name = std::string("feed_forward.") + act;
    auto ff = load(
        make<FeedForward>(12, FeedForwardOptions{.dim_out = 6, .mult = 2, .activation_fn = act}),
        name);
    EXPECT_LT(relative_error(ff(get(name + ".in.hidden_states")), get(name + ".out")), kTolerance)
        << act;
  }
  EXPECT_THROW(make<FeedForward>(12, FeedForwardOptions{.activation_fn = "tanh"}), ArgumentError);
}

TEST_F(Layers, DiffusersRMSNorm) {
  for (const char* name : {"rms_norm", "rms_norm_bf16"}) {
    auto norm = load(make<DiffusersRMSNorm>(12, 1e-6), name);
    at::Tensor out = norm(get(std::string(name) + ".in.hidden_states"));
    EXPECT_EQ(out.scalar_type(), get(std::string(name) + ".out").scalar_type());
    EXPECT_LT(relative_error(out, get(std::string(name) + ".out")), kTolerance) << name;
  }
  at::Tensor plain =
      make<DiffusersRMSNorm>(12, 1e-5, false)(get("rms_norm_plain_bf16.in.hidden_states"));
  EXPECT_TRUE(at::equal(plain, get("rms_norm_plain_bf16.out")));
}

TEST_F(Layers, RMSNormIsTheRootOfTheMeanSquare) {
  auto norm = make<RMSNorm>(12, 1e-6);
  norm->weight.set_data(get("rms_norm.weight.weight"));
  at::Tensor x = get("rms_norm.in.hidden_states").to(at::kDouble);
  at::Tensor expected = x / (x.pow(2).mean(-1, true) + 1e-6).sqrt() * norm->weight;
  EXPECT_LT(relative_error(norm(x.to(at::kFloat)), expected), kTolerance);
}

TEST_F(Layers, GroupNormOverItsGroups) {
  auto norm = make<GroupNorm>(3, 6, 1e-5);
  norm->weight.set_data(at::arange(6).to(at::kFloat) + 1);
  norm->bias.set_data(at::arange(6).to(at::kFloat) * 0.1);
  at::Tensor x = at::arange(2 * 6 * 4, at::kDouble).sin().view({2, 3, 8});
  at::Tensor centered = x - x.mean(-1, true);
  at::Tensor expected =
      (centered / (centered.pow(2).mean(-1, true) + 1e-5).sqrt()).view({2, 6, 4}) *
          norm->weight.view({6, 1}) +
      norm->bias.view({6, 1});
  EXPECT_LT(relative_error(norm(x.view({2, 6, 4}).to(at::kFloat)), expected), kTolerance);
  EXPECT_THROW(make<GroupNorm>(4, 6), ArgumentError);
}

TEST_F(Layers, AdaLayerNorms) {
  auto zero =
      load(make<AdaLayerNormZero>(12), "ada_zero")(get("ada_zero.in.x"), get("ada_zero.in.emb"));
  int index = 0;
  for (const at::Tensor& out : zero.tensors()) {
    std::string name = "ada_zero.out." + std::to_string(index++);
    EXPECT_LT(relative_error(out, get(name)), kTolerance) << name;
  }
  auto single = load(make<AdaLayerNormZeroSingle>(12), "ada_single")(get("ada_single.in.x"),
                                                                     get("ada_single.in.emb"));
  EXPECT_LT(relative_error(single.x, get("ada_single.out.0")), kTolerance);
  EXPECT_LT(relative_error(single.gate_msa, get("ada_single.out.1")), kTolerance);
  auto plain = load(make<AdaLayerNormContinuous>(12, 12, false, 1e-6), "ada_continuous");
  auto rms = load(make<AdaLayerNormContinuous>(12, 12, true, 1e-6, true, "rms_norm"),
                  "ada_continuous_rms");
  for (auto& [module, name] :
       {std::pair{plain, std::string("ada_continuous")}, {rms, "ada_continuous_rms"}}) {
    at::Tensor out = module(get(name + ".in.x"), get(name + ".in.conditioning_embedding"));
    EXPECT_LT(relative_error(out, get(name + ".out")), kTolerance) << name;
  }
  EXPECT_THROW(make<AdaLayerNormContinuous>(12, 12, true, 1e-6, true, "batch_norm"), ArgumentError);
}

TEST_F(Layers, TimestepEmbeddings) {
  at::Tensor t = get("timesteps.plain.in.timesteps");
  EXPECT_TRUE(at::equal(get_timestep_embedding(t, 10), get("timesteps.plain.out")));
  at::Tensor flipped = get_timestep_embedding(t, 11, {true, 0, 1000, 500});
  EXPECT_TRUE(at::equal(flipped, get("timesteps.flipped.out")));
  EXPECT_THROW(get_timestep_embedding(t.view({2, 2}), 10), ArgumentError);

  auto embedding =
      load(make<TimestepEmbedding>(8, 12, "silu", std::nullopt, 4), "timestep_embedding");
  at::Tensor out =
      embedding(get("timestep_embedding.in.sample"), get("timestep_embedding.in.condition"));
  EXPECT_LT(relative_error(out, get("timestep_embedding.out")), kTolerance);

  auto combined = load(make<CombinedTimestepTextProjEmbeddings>(6, 5, true), "combined");
  out = combined(get("combined.in.timestep"), get("combined.in.guidance"),
                 get("combined.in.pooled_projection"));
  // torch takes exp, sin and cos of long rows from MKL, whose last bits depend on the CPU: Python's
  // own result differs by 4.7e-6 between an Intel machine and the AMD one that made the fixture.
  EXPECT_LT(relative_error(out, get("combined.out")), 1e-5);
}

TEST_F(Layers, RotaryEmbeddings) {
  auto freqs = get_1d_rotary_pos_embed(8, get("rotary.neighbours.in.pos"));
  EXPECT_TRUE(at::equal(freqs.first, get("rotary.neighbours.out.0")));
  EXPECT_TRUE(at::equal(freqs.second, get("rotary.neighbours.out.1")));
  EXPECT_TRUE(at::equal(apply_rotary_emb(get("rotary.neighbours.in.x"), freqs, 1),
                        get("rotary.neighbours.out.2")));
  EXPECT_TRUE(
      at::equal(apply_rotary_emb(get("rotary.bf16.in.x"), freqs, 1), get("rotary.bf16.out")));

  freqs =
      get_1d_rotary_pos_embed(8, get("rotary.halves.in.pos"), {500, 2, 1.5, false, at::kDouble});
  EXPECT_TRUE(at::equal(freqs.first, get("rotary.halves.out.0")));
  at::Tensor out =
      apply_rotary_emb(get("rotary.halves.in.x").transpose(1, 2), freqs, 2, RotaryPairs::halves);
  EXPECT_TRUE(at::equal(out, get("rotary.halves.out.2")));
  EXPECT_THROW(get_1d_rotary_pos_embed(7, get("rotary.halves.in.pos")), ArgumentError);
  EXPECT_THROW(apply_rotary_emb(out, freqs, 3), ArgumentError);

  auto pos_embed =
      make<FluxPosEmbed>(10000, std::vector<int64_t>{4, 6, 6})(get("flux_pos_embed.in.ids"));
  EXPECT_TRUE(at::equal(pos_embed.first, get("flux_pos_embed.out.0")));
  EXPECT_TRUE(at::equal(pos_embed.second, get("flux_pos_embed.out.1")));
}

TEST_F(Layers, TheFusedRotationIsBitEqualToTheOperations) {
  // The operations run where gradients are recorded.
  c10::AutoGradMode recording(true);
  auto freqs = get_1d_rotary_pos_embed(16, at::arange(6).to(at::kFloat) * 3.7);
  at::Tensor base = at::arange(2 * 6 * 3 * 40, at::kFloat).sin().view({2, 6, 3, 40}) * 3;
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (RotaryPairs pairs : {RotaryPairs::neighbours, RotaryPairs::halves}) {
      at::Tensor x = base.to(dtype).slice(3, 8, 24);  // rows with gaps between them
      at::Tensor by_operations = apply_rotary_emb(x.detach().requires_grad_(), freqs, 1, pairs);
      EXPECT_TRUE(by_operations.requires_grad());
      EXPECT_TRUE(at::equal(apply_rotary_emb(x, freqs, 1, pairs), by_operations.detach()));
      at::Tensor heads_first = apply_rotary_emb(x.transpose(1, 2), freqs, 2, pairs);
      EXPECT_TRUE(at::equal(heads_first.transpose(1, 2), by_operations.detach()));
    }
  }
}

TEST_F(Layers, Activations) {
  for (const char* name : {"silu", "mish", "gelu", "relu"}) {
    std::string key = std::string("activation.") + name;
    EXPECT_LT(relative_error(get_activation(name)(get(key + ".in.x")), get(key + ".out")),
              kTolerance)
        << name;
  }
  EXPECT_EQ(get_activation("SiLU"), get_activation("swish"));
  EXPECT_THROW(get_activation("softsign"), ArgumentError);
  at::Tensor x = at::linspace(-4, 4, 33, at::kDouble);
  at::Tensor expected = x * 0.5 * (at::tanh((x + x.pow(3) * 0.044715) * std::sqrt(2 / M_PI)) + 1);
  EXPECT_LT(relative_error(get_activation("gelu_new")(x), expected), 1e-12);
  EXPECT_LT(relative_error(get_activation("gelu_tanh")(x), expected), 1e-12);
  EXPECT_LT(relative_error(get_activation("quick_gelu")(x), x / (1 + at::exp(x * -1.702))), 1e-12);
}

TEST(Embedding, RowsComeFromTheTableOrTheSource) {
  auto embedding = make<Embedding>(5, 3);
  at::Tensor ids = at::tensor({4, 0, 4}, at::kLong).view({1, 3});
  EXPECT_TRUE(embedding(ids).isnan().all().item<bool>()) << "a table that is not loaded";

  struct Source : RowSource {
    at::Tensor gather(const at::Tensor& ids) override {
      return ids.unsqueeze(-1).expand({-1, -1, 3}).to(at::kFloat);
    }
  };
  embedding->set_row_source(std::make_shared<Source>());
  EXPECT_EQ(embedding(ids).select(2, 1).sum().item<float>(), 8);
  embedding->set_row_source(nullptr);
  at::Tensor table = at::arange(15, at::kFloat).view({5, 3});
  embedding->weight.set_data(table);
  EXPECT_TRUE(at::equal(embedding(ids)[0], at::stack({table[4], table[0], table[4]})));
}

TEST(Stubs, ALayerWithoutWeightsGivesNaN) {
  at::Tensor x = at::ones({1, 4, 6, 6});
  EXPECT_TRUE(make<Conv2d>(4, 2, Conv2dOptions{})(x).isnan().all().item<bool>());
  EXPECT_TRUE(make<Linear>(6, 3)(x).isnan().all().item<bool>());
  EXPECT_TRUE(make<LayerNorm>(6)(x).isnan().all().item<bool>());
  EXPECT_TRUE(make<RMSNorm>(6)(x).isnan().all().item<bool>());
  EXPECT_TRUE(make<GroupNorm>(2, 4)(x).isnan().all().item<bool>());
}

}  // namespace
}  // namespace ferry::nn
