#include "ferry/io/checksum.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ferry/base/error.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// FIPS 180-2's examples; `printf abc | sha256sum`.
TEST(Checksum, Sha256IsTheStandards) {
  EXPECT_EQ(sha256_hex({}), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex(bytes_of("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

// `xxhsum -H3` of the same bytes.
TEST(Checksum, IsXxh3) {
  EXPECT_EQ(checksum_text(checksum({})), "2d06800538d394c2");
  EXPECT_EQ(checksum_text(checksum(bytes_of("abc"))), "78af5f94892f3950");
}

TEST(Checksum, PartsGiveTheWhole) {
  const std::string text = random_bytes(100'003);
  for (size_t portion : {1u, 7u, 240u, 4096u, 100'003u}) {
    Checksum sum;
    for (size_t at = 0; at < text.size(); at += portion)
      sum.update(bytes_of(std::string_view(text).substr(at, portion)));
    EXPECT_EQ(sum.value(), checksum(bytes_of(text))) << portion;
  }
  EXPECT_NE(checksum(bytes_of(text), 1), checksum(bytes_of(text), 2));
}

TEST(Checksum, TextAndBack) {
  for (uint64_t value : {uint64_t{0}, uint64_t{0x1234}, ~uint64_t{0}})
    EXPECT_EQ(parse_checksum(checksum_text(value), "here"), value);
  for (const char* text : {"", "12", "0x12345678901234", "123456789012345g", "12345678901234567"})
    EXPECT_THAT(error_of<FormatError>([&] { parse_checksum(text, "here"); }),
                testing::HasSubstr("here"));
}

}  // namespace
}  // namespace ferry::io
