#include "ferry/nn/rotary_kernel.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

namespace ferry::nn {

namespace {

template <class T>
void rotate_neighbours(const T* x, const float* cos, const float* sin, T* out, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 2) {
    float even = x[i], odd = x[i + 1];
    out[i] = static_cast<T>(even * cos[i] + -odd * sin[i]);
    out[i + 1] = static_cast<T>(odd * cos[i + 1] + even * sin[i + 1]);
  }
}

template <class T>
void rotate_halves(const T* x, const float* cos, const float* sin, T* out, int64_t dim) {
  int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    float first = x[i], second = x[i + half];
    out[i] = static_cast<T>(first * cos[i] + -second * sin[i]);
    out[i + half] = static_cast<T>(second * cos[i + half] + first * sin[i + half]);
  }
}

}  // namespace

at::Tensor rotate_on_cpu(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                         int64_t sequence_dim, bool neighbours) {
  int64_t outer = x.size(1), inner = x.size(2), dim = x.size(3);
  at::Tensor out = at::empty(x.sizes(), x.options());
  const float* cos_data = cos.const_data_ptr<float>();
  const float* sin_data = sin.const_data_ptr<float>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "rotate_on_cpu", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* into = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0) * outer * inner, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        int64_t b = row / (outer * inner), i = row / inner % outer, j = row % inner;
        int64_t token = sequence_dim == 1 ? i : j;
        const scalar_t* source = from + b * x.stride(0) + i * x.stride(1) + j * x.stride(2);
        auto rotate = neighbours ? rotate_neighbours<scalar_t> : rotate_halves<scalar_t>;
        rotate(source, cos_data + token * dim, sin_data + token * dim, into + row * dim, dim);
      }
    });
  });
  return out;
}

}  // namespace ferry::nn
