#include "ferry/io/ggml_type.h"

namespace ferry::io {
namespace {

struct Entry {
  GgmlType type;
  std::string_view name;
  int64_t elements;
  int64_t bytes;
  std::optional<Dtype> dtype = {};
};

// Sizes as ggml's type traits have them (gguf.GGML_QUANT_SIZES in Python).
constexpr Entry kTypes[] = {
    {GgmlType::F32, "F32", 1, 4, Dtype::F32},
    {GgmlType::F16, "F16", 1, 2, Dtype::F16},
    {GgmlType::Q4_0, "Q4_0", 32, 18},
    {GgmlType::Q4_1, "Q4_1", 32, 20},
    {GgmlType::Q5_0, "Q5_0", 32, 22},
    {GgmlType::Q5_1, "Q5_1", 32, 24},
    {GgmlType::Q8_0, "Q8_0", 32, 34},
    {GgmlType::Q8_1, "Q8_1", 32, 40},
    {GgmlType::Q2_K, "Q2_K", 256, 84},
    {GgmlType::Q3_K, "Q3_K", 256, 110},
    {GgmlType::Q4_K, "Q4_K", 256, 144},
    {GgmlType::Q5_K, "Q5_K", 256, 176},
    {GgmlType::Q6_K, "Q6_K", 256, 210},
    {GgmlType::Q8_K, "Q8_K", 256, 292},
    {GgmlType::IQ2_XXS, "IQ2_XXS", 256, 66},
    {GgmlType::IQ2_XS, "IQ2_XS", 256, 74},
    {GgmlType::IQ3_XXS, "IQ3_XXS", 256, 98},
    {GgmlType::IQ1_S, "IQ1_S", 256, 50},
    {GgmlType::IQ4_NL, "IQ4_NL", 32, 18},
    {GgmlType::IQ3_S, "IQ3_S", 256, 110},
    {GgmlType::IQ2_S, "IQ2_S", 256, 82},
    {GgmlType::IQ4_XS, "IQ4_XS", 256, 136},
    {GgmlType::I8, "I8", 1, 1, Dtype::I8},
    {GgmlType::I16, "I16", 1, 2, Dtype::I16},
    {GgmlType::I32, "I32", 1, 4, Dtype::I32},
    {GgmlType::I64, "I64", 1, 8, Dtype::I64},
    {GgmlType::F64, "F64", 1, 8, Dtype::F64},
    {GgmlType::IQ1_M, "IQ1_M", 256, 56},
    {GgmlType::BF16, "BF16", 1, 2, Dtype::BF16},
    {GgmlType::TQ1_0, "TQ1_0", 256, 54},
    {GgmlType::TQ2_0, "TQ2_0", 256, 66},
    {GgmlType::MXFP4, "MXFP4", 32, 17},
    {GgmlType::NVFP4, "NVFP4", 64, 36},
};

const Entry& find(GgmlType type) {
  for (const Entry& entry : kTypes) {
    if (entry.type == type) return entry;
  }
  __builtin_unreachable();  // every GgmlType is in the table
}

}  // namespace

std::string_view name(GgmlType type) {
  return find(type).name;
}

int64_t block_elements(GgmlType type) {
  return find(type).elements;
}

int64_t block_bytes(GgmlType type) {
  return find(type).bytes;
}

std::optional<GgmlType> parse_ggml_type(uint32_t number) {
  for (const Entry& entry : kTypes) {
    if (static_cast<uint32_t>(entry.type) == number) return entry.type;
  }
  return std::nullopt;
}

std::optional<GgmlType> parse_ggml_type(std::string_view name) {
  for (const Entry& entry : kTypes) {
    if (entry.name == name) return entry.type;
  }
  return std::nullopt;
}

std::optional<Dtype> plain_dtype(GgmlType type) {
  return find(type).dtype;
}

std::optional<GgmlType> plain_ggml_type(Dtype dtype) {
  for (const Entry& entry : kTypes) {
    if (entry.dtype == dtype) return entry.type;
  }
  return std::nullopt;
}

}  // namespace ferry::io
