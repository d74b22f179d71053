#include "ferry/nn/activations.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <utility>

#include "ferry/base/error.h"

namespace ferry::nn {

namespace {

at::Tensor silu(const at::Tensor& x) {
  return at::silu(x);
}
at::Tensor silu_fp32(const at::Tensor& x) {
  return at::silu(x.to(at::kFloat)).to(x.scalar_type());
}
at::Tensor mish(const at::Tensor& x) {
  return at::mish(x);
}
at::Tensor relu(const at::Tensor& x) {
  return at::relu(x);
}
at::Tensor gelu(const at::Tensor& x) {
  return at::gelu(x);
}
at::Tensor gelu_tanh(const at::Tensor& x) {
  return at::gelu(x, "tanh");
}
// transformers' QuickGELUActivation.
at::Tensor quick_gelu(const at::Tensor& x) {
  return x * at::sigmoid(x * 1.702);
}
// transformers' NewGELUActivation, in its order of operations.
at::Tensor gelu_new(const at::Tensor& x) {
  constexpr double kRootOfTwoOverPi = 0.7978845608028654;
  return (x * 0.5) * (at::tanh((x + at::pow(x, 3.0) * 0.044715) * kRootOfTwoOverPi) + 1.0);
}

constexpr std::array<std::pair<const char*, Activation>, 11> kActivations{{
    {"silu", silu},
    {"swish", silu},
    {"mish", mish},
    {"gelu", gelu},
    {"gelu_tanh", gelu_tanh},
    {"gelu_pytorch_tanh", gelu_tanh},
    {"gelu_new", gelu_new},
    {"quick_gelu", quick_gelu},
    {"relu", relu},
    {"silu_fp32", silu_fp32},
    {"fp32_silu", silu_fp32},
}};

using Kind = ActivationProjection::Kind;
constexpr std::array<std::pair<const char*, Kind>, 6> kKinds{{
    {"gelu", Kind::gelu},
    {"gelu-approximate", Kind::gelu_approximate},
    {"geglu", Kind::geglu},
    {"geglu-approximate", Kind::geglu_approximate},
    {"swiglu", Kind::swiglu},
    {"linear-silu", Kind::linear_silu},
}};

template <class Table>
auto look_up(const Table& table, const std::string& name, const char* what) {
  std::string known;
  for (const auto& [key, value] : table) {
    if (name == key) return value;
    known += known.empty() ? key : std::string(", ") + key;
  }
  throw_error<ArgumentError>("{} '{}' is unknown; known are {}", what, name, known);
}

}  // namespace

Activation get_activation(const std::string& name) {
  std::string lower = name;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return look_up(kActivations, lower, "activation function");
}

Kind ActivationProjection::parse_kind(const std::string& activation_fn) {
  return look_up(kKinds, activation_fn, "activation_fn");
}

ActivationProjection::ActivationProjection(Kind kind, int64_t dim_in, int64_t dim_out,
                                           bool with_bias)
    : kind_(kind) {
  bool gated = kind == Kind::geglu || kind == Kind::swiglu;
  proj = register_module("proj", make<Linear>(dim_in, gated ? 2 * dim_out : dim_out, with_bias));
}

at::Tensor ActivationProjection::forward(const at::Tensor& hidden_states) {
  at::Tensor x = proj(hidden_states);
  switch (kind_) {
    case Kind::gelu:
      return at::gelu(x);
    case Kind::gelu_approximate:
      return at::gelu(x, "tanh");
    case Kind::geglu_approximate:
      return x * at::sigmoid(x * 1.702);
    case Kind::linear_silu:
      return at::silu(x);
    case Kind::geglu: {
      auto halves = x.chunk(2, -1);
      return halves[0] * at::gelu(halves[1]);
    }
    case Kind::swiglu: {
      auto halves = x.chunk(2, -1);
      return halves[0] * at::silu(halves[1]);
    }
  }
  throw_error<ArgumentError>("ActivationProjection: unknown kind");
}

}  // namespace ferry::nn
