#include "ferry/nn/feed_forward.h"

namespace ferry::nn {

FeedForward::FeedForward(int64_t dim, const FeedForwardOptions& options) {
  int64_t inner_dim = options.inner_dim.value_or(dim * options.mult);
  net = register_module("net", make<Container>());
  project_in = net->add(
      "0", make<ActivationProjection>(ActivationProjection::parse_kind(options.activation_fn), dim,
                                      inner_dim, options.bias));
  project_out = net->add("2", make<Linear>(inner_dim, options.dim_out.value_or(dim), options.bias));
}

at::Tensor FeedForward::forward(const at::Tensor& hidden_states) {
  return project_out(project_in(hidden_states));
}

}  // namespace ferry::nn
