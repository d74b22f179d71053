// Weights of small floats with a small float as the scale of each block of a row: the OCP
// Microscaling formats (MXFP8, MXFP4) and NVIDIA's NVFP4, as TorchAO and ComfyUI store them.
#pragma once

#include <optional>

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// Components: "qdata", F8_E4M3 or F8_E5M2 [out, in], or U8 [out, in / 2] with two E2M1 codes a
// byte; "scale", one a block of block_size columns: [out, in / block_size], or swizzled; and with
// `per_tensor_scale` that, one float32.
// weight = float(qdata) * (per_tensor_scale * float(scale)), in float32.
//
// Swizzled scales are in the tiles of 128 rows and 4 columns that cuBLAS reads: of the matrix of
// scales padded with zeros to full tiles, (r, c) is at byte
// ((r / 128) * tiles_in_row + c / 4) * 512 + (r % 32) * 16 + (r % 128) / 32 * 4 + c % 4.
class BlockScaledWeight : public QuantizedWeight {
 public:
  struct Options {
    io::Dtype elements = io::Dtype::U8;  // F8_E4M3, F8_E5M2, or U8: E2M1
    bool high_nibble_first = false;      // of E2M1; TorchAO: false, ComfyUI: true
    int64_t block_size = 16;
    io::Dtype scale_format = io::Dtype::F8_E4M3;  // or F8_E8M0
    // As which the scales are stored: scale_format, or U8 for its bytes.
    io::Dtype scale_dtype = io::Dtype::F8_E4M3;
    bool swizzled = false;
    // As stored. Swizzled scales come in several shapes: only their number is given.
    std::vector<int64_t> scale_shape = {};
    // The shape it is stored in, [] or [1]; nothing: there is none.
    std::optional<std::vector<int64_t>> per_tensor_scale = {};
    std::string scheme = "TorchAO NVFP4";
  };
  // Throws ArgumentError for columns that are no whole blocks, or are odd for E2M1, another number
  // of scales, other dtypes.
  BlockScaledWeight(std::vector<int64_t> shape, Options options);

  std::string_view scheme() const override { return options_.scheme; }
  const Options& options() const { return options_; }

  at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const override;
  void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override;

 protected:
  std::shared_ptr<const QuantizedWeight> with_rows(int64_t rows) const override;

 private:
  int64_t scale_columns() const { return columns() / options_.block_size; }

  Options options_;
};

// Bytes of the swizzled scales of a weight: those of whole tiles.
int64_t swizzled_count(int64_t rows, int64_t scale_columns);

}  // namespace ferry::quant
