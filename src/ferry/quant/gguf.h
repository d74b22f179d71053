// GGUF checkpoints: matrices of blocks as quantized weights, and a file's tensors by name.
#pragma once

#include <filesystem>
#include <memory>

#include "ferry/io/gguf.h"
#include "ferry/quant/quantized_weight.h"
#include "ferry/quant/stored_weights.h"

namespace ferry::quant {

// One component, "blocks": uint8 [out, bytes of a row]. Values are those of the gguf package
// (gguf/quants.py), computed in float32.
class Gguf : public QuantizedWeight {
 public:
  // shape: [out, in]. Throws ArgumentError for a type that ferry does not compute with, a shape
  // that is not two numbers, or rows that are no whole blocks.
  Gguf(std::vector<int64_t> shape, io::GgmlType type);

  std::string_view scheme() const override { return scheme_; }
  io::GgmlType type() const { return type_; }

  at::Tensor dequantize(ComponentTensors components, at::ScalarType dtype) const override;
  void dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override;

 protected:
  std::shared_ptr<const QuantizedWeight> with_rows(int64_t rows) const override;

 private:
  io::GgmlType type_;
  std::string scheme_;
};

// Blocks of any type, uint8 [..., count, bytes of a block] on any device -> float32 [..., count,
// elements of a block].
at::Tensor dequantize_blocks(const at::Tensor& blocks, io::GgmlType type);

struct GgufCheckpoint {
  std::shared_ptr<const io::File> file;
  io::GgufMetadata metadata;
  StoredWeights weights;
};

// Opens a GGUF file; reads its header only. Names are the file's without a leading
// "model.diffusion_model."; shapes are those of `comfy.gguf.orig_shape.*` where the file has them.
// Quantized tensors that are no matrix of whole blocks in their true shape (a convolution, folded
// rows, a vector) are plain ones that are dequantized to float32 when read. Throws IoError, and
// FormatError for: a header that io/gguf.h refuses; a type that ferry does not compute with; a
// true shape of another size; names that are the same without the prefix; one part of a split file.
GgufCheckpoint open_gguf(const std::filesystem::path& path);

}  // namespace ferry::quant
