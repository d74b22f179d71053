// torch.nn.Embedding, whose table may stay on disk.
#pragma once

#include "ferry/nn/module.h"

namespace ferry::nn {

// Where rows of a table come from while the table itself is not in memory.
struct RowSource {
  virtual ~RowSource() = default;
  // ids: int64, any shape [...] -> [..., embedding_dim], in the dtype and on the device that the
  // table would have. Throws IoError, and ArgumentError for an id outside the table.
  virtual at::Tensor gather(const at::Tensor& ids) = 0;
};

class Embedding : public Module {
 public:
  Embedding(int64_t num_embeddings, int64_t embedding_dim);
  // ids [...] (int64 or int32) -> [..., embedding_dim]
  at::Tensor forward(const at::Tensor& ids);

  // What rows of a table that is kept in a float8 dtype are widened to.
  void set_compute_dtype(at::ScalarType dtype) { compute_dtype_ = dtype; }

  // Null: back to the table. While a source is set, `weight` may stay a stub.
  void set_row_source(std::shared_ptr<RowSource> source) { row_source_ = std::move(source); }
  const std::shared_ptr<RowSource>& row_source() const { return row_source_; }

  at::Tensor weight;  // [num_embeddings, embedding_dim]

 private:
  at::Tensor rows(const at::Tensor& ids);
  std::shared_ptr<RowSource> row_source_;
  std::optional<at::ScalarType> compute_dtype_;
};

}  // namespace ferry::nn
