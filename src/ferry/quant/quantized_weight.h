// A quantized weight: a matrix held as several plain tensors, its components, or as one whose bytes
// are blocks. Layers register the components as their slots, so that whoever moves, saves, counts
// or compares weights needs to know nothing of this.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/weights/checkpoint.h"

namespace ferry::quant {

// One tensor of a quantized weight. The slot of component "scale" of parameter "to_q.weight" is
// "to_q.weight_scale".
struct Component {
  std::string name;
  io::Dtype dtype = io::Dtype::U8;
  std::vector<int64_t> shape;
};

// A weight's components, in the order of QuantizedWeight::components().
using ComponentTensors = std::span<const at::Tensor>;

// What a linear layer does with its input before the product.
enum class Activation : uint8_t {
  as_is,
  int8_per_token,  // symmetric, one scale a row of the input
  float8_per_token,
  float8_per_tensor,
};

class QuantizedWeight;

// A weight that is a matrix of one-byte numbers times a scale.
struct ScaledMatrix {
  at::Tensor values;  // [out, in], int8 or a float8
  at::Tensor scale;   // float32, [out, 1]: a scale a row; or [1, 1]: one for all
};

// Some rows of a stored weight: the description and where its components are.
struct StoredQuantized {
  std::shared_ptr<const QuantizedWeight> weight;
  std::vector<weights::StoredTensor> components;
};

// How components make a weight. Immutable and thread-safe; one a weight. Holds no tensor.
class QuantizedWeight {
 public:
  // shape: [out, in].
  QuantizedWeight(std::vector<int64_t> shape, std::vector<Component> components)
      : shape_(std::move(shape)), components_(std::move(components)) {}
  virtual ~QuantizedWeight() = default;

  // For logs, reports and messages: "TorchAO int8", "GGUF Q4_K", "bitsandbytes nf4".
  virtual std::string_view scheme() const = 0;
  at::IntArrayRef shape() const { return shape_; }
  int64_t rows() const { return shape_[0]; }
  int64_t columns() const { return shape_[1]; }
  const std::vector<Component>& components() const { return components_; }
  uint64_t size_bytes() const;

  virtual Activation activation() const { return Activation::as_is; }

  // The whole weight, [out, in], by torch's operators, on the device of the components: each value
  // is what the reference computes in float32, rounded to `dtype` once at the end. The other
  // functions are checked against this one.
  virtual at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const = 0;

  // Rows `first` to `first + count` on the CPU into `into`, [count, in], contiguous, bit-equal to
  // dequantize(). dtype: float32, bfloat16 or float16. Runs on the calling thread alone: the caller
  // gives each thread rows of its own. The default dequantizes the whole weight.
  virtual void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                               at::ScalarType dtype, void* into) const;

  // The weight as a matrix that kernels can multiply as it is, where its input is quantized too and
  // nothing but a scale stands between. The default: nothing, the weight is dequantized.
  virtual std::optional<ScaledMatrix> as_scaled_matrix(ComponentTensors components) const {
    return std::nullopt;
  }

  // Rows `first` to `first + count` of a stored weight as one of their own, without reading. The
  // default cuts the components whose first dimension is the rows and shares those of one element.
  // Throws FormatError where the format cannot be cut there.
  virtual StoredQuantized rows_of(const std::vector<weights::StoredTensor>& stored, int64_t first,
                                  int64_t count) const;

 protected:
  // The same scheme for another number of rows, for rows_of(). Null: cannot be cut.
  virtual std::shared_ptr<const QuantizedWeight> with_rows(int64_t rows) const { return nullptr; }

 private:
  std::vector<int64_t> shape_;
  std::vector<Component> components_;
};

// A stored tensor whose reader gets the dequantized weight as `dtype`: for parameters that are no
// linear layer's (an embedding table in a GGUF file). Throws FormatError for a weight of several
// components.
weights::StoredTensor dequantized_when_read(const StoredQuantized& stored, io::Dtype dtype);

}  // namespace ferry::quant
