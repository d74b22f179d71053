// Attention in bfloat16 for CPUs with AVX512-BF16 and without AMX. There the library's flash kernel
// multiplies by MKL, which widens to float32 where it is not on an Intel CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace ferry::nn {

// Whether attention_on_cpu() runs here and the library's flash kernel does not use the same
// products. Found once; false where a kernel is forced (forced_linear_kernel()).
bool has_bf16_attention();

// softmax(query key^T * scale) value: products of bfloat16 into float32 and softmax in float32, as
// flash attention has them, with the weights rounded to bfloat16 for the second product.
//
// query [batch, heads, tokens, head_dim], key and value [batch, heads, key tokens, head_dim]:
// bfloat16 on the CPU, not empty, an even head_dim. Unset scale: 1 / sqrt(head_dim). No autograd.
// Returns [batch, heads, tokens, head_dim] laid out as [batch, tokens, heads, head_dim]. A row's
// result depends neither on the number of threads nor on the other heads.
at::Tensor attention_on_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            std::optional<double> scale = std::nullopt);

}  // namespace ferry::nn
