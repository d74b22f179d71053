// GGUF's block types as numbers: one function a type, on the calling thread, each value exactly as
// the gguf Python package (gguf/quants.py) computes it in float32. A block of `Q4_K` is 256
// elements of a row in 144 bytes (io/ggml_type.h); blocks of a row follow each other without
// padding.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ferry/io/ggml_type.h"

namespace ferry::quant {

// `blocks`: block_count * io::block_bytes(type) bytes, not aligned; `out`: block_count *
// io::block_elements(type) values.
void dequantize_q8_0(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_q6_k(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_q5_k(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_q4_k(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_q3_k(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_q2_k(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_q5_1(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_q5_0(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_q4_1(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_q4_0(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_iq4_nl(const std::byte* blocks, int64_t block_count, float* out);
void dequantize_iq4_xs(const std::byte* blocks, int64_t block_count, float* out);

// The other way, with the bytes that gguf.quants.quantize() gives for finite values.
void quantize_q8_0(const float* values, int64_t block_count, std::byte* out);
void quantize_q5_1(const float* values, int64_t block_count, std::byte* out);
void quantize_q5_0(const float* values, int64_t block_count, std::byte* out);
void quantize_q4_1(const float* values, int64_t block_count, std::byte* out);
void quantize_q4_0(const float* values, int64_t block_count, std::byte* out);

using DequantizeBlocks = void (*)(const std::byte* blocks, int64_t block_count, float* out);
using QuantizeBlocks = void (*)(const float* values, int64_t block_count, std::byte* out);

// Null for a type that ferry does not compute with (plain types, IQ2_XS, …) or cannot write.
DequantizeBlocks find_dequantize(io::GgmlType type);
QuantizeBlocks find_quantize(io::GgmlType type);

// The sixteen values of IQ4_NL and IQ4_XS, times a scale.
inline constexpr float kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                         1,    13,   25,  38,  53,  69,  89,  113};

}  // namespace ferry::quant
