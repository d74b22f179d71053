// Decoding a lossless pack's tensor from any bytes. The checksums, which would stop nearly every
// input at the door, are made right first: the decoder itself has to stand any bytes.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/io/byte_planes.h"

// [items: 2 bytes][element size][stored bytes with their table]
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace ferry::io;
  if (size < 3) return 0;
  const unsigned item_bytes = data[2] % 2 == 0 ? 2 : 4;
  const uint64_t items = (data[0] | data[1] << 8) * uint64_t{data[2] >> 1 & 3 ? 1u : 13u};
  const uint64_t plain_bytes = items * item_bytes;
  std::vector<std::byte> stored(size - 3);
  std::ranges::copy(std::as_bytes(std::span(data + 3, size - 3)), stored.begin());
  const uint64_t table_bytes = plane_table_bytes(plain_bytes, item_bytes);
  if (table_bytes > stored.size()) return 0;
  const std::span<const std::byte> bytes(stored);
  try {
    auto blocks =
        parse_plane_table(bytes.last(table_bytes), stored.size(), plain_bytes, item_bytes, "input");
    std::vector<std::byte> plain(plain_bytes);
    uint64_t decoded = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
      PlaneBlock& block = blocks[i];
      auto packed = bytes.subspan(block.offset, block.stored_bytes());
      block.checksum = plane_block_checksum(packed, i);
      decode_plane_block(packed, block, i, item_bytes,
                         std::span(plain).subspan(decoded, block.items * item_bytes), "input");
      decoded += block.items * item_bytes;
    }
    if (decoded != plain_bytes) std::abort();
  } catch (const ferry::FormatError&) {
  }
  return 0;
}
