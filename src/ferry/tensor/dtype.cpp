#include "ferry/tensor/dtype.h"

#include <array>

#include "ferry/base/error.h"

namespace ferry::tensor {
namespace {

struct Row {
  at::ScalarType torch;
  io::Dtype stored;
  std::string_view name;   // Python's
  std::string_view alias;  // the command line's
};

constexpr std::array kRows = {
    Row{at::kDouble, io::Dtype::F64, "float64", "fp64"},
    Row{at::kFloat, io::Dtype::F32, "float32", "fp32"},
    Row{at::kHalf, io::Dtype::F16, "float16", "fp16"},
    Row{at::kBFloat16, io::Dtype::BF16, "bfloat16", "bf16"},
    Row{at::kFloat8_e4m3fn, io::Dtype::F8_E4M3, "float8_e4m3fn", "fp8"},
    Row{at::kFloat8_e5m2, io::Dtype::F8_E5M2, "float8_e5m2", "fp8_e5m2"},
    Row{at::kFloat8_e8m0fnu, io::Dtype::F8_E8M0, "float8_e8m0fnu", "e8m0"},
    Row{at::kLong, io::Dtype::I64, "int64", "long"},
    Row{at::kInt, io::Dtype::I32, "int32", "int"},
    Row{at::kShort, io::Dtype::I16, "int16", "short"},
    Row{at::kChar, io::Dtype::I8, "int8", "char"},
    Row{at::kUInt64, io::Dtype::U64, "uint64", "u64"},
    Row{at::kUInt32, io::Dtype::U32, "uint32", "u32"},
    Row{at::kUInt16, io::Dtype::U16, "uint16", "u16"},
    Row{at::kByte, io::Dtype::U8, "uint8", "byte"},
    Row{at::kBool, io::Dtype::BOOL, "bool", "boolean"},
};

}  // namespace

at::ScalarType to_torch(io::Dtype dtype) {
  for (const Row& row : kRows) {
    if (row.stored == dtype) return row.torch;
  }
  throw_error<FormatError>("dtype {} has no counterpart in torch", io::name(dtype));
}

io::Dtype from_torch(at::ScalarType dtype) {
  for (const Row& row : kRows) {
    if (row.torch == dtype) return row.stored;
  }
  throw_error<ArgumentError>("dtype {} cannot be stored in safetensors", c10::toString(dtype));
}

at::ScalarType parse_dtype(std::string_view name) {
  std::string_view bare = name.starts_with("torch.") ? name.substr(6) : name;
  if (bare == "float") return at::kFloat;
  if (bare == "half") return at::kHalf;
  std::string known;
  for (const Row& row : kRows) {
    if (bare == row.name || bare == row.alias) return row.torch;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", row.alias);
  }
  throw_error<ArgumentError>("unknown dtype '{}'; expected one of {}", name, known);
}

std::string dtype_name(at::ScalarType dtype) {
  for (const Row& row : kRows) {
    if (row.torch == dtype) return std::string(row.name);
  }
  return c10::toString(dtype);
}

}  // namespace ferry::tensor
