// Lossless packs: a checkpoint in about two thirds of its bytes, bit for bit the same tensors, for
// reading faster than the disk is. io/byte_planes.h is the codec, io/pack_file.h the file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ferry/base/stop_token.h"
#include "ferry/io/pack_file.h"
#include "ferry/io/system.h"
#include "ferry/weights/checkpoint.h"
#include "ferry/weights/pack_cache.h"

namespace ferry::weights {

// What identifies a checkpoint without reading its weights: its files, in order.
std::vector<io::PackSource> fingerprint(const Checkpoint& checkpoint);

// Names what write_lossless_pack() does; changes whenever its output for the same source would.
const std::string& lossless_recipe();

struct PackOptions {
  // Tensors that stay as they lie, since parts of them are read at offsets (embedding tables).
  // Others stay raw anyway unless their dtype is BF16, F16 or F32.
  std::function<bool(const StoredTensor&)> keep_raw = {};
  StopToken stop = {};
  // Told how many of the source's bytes are packed.
  std::function<void(uint64_t)> progress = {};
};

struct PackSummary {
  uint64_t plain_bytes = 0;   // of the source's tensors
  uint64_t packed_bytes = 0;  // of the pack
  uint64_t raw_bytes = 0;     // of tensors that stayed as they lie
  size_t tensors = 0;
};

// Writes the pack of `source` as a stream: some 20 MiB of memory for any size, all compute threads.
// Throws IoError (also where the source changed meanwhile), Cancelled, ArgumentError for a source
// that is a pack itself, Error if built without zstd, and what `sink` throws.
PackSummary write_lossless_pack(const Checkpoint& source, const ByteSink& sink,
                                const PackOptions& options = {});
// To a file that appears whole or not at all, even if the process is killed.
PackSummary write_lossless_pack(const Checkpoint& source, const std::filesystem::path& file,
                                const PackOptions& options = {},
                                io::System& system = io::System::real());

// Reads every byte of a pack and checks it. Throws FormatError naming the first damaged tensor,
// IoError, Cancelled.
void verify_pack(const std::filesystem::path& file, StopToken stop = {});

// Opens a pack as the checkpoint that it was made from: the same keys, dtypes and shapes, encoded.
// Reads the manifest only. With `source`, a pack of anything but those very files is refused;
// without, it stands on its own. Throws FormatError (no pack, torn, another source), IoError.
// Encoded tensors are checked whenever they are decoded, raw ones by verify_pack() alone.
std::shared_ptr<const Checkpoint> open_pack(const std::filesystem::path& file,
                                            const Checkpoint* source = nullptr);
std::shared_ptr<const Checkpoint> open_pack(std::shared_ptr<const io::File> file,
                                            const Checkpoint* source = nullptr);

// The pack of `source` in the cache; null if there is none, or one that cannot be used (logged).
std::shared_ptr<const Checkpoint> find_cached_pack(PackCache& cache, const Checkpoint& source);
// The same, made if it is not there. Throws as write_lossless_pack() and PackCache::find_or_make().
std::shared_ptr<const Checkpoint> make_cached_pack(PackCache& cache, const Checkpoint& source,
                                                   const PackOptions& options = {});

}  // namespace ferry::weights
