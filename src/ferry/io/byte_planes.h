// The codec of lossless packs: floating-point numbers split into byte planes, each compressed where
// that pays. docs/formats/pack.md describes the bytes.
//
// Each element is rotated left by one bit, so that its highest byte is the exponent alone (bf16,
// fp32; fp16: exponent and three bits of the mantissa) and the sign joins the mantissa. Of weights
// the exponents carry 2 to 3 bits of information, the mantissas nearly all of theirs: zstd entropy
// codes the first plane, the others stay as they are.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace ferry::io {

// Elements of a block; the last one of a tensor may have fewer. With 2-byte elements a block is
// 256 KiB: its planes stay in a core's cache while it is decoded.
constexpr uint64_t kPlaneBlockItems = 128 << 10;

// How one block is stored: its planes one after the other, the highest byte first.
struct PlaneBlock {
  uint64_t checksum = 0;                  // plane_block_checksum() of the stored bytes
  std::array<uint32_t, 4> plane_bytes{};  // as many as the element has bytes; equal to the number
                                          // of elements where a plane is not compressed
  uint64_t offset = 0;                    // of the stored bytes, from the tensor's first
  uint64_t items = 0;                     // elements
  uint64_t stored_bytes() const;
};

// Of a block's stored bytes; blocks do not stand in for each other.
uint64_t plane_block_checksum(std::span<const std::byte> stored, uint64_t index);

// Encodes blocks. Holds zstd's working memory (about 2 MB); one a thread.
class PlaneEncoder {
 public:
  // `item_bytes`: 2 or 4. Throws Error if built without zstd.
  explicit PlaneEncoder(unsigned item_bytes);
  ~PlaneEncoder();
  PlaneEncoder(PlaneEncoder&&) noexcept;
  // Appends the stored bytes of block `index` to `out`. `plain`: at most kPlaneBlockItems elements.
  // The result's offset is left 0.
  PlaneBlock encode(std::span<const std::byte> plain, uint64_t index, std::vector<std::byte>& out);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A tensor is its blocks one after the other, then a table of them.
uint64_t plane_block_count(uint64_t plain_bytes, unsigned item_bytes);
uint64_t plane_table_bytes(uint64_t plain_bytes, unsigned item_bytes);
std::vector<std::byte> write_plane_table(std::span<const PlaneBlock> blocks, unsigned item_bytes);
// Throws FormatError ("{where}: …") unless the table describes exactly a tensor of `plain_bytes`
// stored in `stored_bytes`.
std::vector<PlaneBlock> parse_plane_table(std::span<const std::byte> table, uint64_t stored_bytes,
                                          uint64_t plain_bytes, unsigned item_bytes,
                                          const std::string& where);

// Decodes one block into `into` (items x item_bytes bytes, any alignment). Thread-safe; keeps some
// memory a thread. Throws FormatError for damaged bytes, Error if built without zstd and a plane is
// compressed.
void decode_plane_block(std::span<const std::byte> stored, const PlaneBlock& block, uint64_t index,
                        unsigned item_bytes, std::span<std::byte> into, const std::string& where);

// Which merge this CPU uses: "avx512bw", "avx2" or "portable". FERRY_PLANE_MERGE names another
// (for tests and measuring).
const char* plane_merge_name();

}  // namespace ferry::io
