#include "ferry/io/dtype.h"

#include <gtest/gtest.h>

namespace ferry::io {
namespace {

// Names and sizes as the safetensors format defines them.
TEST(Dtype, NamesAndSizes) {
  const std::pair<const char*, int64_t> expected[] = {
      {"F64", 8}, {"F32", 4},     {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1},
      {"I64", 8}, {"F8_E8M0", 1}, {"I32", 4}, {"I16", 2},  {"I8", 1},      {"U64", 8},
      {"U32", 4}, {"U16", 2},     {"U8", 1},  {"BOOL", 1},
  };
  for (const auto& [text, size] : expected) {
    std::optional<Dtype> dtype = parse_dtype(text);
    ASSERT_TRUE(dtype) << text;
    EXPECT_EQ(item_size(*dtype), size) << text;
    EXPECT_EQ(name(*dtype), text);
  }
}

TEST(Dtype, UnknownNames) {
  for (const char* text : {"", "f32", "F4", "C64", "F32 ", "BF"}) {
    EXPECT_FALSE(parse_dtype(text)) << text;
  }
}

}  // namespace
}  // namespace ferry::io
