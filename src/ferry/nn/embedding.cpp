#include "ferry/nn/embedding.h"

#include <ATen/ATen.h>

#include "ferry/weights/stub.h"

namespace ferry::nn {

Embedding::Embedding(int64_t num_embeddings, int64_t embedding_dim) {
  weight = stub_parameter("weight", {num_embeddings, embedding_dim});
}

at::Tensor Embedding::forward(const at::Tensor& ids) {
  at::Tensor found = rows(ids);
  return compute_dtype_ && at::isFloat8Type(found.scalar_type()) ? found.to(*compute_dtype_)
                                                                 : found;
}

at::Tensor Embedding::rows(const at::Tensor& ids) {
  // A table that somebody gave to the module since then comes first.
  if (row_source_ && weights::is_stub(weight)) return row_source_->gather(ids.to(at::kLong));
  if (at::isFloat8Type(weight.scalar_type())) {  // which torch does not index
    return at::embedding(weight.view(at::kByte), ids).view(weight.scalar_type());
  }
  return at::embedding(weight, ids);
}

}  // namespace ferry::nn
