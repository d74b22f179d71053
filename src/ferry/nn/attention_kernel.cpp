#include "ferry/nn/attention_kernel.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <utility>

#include "ferry/nn/linear_kernels.h"

namespace ferry::nn {

namespace {

using Element = c10::BFloat16;
namespace blas = at::native::cpublas;

// Scores of one block of rows stay in the second-level cache.
constexpr int64_t kScores = 160 << 10;
constexpr int64_t kMostRows = 128;

int64_t rows_of_block(int64_t keys) {
  return std::clamp<int64_t>(kScores / std::max<int64_t>(keys, 1) / 16 * 16, 16, kMostRows);
}

bool multiplies_bf16() {
  // Throws where oneDNN has no such kernel for this CPU, or is not let to.
  alignas(64) const Element a[32] = {}, b[32 * 16] = {};
  alignas(64) float c[16];
  try {
    blas::brgemm(1, 16, 32, 32, 16, 16, false, a, b, c);
    blas::brgemm_release();
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

bool has_dense_pairs(const at::Tensor& x) {
  int64_t all = x.storage_offset();
  for (int d = 0; d < 3; ++d) all |= x.stride(d);
  return x.stride(3) == 1 && all % 2 == 0;
}

// One thread's buffers and the head whose keys and values they hold.
class HeadWorker {
 public:
  HeadWorker(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale,
             const at::Tensor& out)
      : query_(query), key_(key), value_(value), scale_(scale), out_(out) {
    const int64_t rows = std::min(rows_of_block(keys_), query.size(2));
    const auto narrow = at::TensorOptions(at::kBFloat16);
    const auto wide = at::TensorOptions(at::kFloat);
    // Pairs of what is summed over lie side by side, as the products want their right side.
    keys_in_pairs_ = at::empty({dim_ / 2, keys_}, at::kInt);
    values_in_pairs_ = at::zeros({even_keys_ / 2, dim_, 2}, narrow);
    scores_ = at::empty({rows, keys_}, wide);
    weights_ = at::zeros({rows, even_keys_}, narrow);
    sums_ = at::empty({rows, dim_}, wide);
  }

  void take_head(int64_t batch, int64_t head) {
    head_query_ = query_[batch][head];
    head_out_ = out_[batch][head];
    keys_in_pairs_.copy_(key_[batch][head].view(at::kInt).t());
    const at::Tensor values = value_[batch][head];
    const int64_t pairs = keys_ / 2;
    values_in_pairs_.narrow(0, 0, pairs)
        .copy_(values.narrow(0, 0, 2 * pairs).unflatten(0, {pairs, 2}).transpose(1, 2));
    if (keys_ % 2 != 0) values_in_pairs_.select(0, pairs).select(1, 0).copy_(values[keys_ - 1]);
  }

  void run(int64_t begin, int64_t rows) {
    const at::Tensor query = head_query_.narrow(0, begin, rows);
    at::Tensor scores = scores_.narrow(0, 0, rows);
    at::Tensor weights = weights_.narrow(0, 0, rows);
    at::Tensor sums = sums_.narrow(0, 0, rows);
    blas::brgemm(rows, keys_, dim_, query.stride(0), keys_, keys_, false,
                 query.const_data_ptr<Element>(),
                 reinterpret_cast<const Element*>(keys_in_pairs_.const_data_ptr<int32_t>()),
                 scores.mutable_data_ptr<float>());
    // Divided by their sum at the end: the largest weight is 1, which bfloat16 has exactly.
    scores.mul_(scale_);
    scores.sub_(at::amax(scores, -1, /*keepdim=*/true)).exp_();
    const at::Tensor total = at::sum(scores, -1, /*keepdim=*/true);
    weights.narrow(1, 0, keys_).copy_(scores);
    blas::brgemm(rows, dim_, even_keys_, even_keys_, dim_, dim_, false,
                 weights.const_data_ptr<Element>(), values_in_pairs_.const_data_ptr<Element>(),
                 sums.mutable_data_ptr<float>());
    head_out_.narrow(0, begin, rows).copy_(sums.div_(total));
  }

 private:
  const at::Tensor& query_;
  const at::Tensor& key_;
  const at::Tensor& value_;
  const double scale_;
  const at::Tensor& out_;
  const int64_t dim_ = query_.size(3);
  const int64_t keys_ = key_.size(2);
  const int64_t even_keys_ = keys_ + keys_ % 2;
  at::Tensor head_query_, head_out_;
  at::Tensor keys_in_pairs_, values_in_pairs_, scores_, weights_, sums_;
};

}  // namespace

bool has_bf16_attention() {
  static const bool has =
      cpu_features().avx512_bf16 && !blas::could_pack(at::kBFloat16) && !forced_linear_kernel() &&
      choose_linear_kernel(at::Device(at::kCPU), at::kBFloat16).kernel == LinearKernel::native &&
      multiplies_bf16();
  return has;
}

at::Tensor attention_on_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            std::optional<double> scale) {
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2);
  const int64_t keys = key.size(2), dim = query.size(3);
  at::Tensor out = at::empty({batch, tokens, heads, dim}, query.options()).permute({0, 2, 1, 3});
  const at::Tensor q = query.stride(3) == 1 ? query : query.contiguous();
  const at::Tensor k = has_dense_pairs(key) ? key : key.clone(at::MemoryFormat::Contiguous);
  const double factor = scale.value_or(1 / std::sqrt(static_cast<double>(dim)));
  const int64_t block = rows_of_block(keys);
  const int64_t blocks = (tokens + block - 1) / block;
  at::parallel_for(0, batch * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    c10::InferenceMode inference;  // a thread has a mode of its own
    HeadWorker worker(q, k, value, factor, out);
    int64_t taken = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, first = i % blocks * block;
      if (std::exchange(taken, head) != head) worker.take_head(head / heads, head % heads);
      worker.run(first, std::min(block, tokens - first));
    }
    blas::brgemm_release();
  });
  return out;
}

}  // namespace ferry::nn
