// bitsandbytes' 4-bit weights, nf4 and fp4: blocks over the flattened weight, a table of 16 values.
#pragma once

#include <optional>

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// Components: "qdata", the bytes of [out * in / 2, rounded up] seen as the dtype of quant_storage,
// the first value in the high nibble; "absmax" [blocks], float32, or with `nested` uint8;
// "quant_map" float32 [16]; with `nested` "nested_absmax" float32 [blocks / nested block size,
// rounded up] and "nested_quant_map" float32 [256].
// Value i of the flattened weight is quant_map[code i] * absmax[i / block_size], in float32, with
// `nested` absmax[b] = nested_quant_map[absmax[b]] * nested_absmax[b / nested block size] + offset.
class BitsAndBytes4bitWeight : public QuantizedWeight {
 public:
  struct Nested {
    int64_t block_size = 256;
    float offset = 0;
  };
  struct Options {
    std::string quant_type = "nf4";  // or "fp4": for messages and writing; quant_map decides
    int64_t block_size = 64;
    std::optional<Nested> nested = {};
    io::Dtype storage = io::Dtype::U8;
    std::vector<int64_t> qdata_shape = {};  // as stored; empty: [elements, 1]
  };
  // Throws ArgumentError for another quant_type, a block size out of range, or a qdata_shape of
  // another number of bytes.
  BitsAndBytes4bitWeight(std::vector<int64_t> shape, Options options);

  std::string_view scheme() const override {
    return options_.quant_type == "nf4" ? "bitsandbytes nf4" : "bitsandbytes fp4";
  }
  const Options& options() const { return options_; }

  at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const override;
  void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override;
  // Only on the borders of blocks, and of nested blocks where there are.
  StoredQuantized rows_of(const std::vector<weights::StoredTensor>& stored, int64_t first,
                          int64_t count) const override;

 private:
  Options options_;
};

// The components of a BitsAndBytes4bitWeight without nesting.
struct Nf4Components {
  at::Tensor qdata, absmax, quant_map;
};

// What bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4") gives on a CPU, bit for bit.
// weight: [out, in], float32, bfloat16 or float16.
Nf4Components quantize_nf4(const at::Tensor& weight, int64_t block_size = 64);

}  // namespace ferry::quant
