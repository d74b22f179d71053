// Between safetensors' dtypes, torch's, and the names that people write.
#pragma once

#include <c10/core/ScalarType.h>

#include <string>
#include <string_view>

#include "ferry/io/dtype.h"

namespace ferry::tensor {

// Throws FormatError for a dtype that torch cannot hold.
at::ScalarType to_torch(io::Dtype dtype);
// Throws ArgumentError for a dtype that safetensors cannot hold.
io::Dtype from_torch(at::ScalarType dtype);

// "bf16", "bfloat16", "torch.bfloat16", "fp32", "float32", "float", "fp16", "half", … Throws
// ArgumentError listing what is known.
at::ScalarType parse_dtype(std::string_view name);

// The name as Python prints it, without "torch.": "bfloat16".
std::string dtype_name(at::ScalarType dtype);

}  // namespace ferry::tensor
