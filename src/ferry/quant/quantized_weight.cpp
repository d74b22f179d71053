#include "ferry/quant/quantized_weight.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <array>
#include <cstring>
#include <functional>
#include <numeric>

#include "ferry/base/error.h"
#include "ferry/tensor/dtype.h"

namespace ferry::quant {

namespace {

int64_t element_count(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// The rows of a stored tensor whose first dimension they are.
weights::StoredTensor cut_rows(const weights::StoredTensor& stored, int64_t first, int64_t count) {
  if (stored.encoding) {
    throw_error<FormatError>("{}: '{}' is stored encoded and cannot be cut into rows",
                             stored.file->path().string(), stored.key);
  }
  weights::StoredTensor cut = stored;
  uint64_t row_bytes = stored.shape[0] == 0 ? 0 : stored.size_bytes / stored.shape[0];
  cut.shape[0] = count;
  cut.offset = stored.offset + first * row_bytes;
  cut.size_bytes = count * row_bytes;
  return cut;
}

class Dequantize : public weights::Encoding {
 public:
  Dequantize(std::shared_ptr<const QuantizedWeight> weight, weights::StoredTensor inner,
             at::ScalarType dtype)
      : weight_(std::move(weight)), inner_(std::move(inner)), dtype_(dtype) {}

  std::string_view name() const override { return weight_->scheme(); }

  void decode(std::span<const std::byte> stored, std::span<std::byte> into) const override {
    c10::InferenceMode off(false);
    at::Tensor bytes =
        at::empty(inner_.shape, at::TensorOptions().dtype(tensor::to_torch(inner_.dtype)));
    auto into_tensor =
        std::span<std::byte>(static_cast<std::byte*>(bytes.mutable_data_ptr()), bytes.nbytes());
    if (inner_.encoding) {
      inner_.encoding->decode(stored, into_tensor);
    } else {
      std::memcpy(into_tensor.data(), stored.data(), stored.size());
    }
    // Rows at a time, so that the float32 values between are few.
    const int64_t rows = weight_->rows(), row_bytes = static_cast<int64_t>(into.size()) / rows;
    std::array<at::Tensor, 1> components{bytes};
    at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
      weight_->dequantize_rows(components, begin, end - begin, dtype_,
                               into.data() + begin * row_bytes);
    });
  }

 private:
  std::shared_ptr<const QuantizedWeight> weight_;
  weights::StoredTensor inner_;
  at::ScalarType dtype_;
};

}  // namespace

uint64_t QuantizedWeight::size_bytes() const {
  uint64_t sum = 0;
  for (const Component& component : components_)
    sum += element_count(component.shape) * io::item_size(component.dtype);
  return sum;
}

void QuantizedWeight::dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                                      at::ScalarType dtype, void* into) const {
  at::Tensor rows = dequantize(components, dtype).narrow(0, first, count).contiguous();
  std::memcpy(into, rows.const_data_ptr(), rows.nbytes());
}

StoredQuantized QuantizedWeight::rows_of(const std::vector<weights::StoredTensor>& stored,
                                         int64_t first, int64_t count) const {
  StoredQuantized cut{with_rows(count), {}};
  if (!cut.weight) {
    throw_error<FormatError>("{}: '{}' is stored as {}, which cannot be cut into rows",
                             stored.front().file->path().string(), stored.front().key, scheme());
  }
  for (size_t i = 0; i < stored.size(); ++i) {
    const std::vector<int64_t>& shape = components_[i].shape;
    bool by_rows = !shape.empty() && shape[0] == rows() && element_count(shape) > 1;
    if (!by_rows && element_count(shape) > 1) {
      throw_error<FormatError>("{}: '{}' cannot be cut into rows with its weight",
                               stored[i].file->path().string(), stored[i].key);
    }
    cut.components.push_back(by_rows ? cut_rows(stored[i], first, count) : stored[i]);
  }
  return cut;
}

weights::StoredTensor dequantized_when_read(const StoredQuantized& stored, io::Dtype dtype) {
  const weights::StoredTensor& inner = stored.components.front();
  if (stored.components.size() != 1) {
    throw_error<FormatError>(
        "{}: '{}' is stored as {}, but is not a linear layer's weight: ferry computes with such "
        "weights in linear layers only",
        inner.file->path().string(), inner.key, stored.weight->scheme());
  }
  weights::StoredTensor outer = inner;
  outer.dtype = dtype;
  outer.shape = stored.weight->shape().vec();
  outer.encoding = std::make_shared<Dequantize>(stored.weight, inner, tensor::to_torch(dtype));
  return outer;
}

}  // namespace ferry::quant
