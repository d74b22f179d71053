#include "ferry/models/autoencoders/vae_blocks.h"

#include <ATen/ATen.h>

#include "ferry/base/error.h"

namespace ferry::models {

namespace {

nn::Ptr<nn::Conv2d> conv3x3(int64_t in, int64_t out, int64_t stride = 1, int64_t padding = 1) {
  return nn::make<nn::Conv2d>(
      in, out, nn::Conv2dOptions{.kernel_size = 3, .stride = stride, .padding = padding});
}

}  // namespace

ResnetBlock2D::ResnetBlock2D(int64_t in_channels, int64_t out_channels,
                             const VaeBlockOptions& options)
    : act_(options.act) {
  int64_t groups = options.norm_num_groups;
  norm1 = register_module("norm1", nn::make<nn::GroupNorm>(groups, in_channels, options.eps));
  conv1 = register_module("conv1", conv3x3(in_channels, out_channels));
  norm2 = register_module("norm2", nn::make<nn::GroupNorm>(groups, out_channels, options.eps));
  conv2 = register_module("conv2", conv3x3(out_channels, out_channels));
  if (in_channels != out_channels) {
    conv_shortcut = register_module(
        "conv_shortcut",
        nn::make<nn::Conv2d>(in_channels, out_channels, nn::Conv2dOptions{.kernel_size = 1}));
  }
}

at::Tensor ResnetBlock2D::forward(const at::Tensor& input) {
  // One name, so that each tensor is freed as the next one is there.
  at::Tensor x = norm1(input);
  x = act_(x);
  x = conv1(x);
  x = norm2(x);
  x = act_(x);
  x = conv2(x);
  return (conv_shortcut ? conv_shortcut(input) : input) + x;
}

Downsample2D::Downsample2D(int64_t channels, int64_t out_channels, int64_t padding)
    : padding_(padding) {
  conv = register_module("conv", conv3x3(channels, out_channels, /*stride=*/2, padding));
}

at::Tensor Downsample2D::forward(const at::Tensor& hidden_states) {
  if (padding_ != 0) return conv(hidden_states);
  return conv(at::constant_pad_nd(hidden_states, {0, 1, 0, 1}));
}

Upsample2D::Upsample2D(int64_t channels, int64_t out_channels) {
  conv = register_module("conv", conv3x3(channels, out_channels));
}

at::Tensor Upsample2D::forward(const at::Tensor& hidden_states) {
  at::Tensor x = hidden_states;
  // The channels-last kernel fails for large tensors (pytorch issues 81665 and 141831).
  if (x.size(0) >= 64 || x.numel() * 2 > int64_t{1} << 31) x = x.contiguous();
  x = at::upsample_nearest2d(x, {2 * x.size(2), 2 * x.size(3)}, 2.0, 2.0);
  return conv(x);
}

VaeAttention::VaeAttention(int64_t channels, int64_t head_dim, const VaeBlockOptions& options)
    : head_dim_(head_dim) {
  group_norm = register_module(
      "group_norm", nn::make<nn::GroupNorm>(options.norm_num_groups, channels, options.eps));
  to_q = register_module("to_q", nn::make<nn::Linear>(channels, channels));
  to_k = register_module("to_k", nn::make<nn::Linear>(channels, channels));
  to_v = register_module("to_v", nn::make<nn::Linear>(channels, channels));
  to_out = register_module("to_out", nn::make<nn::Container>());
  to_out_0 = to_out->add("0", nn::make<nn::Linear>(channels, channels));
}

at::Tensor VaeAttention::forward(const at::Tensor& hidden_states) {
  // [batch, channels, height * width] -> [batch, pixels, channels]
  at::Tensor x = group_norm(hidden_states.flatten(2)).transpose(1, 2);
  at::Tensor query, key, value;
  if (to_qkv) {
    auto parts = to_qkv(x).chunk(3, -1);
    query = parts[0], key = parts[1], value = parts[2];
  } else {
    query = to_q(x), key = to_k(x), value = to_v(x);
  }
  auto split = [&](const at::Tensor& t) { return t.unflatten(-1, {-1, head_dim_}); };
  x = nn::dispatch_attention(split(query), split(key), split(value),
                             {.backend = attention_backend()});
  x = to_out_0(x.flatten(2, 3).to(query.scalar_type()));  // [batch, pixels, channels]
  return x.transpose(-1, -2).reshape(hidden_states.sizes()) + hidden_states;
}

std::vector<std::string> VaeAttention::available_processors() const {
  return {"AttnProcessor2_0", "FusedAttnProcessor2_0"};
}

std::string VaeAttention::processor_name() const {
  return fused_projections() ? "FusedAttnProcessor2_0" : "AttnProcessor2_0";
}

void VaeAttention::set_processor(const std::string& name) {
  if (name == "AttnProcessor2_0") return unfuse_projections();
  if (name == "FusedAttnProcessor2_0") return fuse_projections();
  throw_error<ArgumentError>(
      "VaeAttention: processor '{}' is unknown; known are AttnProcessor2_0, FusedAttnProcessor2_0",
      name);
}

void VaeAttention::fuse_projections() {
  if (fused_projections()) return;
  to_qkv = register_module("to_qkv", fuse_linears({to_q, to_k, to_v}));
  set_fused_projections(true);
}

void VaeAttention::unfuse_projections() {
  if (!fused_projections()) return;
  unregister_module("to_qkv");
  to_qkv = nullptr;
  set_fused_projections(false);
}

UNetMidBlock2D::UNetMidBlock2D(int64_t channels, bool add_attention,
                               const VaeBlockOptions& options) {
  attentions = register_module("attentions", nn::make<nn::ModuleList<VaeAttention>>());
  resnets = register_module("resnets", nn::make<nn::ModuleList<ResnetBlock2D>>());
  if (add_attention) attentions->push_back(nn::make<VaeAttention>(channels, channels, options));
  resnets->push_back(nn::make<ResnetBlock2D>(channels, channels, options));
  resnets->push_back(nn::make<ResnetBlock2D>(channels, channels, options));
}

at::Tensor UNetMidBlock2D::forward(const at::Tensor& hidden_states) {
  at::Tensor x = (*resnets)[0](hidden_states);
  if (!attentions->empty()) x = (*attentions)[0](x);
  return (*resnets)[1](x);
}

DownEncoderBlock2D::DownEncoderBlock2D(int64_t in_channels, int64_t out_channels,
                                       int64_t num_layers, bool add_downsample,
                                       const VaeBlockOptions& options) {
  resnets = register_module("resnets", nn::make<nn::ModuleList<ResnetBlock2D>>());
  for (int64_t i = 0; i < num_layers; ++i) {
    resnets->push_back(
        nn::make<ResnetBlock2D>(i == 0 ? in_channels : out_channels, out_channels, options));
  }
  if (!add_downsample) return;
  downsamplers = register_module("downsamplers", nn::make<nn::ModuleList<Downsample2D>>());
  downsamplers->push_back(nn::make<Downsample2D>(out_channels, out_channels, /*padding=*/0));
}

at::Tensor DownEncoderBlock2D::forward(const at::Tensor& hidden_states) {
  at::Tensor x = hidden_states;
  for (const auto& resnet : *resnets) x = resnet(x);
  return downsamplers ? (*downsamplers)[0](x) : x;
}

UpDecoderBlock2D::UpDecoderBlock2D(int64_t in_channels, int64_t out_channels, int64_t num_layers,
                                   bool add_upsample, const VaeBlockOptions& options) {
  resnets = register_module("resnets", nn::make<nn::ModuleList<ResnetBlock2D>>());
  for (int64_t i = 0; i < num_layers; ++i) {
    resnets->push_back(
        nn::make<ResnetBlock2D>(i == 0 ? in_channels : out_channels, out_channels, options));
  }
  if (!add_upsample) return;
  upsamplers = register_module("upsamplers", nn::make<nn::ModuleList<Upsample2D>>());
  upsamplers->push_back(nn::make<Upsample2D>(out_channels, out_channels));
}

at::Tensor UpDecoderBlock2D::forward(const at::Tensor& hidden_states) {
  at::Tensor x = hidden_states;
  for (const auto& resnet : *resnets) x = resnet(x);
  return upsamplers ? (*upsamplers)[0](x) : x;
}

}  // namespace ferry::models
