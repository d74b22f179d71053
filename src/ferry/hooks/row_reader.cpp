#include "ferry/hooks/row_reader.h"

#include <ATen/ATen.h>

#include "ferry/base/error.h"
#include "ferry/tensor/dtype.h"

namespace ferry::hooks {

at::Tensor RowReader::gather(const at::Tensor& ids) {
  const weights::StoredTensor& source = bound_.source;
  const int64_t rows = source.shape.at(0);
  const uint64_t row_bytes = source.size_bytes / static_cast<uint64_t>(std::max<int64_t>(rows, 1));
  if (!at::isIntegralType(ids.scalar_type(), /*includeBool=*/false)) {
    throw_error<ArgumentError>("{}: ids have to be integers, got {}", bound_.slot.name(),
                               tensor::dtype_name(ids.scalar_type()));
  }
  if (at::GradMode::is_enabled() && bound_.slot.tensor.requires_grad()) {
    throw_error<ArgumentError>(
        "{}: rows that are gathered from disk have no gradient; offload with gather_embeddings "
        "off, "
        "or do not train the table",
        bound_.slot.name());
  }
  at::Tensor flat = ids.to(at::kCPU, at::kLong).reshape({-1}).contiguous();
  auto [unique, inverse] = at::_unique(flat, /*sorted=*/true, /*return_inverse=*/true);

  std::vector<int64_t> shape(source.shape.begin(), source.shape.end());
  shape[0] = unique.numel();
  at::Tensor table = at::empty(shape, at::TensorOptions().dtype(tensor::to_torch(source.dtype)));
  auto* into = static_cast<std::byte*>(table.mutable_data_ptr());
  source.file->check_unchanged();
  const int64_t* wanted = unique.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < unique.numel(); ++i) {
    if (wanted[i] < 0 || wanted[i] >= rows) {
      throw_error<ArgumentError>("{}: id {} is outside the table of {} rows", bound_.slot.name(),
                                 wanted[i], rows);
    }
    source.file->read_exact(source.offset + static_cast<uint64_t>(wanted[i]) * row_bytes, row_bytes,
                            into + static_cast<uint64_t>(i) * row_bytes);
  }
  std::vector<int64_t> result(ids.sizes().begin(), ids.sizes().end());
  result.insert(result.end(), shape.begin() + 1, shape.end());
  return table.to(bound_.slot.dtype())
      .index_select(0, inverse)
      .reshape(result)
      .to(bound_.slot.tensor.device());
}

}  // namespace ferry::hooks
