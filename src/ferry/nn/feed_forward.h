// diffusers' FeedForward (models/attention.py).
#pragma once

#include "ferry/nn/activations.h"

namespace ferry::nn {

struct FeedForwardOptions {
  std::optional<int64_t> dim_out = std::nullopt;
  int64_t mult = 4;
  // Unset: dim * mult.
  std::optional<int64_t> inner_dim = std::nullopt;
  std::string activation_fn = "geglu";
  bool bias = true;
};

// Parameters are named net.0.proj and net.2, as in Python, where net.1 is a dropout.
class FeedForward : public Module {
 public:
  explicit FeedForward(int64_t dim, const FeedForwardOptions& options = {});
  // [..., dim] -> [..., dim_out]
  at::Tensor forward(const at::Tensor& hidden_states);

  Ptr<Container> net;
  Ptr<ActivationProjection> project_in;
  Ptr<Linear> project_out;
};

}  // namespace ferry::nn
