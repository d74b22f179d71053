// The element types of GGUF files (ggml's): plain ones, and blocks that hold a run of a row's
// elements. No torch, no maths: quant/gguf_blocks.h has that.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "ferry/io/dtype.h"

namespace ferry::io {

// ggml's numbers.
enum class GgmlType : uint32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q8_1 = 9,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  Q8_K = 15,
  IQ2_XXS = 16,
  IQ2_XS = 17,
  IQ3_XXS = 18,
  IQ1_S = 19,
  IQ4_NL = 20,
  IQ3_S = 21,
  IQ2_S = 22,
  IQ4_XS = 23,
  I8 = 24,
  I16 = 25,
  I32 = 26,
  I64 = 27,
  F64 = 28,
  IQ1_M = 29,
  BF16 = 30,
  TQ1_0 = 34,
  TQ2_0 = 35,
  MXFP4 = 39,
  NVFP4 = 40,
};

// Throws nothing; every GgmlType has all three.
std::string_view name(GgmlType type);
int64_t block_elements(GgmlType type);  // 1 for a plain type
int64_t block_bytes(GgmlType type);

// The type of ggml's number, or nothing for one that ferry has never heard of.
std::optional<GgmlType> parse_ggml_type(uint32_t number);
// The type of a name ("Q4_K"), or nothing.
std::optional<GgmlType> parse_ggml_type(std::string_view name);

// The dtype of a plain type, or nothing for blocks.
std::optional<Dtype> plain_dtype(GgmlType type);
// The plain type of a dtype, or nothing for one that GGUF has not.
std::optional<GgmlType> plain_ggml_type(Dtype dtype);

}  // namespace ferry::io
