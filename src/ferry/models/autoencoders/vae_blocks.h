// The blocks of the convolutional autoencoders (diffusers models/resnet.py, downsampling.py,
// upsampling.py, unets/unet_2d_blocks.py, and Attention of attention_processor.py as they use it).
// All tensors are [batch, channels, height, width].
#pragma once

#include "ferry/nn/activations.h"
#include "ferry/nn/attention_dispatch.h"
#include "ferry/nn/conv.h"
#include "ferry/nn/norms.h"

namespace ferry::models {

struct VaeBlockOptions {
  int64_t norm_num_groups = 32;
  double eps = 1e-6;
  nn::Activation act = nullptr;
};

// ResnetBlock2D without a time embedding.
class ResnetBlock2D : public nn::Module {
 public:
  ResnetBlock2D(int64_t in_channels, int64_t out_channels, const VaeBlockOptions& options);
  at::Tensor forward(const at::Tensor& input);

  nn::Ptr<nn::GroupNorm> norm1;
  nn::Ptr<nn::Conv2d> conv1;
  nn::Ptr<nn::GroupNorm> norm2;
  nn::Ptr<nn::Conv2d> conv2;
  nn::Ptr<nn::Conv2d> conv_shortcut;  // null where the channels stay

 private:
  nn::Activation act_;
};

// A convolution of stride 2, padded at the right and bottom only for padding 0.
class Downsample2D : public nn::Module {
 public:
  Downsample2D(int64_t channels, int64_t out_channels, int64_t padding);
  at::Tensor forward(const at::Tensor& hidden_states);

  nn::Ptr<nn::Conv2d> conv;

 private:
  int64_t padding_;
};

// Nearest neighbours to twice the size, then a convolution.
class Upsample2D : public nn::Module {
 public:
  Upsample2D(int64_t channels, int64_t out_channels);
  at::Tensor forward(const at::Tensor& hidden_states);

  nn::Ptr<nn::Conv2d> conv;
};

// diffusers' Attention as the autoencoders use it: over all pixels, with a group norm before and
// the input added.
class VaeAttention : public nn::AttentionModule {
 public:
  VaeAttention(int64_t channels, int64_t head_dim, const VaeBlockOptions& options);
  at::Tensor forward(const at::Tensor& hidden_states);

  std::vector<std::string> available_processors() const override;
  std::string processor_name() const override;
  void set_processor(const std::string& name) override;
  void fuse_projections() override;
  void unfuse_projections() override;

  nn::Ptr<nn::GroupNorm> group_norm;
  nn::Ptr<nn::Linear> to_q, to_k, to_v;
  nn::Ptr<nn::Linear> to_qkv;  // only while fused
  nn::Ptr<nn::Container> to_out;
  nn::Ptr<nn::Linear> to_out_0;

 private:
  int64_t head_dim_;
};

class UNetMidBlock2D : public nn::Module {
 public:
  UNetMidBlock2D(int64_t channels, bool add_attention, const VaeBlockOptions& options);
  at::Tensor forward(const at::Tensor& hidden_states);

  nn::Ptr<nn::ModuleList<VaeAttention>> attentions;  // empty without attention
  nn::Ptr<nn::ModuleList<ResnetBlock2D>> resnets;
};

class DownEncoderBlock2D : public nn::Module {
 public:
  DownEncoderBlock2D(int64_t in_channels, int64_t out_channels, int64_t num_layers,
                     bool add_downsample, const VaeBlockOptions& options);
  at::Tensor forward(const at::Tensor& hidden_states);

  nn::Ptr<nn::ModuleList<ResnetBlock2D>> resnets;
  nn::Ptr<nn::ModuleList<Downsample2D>> downsamplers;  // null in the last block
};

class UpDecoderBlock2D : public nn::Module {
 public:
  UpDecoderBlock2D(int64_t in_channels, int64_t out_channels, int64_t num_layers, bool add_upsample,
                   const VaeBlockOptions& options);
  at::Tensor forward(const at::Tensor& hidden_states);

  nn::Ptr<nn::ModuleList<ResnetBlock2D>> resnets;
  nn::Ptr<nn::ModuleList<Upsample2D>> upsamplers;  // null in the last block
};

}  // namespace ferry::models
