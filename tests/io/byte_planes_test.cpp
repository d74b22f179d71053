#include "ferry/io/byte_planes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <random>

#include "ferry/base/error.h"
#include "ferry/io/plane_merge.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using testing::HasSubstr;

// The definition, bit by bit: rotate left by one, highest byte first.
std::vector<std::string> planes_of(const std::string& plain, unsigned item_bytes) {
  std::vector<std::string> planes(item_bytes, std::string(plain.size() / item_bytes, '\0'));
  for (size_t i = 0; i < planes[0].size(); ++i) {
    std::vector<bool> bits;  // most significant first
    for (int byte = static_cast<int>(item_bytes) - 1; byte >= 0; --byte) {
      for (int bit = 7; bit >= 0; --bit)
        bits.push_back(plain[i * item_bytes + static_cast<size_t>(byte)] >> bit & 1);
    }
    std::rotate(bits.begin(), bits.begin() + 1, bits.end());
    for (size_t at = 0; at < bits.size(); ++at) {
      if (bits[at]) planes[at / 8][i] = static_cast<char>(planes[at / 8][i] | 1 << (7 - at % 8));
    }
  }
  return planes;
}

TEST(PlaneMerge, EveryVariantIsTheDefinition) {
  size_t variants = 0;
  for (const char* name : {"portable", "avx2", "avx512bw"}) {
    const PlaneMerge* merge = find_plane_merge(name);
    if (!merge) continue;
    ++variants;
    for (unsigned item_bytes : {2u, 4u}) {
      for (size_t count = 0; count < 150; ++count) {
        const std::string plain = random_bytes(count * item_bytes, static_cast<unsigned>(count));
        const auto planes = planes_of(plain, item_bytes);
        const uint8_t* pointers[4] = {};
        for (unsigned i = 0; i < item_bytes; ++i)
          pointers[i] = reinterpret_cast<const uint8_t*>(planes[i].data());
        // At an odd address, with a guard on both sides.
        std::string out(plain.size() + 3, '#');
        (item_bytes == 2 ? merge->merge2 : merge->merge4)(pointers, count, out.data() + 1);
        EXPECT_EQ(out, "#" + plain + "##") << name << " " << item_bytes << " " << count;
      }
    }
  }
  EXPECT_GE(variants, 1u);
  EXPECT_EQ(find_plane_merge("none"), nullptr);
}

#ifdef FERRY_WITH_ZSTD

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// Normally distributed, as weights are.
std::string bf16_weights(size_t count, unsigned seed = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0, 0.02f);
  std::string out;
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits = std::bit_cast<uint32_t>(normal(random));
    bits += 0x7fff + (bits >> 16 & 1);
    out += static_cast<char>(bits >> 16);
    out += static_cast<char>(bits >> 24);
  }
  return out;
}

struct Stored {
  std::vector<std::byte> bytes;  // with the table
  uint64_t plain_bytes;
};

Stored encode(const std::string& plain, unsigned item_bytes) {
  PlaneEncoder encoder(item_bytes);
  std::vector<PlaneBlock> blocks;
  Stored stored{{}, plain.size()};
  const size_t block_bytes = kPlaneBlockItems * item_bytes;
  for (size_t at = 0; at < plain.size(); at += block_bytes) {
    blocks.push_back(
        encoder.encode(bytes_of(plain).subspan(at, std::min(block_bytes, plain.size() - at)),
                       blocks.size(), stored.bytes));
  }
  auto table = write_plane_table(blocks, item_bytes);
  stored.bytes.insert(stored.bytes.end(), table.begin(), table.end());
  return stored;
}

std::string decode(const Stored& stored, unsigned item_bytes) {
  std::span<const std::byte> bytes(stored.bytes);
  auto blocks = parse_plane_table(bytes.last(plane_table_bytes(stored.plain_bytes, item_bytes)),
                                  bytes.size(), stored.plain_bytes, item_bytes, "here");
  std::string plain(stored.plain_bytes, '#');
  for (size_t i = 0; i < blocks.size(); ++i) {
    decode_plane_block(
        bytes.subspan(blocks[i].offset, blocks[i].stored_bytes()), blocks[i], i, item_bytes,
        std::as_writable_bytes(std::span(plain))
            .subspan(i * kPlaneBlockItems * item_bytes, blocks[i].items * item_bytes),
        "here");
  }
  return plain;
}

TEST(BytePlanes, RoundTripsAnything) {
  for (unsigned item_bytes : {2u, 4u}) {
    const size_t block = kPlaneBlockItems * item_bytes;
    std::vector<std::string> cases = {bf16_weights(kPlaneBlockItems * 2 + 12)};
    for (size_t items : {size_t{1}, size_t{2}, size_t{15}, size_t{17}, size_t{1000},
                         kPlaneBlockItems - 1, kPlaneBlockItems, kPlaneBlockItems + 1})
      cases.push_back(random_bytes(items * item_bytes));
    cases.push_back(std::string(block + 4 * item_bytes, '\0'));
    cases.push_back(std::string(block, '\xff'));
    // Every bfloat16 there is: NaNs with their payloads, infinities, denormals, both zeros.
    std::string every;
    for (unsigned value = 0; value < 65536; ++value) {
      every += static_cast<char>(value);
      every += static_cast<char>(value >> 8);
    }
    cases.push_back(every);
    for (const std::string& plain : cases)
      EXPECT_TRUE(decode(encode(plain, item_bytes), item_bytes) == plain)
          << item_bytes << " " << plain.size();
  }
}

TEST(BytePlanes, WeightsTakeAtMost072) {
  const std::string plain = bf16_weights(4 * kPlaneBlockItems);
  const Stored stored = encode(plain, 2);
  EXPECT_LT(stored.bytes.size(), 0.67 * static_cast<double>(plain.size()));
  // Entropy of the exponent of a normal distribution is 2.55 bits: below it, something is lost.
  EXPECT_GT(stored.bytes.size(), (8 + 2.5) / 16 * static_cast<double>(plain.size()));
  // What does not compress costs the table only.
  const std::string noise = random_bytes(2 * kPlaneBlockItems);
  EXPECT_EQ(encode(noise, 2).bytes.size(), noise.size() + plane_table_bytes(noise.size(), 2));
  // float32 that holds bfloat16 values: two planes are nothing.
  std::string wide;
  for (size_t i = 0; i < plain.size(); i += 2)
    wide += std::string(2, '\0') + plain[i] + plain[i + 1];
  EXPECT_LT(encode(wide, 4).bytes.size(), 0.35 * static_cast<double>(wide.size()));
}

TEST(BytePlanes, EveryFlippedBitIsFound) {
  const std::string plain = bf16_weights(300);
  const Stored stored = encode(plain, 2);
  const size_t table = stored.bytes.size() - plane_table_bytes(plain.size(), 2);
  for (size_t at = 0; at < stored.bytes.size(); ++at) {
    for (int bit : {0, 7}) {
      Stored flipped = stored;
      flipped.bytes[at] ^= std::byte{1} << bit;
      EXPECT_THAT(error_of<FormatError>([&] { decode(flipped, 2); }), HasSubstr("here"))
          << at << (at >= table ? " (table)" : "");
    }
  }
}

TEST(BytePlanes, BlocksDoNotStandInForEachOther) {
  std::string plain = random_bytes(2 * kPlaneBlockItems);  // nothing compresses: equal sizes
  plain += random_bytes(2 * kPlaneBlockItems, 2);
  Stored stored = encode(plain, 2);
  const size_t block = 2 * kPlaneBlockItems, entry = plane_table_bytes(block, 2);
  auto* data = stored.bytes.data();
  std::swap_ranges(data, data + block, data + block);
  std::swap_ranges(data + 2 * block, data + 2 * block + entry, data + 2 * block + entry);
  EXPECT_THAT(error_of<FormatError>([&] { decode(stored, 2); }), HasSubstr("block 0 is damaged"));
}

TEST(BytePlanes, TablesThatLieAreRefused) {
  const std::string plain = bf16_weights(300);
  const Stored stored = encode(plain, 2);
  const std::span<const std::byte> bytes(stored.bytes);
  const auto table = bytes.last(plane_table_bytes(plain.size(), 2));
  auto parse = [&](std::span<const std::byte> some, uint64_t stored_bytes, uint64_t plain_bytes) {
    return error_of<FormatError>(
        [&] { parse_plane_table(some, stored_bytes, plain_bytes, 2, "here"); });
  };
  EXPECT_THAT(parse(table, bytes.size() + 1, plain.size()), HasSubstr("blocks have"));
  EXPECT_THAT(parse(table, bytes.size(), plain.size() + 2 * kPlaneBlockItems),
              HasSubstr("block table of"));
  EXPECT_THAT(parse(table, bytes.size(), plain.size() + 1), HasSubstr("block table of"));
  EXPECT_THAT(parse(table.first(8), bytes.size(), plain.size()), HasSubstr("block table of"));
  std::vector<std::byte> zero(table.begin(), table.end());
  std::fill(zero.begin() + 8, zero.begin() + 12, std::byte{0});
  EXPECT_THAT(parse(zero, bytes.size(), plain.size()), HasSubstr("plane 0 has 0 bytes"));
}

TEST(BytePlanes, OddArgumentsAreRefused) {
  EXPECT_THROW(PlaneEncoder(3), ArgumentError);
  PlaneEncoder encoder(4);
  std::vector<std::byte> out, plain(4 * kPlaneBlockItems + 4);
  EXPECT_THROW(encoder.encode(plain, 0, out), ArgumentError);
  EXPECT_THROW(encoder.encode(std::span(plain).first(6), 0, out), ArgumentError);
  EXPECT_THROW(encoder.encode({}, 0, out), ArgumentError);
}

#endif  // FERRY_WITH_ZSTD

}  // namespace
}  // namespace ferry::io
