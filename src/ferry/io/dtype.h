// The element types that safetensors files name, without torch. tensor/dtype.h maps them to
// torch's.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace ferry::io {

enum class Dtype : uint8_t {
  F64,
  F32,
  F16,
  BF16,
  F8_E4M3,
  F8_E5M2,
  F8_E8M0,
  I64,
  I32,
  I16,
  I8,
  U64,
  U32,
  U16,
  U8,
  BOOL,
};

// Bytes of one element.
int64_t item_size(Dtype dtype);

// The name as safetensors writes it ("BF16").
std::string_view name(Dtype dtype);

// The dtype of a safetensors name, or nothing for an unknown one.
std::optional<Dtype> parse_dtype(std::string_view name);

}  // namespace ferry::io
