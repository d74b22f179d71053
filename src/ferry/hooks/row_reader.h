// Rows of an embedding table, gathered from disk: T5's table is 263 MB, a prompt needs a few KB of
// it.
#pragma once

#include "ferry/nn/embedding.h"
#include "ferry/weights/binding.h"

namespace ferry::hooks {

// Thread-safe. Shares the checkpoint's file with the binding.
class RowReader : public nn::RowSource {
 public:
  explicit RowReader(weights::BoundSlot bound) : bound_(std::move(bound)) {}

  // ids: int64 of any shape. Returns [...ids, row], in the slot's dtype. Throws ArgumentError for
  // an id outside the table or ids that are no integers, IoError.
  at::Tensor gather(const at::Tensor& ids) override;

 private:
  weights::BoundSlot bound_;
};

}  // namespace ferry::hooks
