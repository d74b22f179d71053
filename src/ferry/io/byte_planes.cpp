#include "ferry/io/byte_planes.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "ferry/base/error.h"
#include "ferry/io/checksum.h"
#include "ferry/io/plane_merge.h"

#ifdef FERRY_WITH_ZSTD
#include <zstd.h>
#endif

namespace ferry::io {
namespace {

constexpr const char* kNoZstd =
    "lossless packs need zstd, and this ferry was built without it (FERRY_WITH_ZSTD)";

void check_item_bytes(unsigned item_bytes) {
  if (item_bytes != 2 && item_bytes != 4)
    throw_error<ArgumentError>("byte planes of elements of {} bytes: expected 2 or 4", item_bytes);
}

template <class Item>
void split(const std::byte* plain, size_t count, std::byte* const* planes) {
  for (size_t i = 0; i < count; ++i) {
    Item value;
    std::memcpy(&value, plain + sizeof(Item) * i, sizeof(Item));
    value = std::rotl(value, 1);
    for (size_t byte = 0; byte < sizeof(Item); ++byte)
      planes[byte][i] = static_cast<std::byte>(value >> (8 * (sizeof(Item) - 1 - byte)));
  }
}

// A compressed plane has to save this much of itself, or decoding it costs more than it saves.
constexpr uint64_t kLeastGain = 16;  // a sixteenth

}  // namespace

uint64_t PlaneBlock::stored_bytes() const {
  uint64_t sum = 0;
  for (uint32_t bytes : plane_bytes) sum += bytes;
  return sum;
}

uint64_t plane_block_checksum(std::span<const std::byte> stored, uint64_t index) {
  return checksum(stored, index);
}

// ---- encoding ----

#ifdef FERRY_WITH_ZSTD

struct PlaneEncoder::State {
  unsigned item_bytes;
  ZSTD_CCtx* context = nullptr;
  std::vector<std::byte> planes;      // one after the other, kPlaneBlockItems each
  std::vector<std::byte> compressed;  // of one plane

  explicit State(unsigned bytes)
      : item_bytes(bytes),
        context(ZSTD_createCCtx()),
        planes(kPlaneBlockItems * bytes),
        compressed(ZSTD_compressBound(kPlaneBlockItems)) {
    if (!context) throw_error<Error>("zstd: no memory for a compression context");
    // Exponents repeat by chance only: matches that zstd finds among them cost it more than they
    // save, and cost the decoder most of its time. Long minimal matches and a tiny hash table leave
    // Huffman coding: 0.663 of normally distributed bf16 weights instead of 0.687, decoded about
    // 1.7 times as fast (docs/formats/pack.md).
    set(ZSTD_c_compressionLevel, 1);
    set(ZSTD_c_strategy, ZSTD_fast);
    set(ZSTD_c_minMatch, 7);
    set(ZSTD_c_hashLog, 6);
    set(ZSTD_c_contentSizeFlag, 0);
    set(ZSTD_c_checksumFlag, 0);  // plane_block_checksum() covers the frame
  }
  ~State() { ZSTD_freeCCtx(context); }

  void set(ZSTD_cParameter parameter, int value) {
    size_t result = ZSTD_CCtx_setParameter(context, parameter, value);
    if (ZSTD_isError(result)) throw_error<Error>("zstd: {}", ZSTD_getErrorName(result));
  }
};

PlaneEncoder::PlaneEncoder(unsigned item_bytes) {
  check_item_bytes(item_bytes);
  state_ = std::make_unique<State>(item_bytes);
}

PlaneBlock PlaneEncoder::encode(std::span<const std::byte> plain, uint64_t index,
                                std::vector<std::byte>& out) {
  const unsigned item_bytes = state_->item_bytes;
  const size_t count = plain.size() / item_bytes;
  if (plain.size() % item_bytes != 0 || count == 0 || count > kPlaneBlockItems) {
    throw_error<ArgumentError>("a block of {} bytes: expected 1 to {} elements of {} bytes",
                               plain.size(), kPlaneBlockItems, item_bytes);
  }
  std::byte* planes[4] = {};
  for (unsigned plane = 0; plane < item_bytes; ++plane)
    planes[plane] = state_->planes.data() + plane * kPlaneBlockItems;
  if (item_bytes == 2) {
    split<uint16_t>(plain.data(), count, planes);
  } else {
    split<uint32_t>(plain.data(), count, planes);
  }

  PlaneBlock block;
  block.items = count;
  const size_t begin = out.size();
  for (unsigned plane = 0; plane < item_bytes; ++plane) {
    std::span<const std::byte> stored(planes[plane], count);
    size_t size = ZSTD_compress2(state_->context, state_->compressed.data(),
                                 state_->compressed.size(), planes[plane], count);
    if (ZSTD_isError(size)) throw_error<Error>("zstd: {}", ZSTD_getErrorName(size));
    if (size + count / kLeastGain < count)
      stored = std::span<const std::byte>(state_->compressed.data(), size);
    block.plane_bytes[plane] = static_cast<uint32_t>(stored.size());
    out.insert(out.end(), stored.begin(), stored.end());
  }
  block.checksum = plane_block_checksum(std::span(out).subspan(begin), index);
  return block;
}

#else

struct PlaneEncoder::State {};

PlaneEncoder::PlaneEncoder(unsigned) {
  throw_error<Error>("{}", kNoZstd);
}

PlaneBlock PlaneEncoder::encode(std::span<const std::byte>, uint64_t, std::vector<std::byte>&) {
  throw_error<Error>("{}", kNoZstd);
}

#endif

PlaneEncoder::~PlaneEncoder() = default;
PlaneEncoder::PlaneEncoder(PlaneEncoder&&) noexcept = default;

// ---- the table ----

uint64_t plane_block_count(uint64_t plain_bytes, unsigned item_bytes) {
  const uint64_t items = plain_bytes / item_bytes;
  return items / kPlaneBlockItems + (items % kPlaneBlockItems != 0);
}

namespace {
uint64_t entry_bytes(unsigned item_bytes) {
  return 8 + 4 * uint64_t{item_bytes};
}
}  // namespace

uint64_t plane_table_bytes(uint64_t plain_bytes, unsigned item_bytes) {
  return plane_block_count(plain_bytes, item_bytes) * entry_bytes(item_bytes);
}

std::vector<std::byte> write_plane_table(std::span<const PlaneBlock> blocks, unsigned item_bytes) {
  std::vector<std::byte> table(blocks.size() * entry_bytes(item_bytes));
  std::byte* entry = table.data();
  for (const PlaneBlock& block : blocks) {
    std::memcpy(entry, &block.checksum, 8);
    std::memcpy(entry + 8, block.plane_bytes.data(), 4 * size_t{item_bytes});
    entry += entry_bytes(item_bytes);
  }
  return table;
}

std::vector<PlaneBlock> parse_plane_table(std::span<const std::byte> table, uint64_t stored_bytes,
                                          uint64_t plain_bytes, unsigned item_bytes,
                                          const std::string& where) {
  check_item_bytes(item_bytes);
  if (plain_bytes % item_bytes != 0 || table.size() != plane_table_bytes(plain_bytes, item_bytes) ||
      table.size() > stored_bytes) {
    throw_error<FormatError>(
        "{}: a block table of {} bytes in {} stored ones; expected {} for a tensor of {} bytes",
        where, table.size(), stored_bytes, plane_table_bytes(plain_bytes, item_bytes), plain_bytes);
  }
  const uint64_t data_bytes = stored_bytes - table.size();
  std::vector<PlaneBlock> blocks(plane_block_count(plain_bytes, item_bytes));
  uint64_t items_left = plain_bytes / item_bytes;
  uint64_t offset = 0;
  const std::byte* entry = table.data();
  for (size_t i = 0; i < blocks.size(); ++i) {
    PlaneBlock& block = blocks[i];
    std::memcpy(&block.checksum, entry, 8);
    std::memcpy(block.plane_bytes.data(), entry + 8, 4 * size_t{item_bytes});
    entry += entry_bytes(item_bytes);
    block.items = std::min(items_left, kPlaneBlockItems);
    items_left -= block.items;
    block.offset = offset;
    for (unsigned plane = 0; plane < item_bytes; ++plane) {
      if (block.plane_bytes[plane] == 0 || block.plane_bytes[plane] > block.items) {
        throw_error<FormatError>("{}: block {}: plane {} has {} bytes, expected 1 to {}", where, i,
                                 plane, block.plane_bytes[plane], block.items);
      }
    }
    offset += block.stored_bytes();
  }
  if (offset != data_bytes) {
    throw_error<FormatError>("{}: its blocks have {} bytes, expected {}", where, offset,
                             data_bytes);
  }
  return blocks;
}

// ---- decoding ----

namespace {

#ifdef FERRY_WITH_ZSTD

// One a thread, kept: making a context costs as much as decoding a block.
struct DecodeMemory {
  ZSTD_DCtx* context = ZSTD_createDCtx();
  std::vector<uint8_t> planes[4];
  ~DecodeMemory() { ZSTD_freeDCtx(context); }
};

const uint8_t* decompress(std::span<const std::byte> stored, size_t count, unsigned plane,
                          const std::string& where, uint64_t index) {
  thread_local DecodeMemory memory;
  if (!memory.context) throw_error<Error>("zstd: no memory for a decompression context");
  std::vector<uint8_t>& into = memory.planes[plane];
  if (into.size() < count) into.resize(kPlaneBlockItems);
  size_t size =
      ZSTD_decompressDCtx(memory.context, into.data(), count, stored.data(), stored.size());
  if (ZSTD_isError(size) || size != count) {
    throw_error<FormatError>("{}: block {}: plane {} does not decompress: {}", where, index, plane,
                             ZSTD_isError(size)
                                 ? std::string(ZSTD_getErrorName(size))
                                 : fmt::format("got {} bytes, expected {}", size, count));
  }
  return into.data();
}

#else

const uint8_t* decompress(std::span<const std::byte>, size_t, unsigned, const std::string&,
                          uint64_t) {
  throw_error<Error>("{}", kNoZstd);
}

#endif

}  // namespace

void decode_plane_block(std::span<const std::byte> stored, const PlaneBlock& block, uint64_t index,
                        unsigned item_bytes, std::span<std::byte> into, const std::string& where) {
  if (stored.size() != block.stored_bytes() || into.size() != block.items * item_bytes ||
      block.items > kPlaneBlockItems) {
    throw_error<ArgumentError>("{}: block {}: {} stored and {} decoded bytes, expected {} and {}",
                               where, index, stored.size(), into.size(), block.stored_bytes(),
                               block.items * item_bytes);
  }
  if (plane_block_checksum(stored, index) != block.checksum) {
    throw_error<FormatError>(
        "{}: block {} is damaged: its checksum differs (a torn or flipped write); make the pack "
        "again",
        where, index);
  }
  const uint8_t* planes[4] = {};
  size_t offset = 0;
  for (unsigned plane = 0; plane < item_bytes; ++plane) {
    std::span<const std::byte> bytes = stored.subspan(offset, block.plane_bytes[plane]);
    offset += bytes.size();
    planes[plane] = bytes.size() == block.items
                        ? reinterpret_cast<const uint8_t*>(bytes.data())
                        : decompress(bytes, block.items, plane, where, index);
  }
  const PlaneMerge& merge = best_plane_merge();
  (item_bytes == 2 ? merge.merge2 : merge.merge4)(planes, block.items, into.data());
}

const char* plane_merge_name() {
  return best_plane_merge().name;
}

}  // namespace ferry::io
