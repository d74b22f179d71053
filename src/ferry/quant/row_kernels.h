// The inner loops of quantized weights: packed rows to float32, bfloat16 or float16, rows of an
// input to int8, and int32 products back. Pure functions on memory, chosen once for the CPU; all
// levels give the same bits, those of float32 arithmetic in the order of the formulas below,
// rounded half to even at the end. NaN stays NaN; as bfloat16 and float16 it is 0x7FC0 and 0x7E00.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace ferry::quant {

enum class Simd : uint8_t { scalar, avx2, avx512 };

// The best that this CPU has; found once.
Simd best_simd();

// For one output dtype, `out`: room for `count` values. Memory need not be aligned to more than
// its elements, block formats not at all.
struct RowKernels {
  // (q - zero) * scale. `scale`, and `zero` unless it is null, hold a value for each `group`
  // values; the last group may be short.
  void (*int8)(const int8_t* q, const float* scale, const float* zero, int64_t group, int64_t count,
               void* out);
  // float8 * scale.
  void (*float8_e4m3)(const uint8_t* q, const float* scale, int64_t group, int64_t count,
                      void* out);
  void (*float8_e5m2)(const uint8_t* q, const float* scale, int64_t group, int64_t count,
                      void* out);
  // Signed 4-bit values, even ones in the low half of their byte (TorchAO's Int4Tensor):
  // q * scale + zero; `zero` may be null. REQUIRES: an even `group`.
  void (*int4)(const uint8_t* q, const float* scale, const float* zero, int64_t group,
               int64_t count, void* out);
  // codebook[q] * absmax[i / block], even ones in the high half of their byte (bitsandbytes nf4
  // and fp4). Values `first` to `first + count` of the flattened weight that `q` and `absmax`
  // begin.
  void (*codebook4)(const uint8_t* q, const float* codebook, const float* absmax, int64_t block,
                    int64_t first, int64_t count, void* out);
  // GGUF blocks. REQUIRES: `count` divisible by 32, for the K formats by 256.
  void (*gguf_q8_0)(const void* blocks, int64_t count, void* out);
  void (*gguf_q4_0)(const void* blocks, int64_t count, void* out);
  void (*gguf_q4_k)(const void* blocks, int64_t count, void* out);
  void (*gguf_q6_k)(const void* blocks, int64_t count, void* out);

  // The other way, `x` in the kernels' dtype: int8 values of the row's symmetric quantization as
  // TorchAO's Int8Tensor.from_hp makes them (torchao_int8.h: quantize_int8). Returns the scale.
  float (*quantize_int8)(const void* x, int64_t count, int8_t* q);
  // One row of a linear layer with quantized input: products * x_scale, rounded to the dtype as
  // TorchAO does, times the scale of each output, plus `bias` (in the dtype; null: none).
  // `products` of the second are whole numbers in float32.
  void (*scale_int32)(const int32_t* products, float x_scale, const float* scales, const void* bias,
                      int64_t count, void* out);
  void (*scale_float)(const float* products, float x_scale, const float* scales, const void* bias,
                      int64_t count, void* out);
};

// dtype: float32, bfloat16 or float16; throws ArgumentError for another. REQUIRES: a CPU that has
// `simd` (anything better than it has is lowered to its best).
const RowKernels& row_kernels(at::ScalarType dtype, Simd simd = best_simd());

}  // namespace ferry::quant
