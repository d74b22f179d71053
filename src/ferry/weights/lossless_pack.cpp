#include "ferry/weights/lossless_pack.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/io/atomic_file.h"
#include "ferry/io/byte_planes.h"
#include "ferry/io/checksum.h"

namespace ferry::weights {
namespace fs = std::filesystem;
namespace {

// Blocks that are read, encoded in parallel and written at a time.
constexpr uint64_t kBatchBlocks = 16;
constexpr uint64_t kCopyBytes = 4 << 20;
// Below this a tensor's planes save less than a page, and pages are what tensors are rounded to.
constexpr uint64_t kLeastPlainBytes = 16 << 10;

unsigned item_bytes_of(io::Dtype dtype) {
  return static_cast<unsigned>(io::item_size(dtype));
}

bool has_planes(io::Dtype dtype) {
  return dtype == io::Dtype::BF16 || dtype == io::Dtype::F16 || dtype == io::Dtype::F32;
}

class PlaneEncoding final : public Encoding {
 public:
  PlaneEncoding(const io::PackTensor& tensor, const fs::path& file)
      : item_bytes_(item_bytes_of(tensor.dtype)),
        stored_bytes_(tensor.size_bytes),
        plain_bytes_(tensor.plain_bytes()),
        table_checksum_(tensor.checksum),
        where_(fmt::format("{}: tensor \"{}\"", file.string(), tensor.key)) {}

  std::string_view name() const override { return "byte planes + zstd"; }

  void decode(std::span<const std::byte> stored, std::span<std::byte> into) const override {
    if (stored.size() != stored_bytes_ || into.size() != plain_bytes_) {
      throw_error<ArgumentError>("{}: decoding {} bytes into {}, expected {} into {}", where_,
                                 stored.size(), into.size(), stored_bytes_, plain_bytes_);
    }
    const std::vector<io::PlaneBlock> blocks =
        parse_table(stored.last(io::plane_table_bytes(plain_bytes_, item_bytes_)));
    const uint64_t block_bytes = io::kPlaneBlockItems * item_bytes_;
    at::parallel_for(0, static_cast<int64_t>(blocks.size()), 4, [&](int64_t begin, int64_t end) {
      for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
        const io::PlaneBlock& block = blocks[i];
        io::decode_plane_block(stored.subspan(block.offset, block.stored_bytes()), block, i,
                               item_bytes_,
                               into.subspan(i * block_bytes, block.items * item_bytes_), where_);
      }
    });
  }

  // Throws FormatError unless it is the table that the manifest speaks of.
  std::vector<io::PlaneBlock> parse_table(std::span<const std::byte> table) const {
    if (io::checksum(table) != table_checksum_) {
      throw_error<FormatError>(
          "{}: its block table is damaged: the checksum differs (a torn or flipped write); make "
          "the pack again",
          where_);
    }
    return io::parse_plane_table(table, stored_bytes_, plain_bytes_, item_bytes_, where_);
  }

  unsigned item_bytes() const { return item_bytes_; }
  uint64_t plain_bytes() const { return plain_bytes_; }
  const std::string& where() const { return where_; }

 private:
  unsigned item_bytes_;
  uint64_t stored_bytes_, plain_bytes_, table_checksum_;
  std::string where_;
};

// Writes one pack: what is being written now, and where.
class Packer {
 public:
  Packer(const ByteSink& sink, const PackOptions& options) : sink_(sink), options_(options) {
    std::vector<std::byte> head(io::kPackAlignment);
    std::copy_n(reinterpret_cast<const std::byte*>(io::kPackMagic.data()), io::kPackMagic.size(),
                head.begin());
    write(head);
  }

  void add(const StoredTensor& tensor) {
    write(std::vector<std::byte>((io::kPackAlignment - position_ % io::kPackAlignment) %
                                 io::kPackAlignment));
    io::PackTensor packed{tensor.key, tensor.dtype, tensor.shape, io::PackCoding::raw, position_};
    const bool raw = !has_planes(tensor.dtype) || tensor.size_bytes < kLeastPlainBytes ||
                     (options_.keep_raw && options_.keep_raw(tensor));
    if (raw) {
      packed.checksum = copy(tensor);
      summary_.raw_bytes += tensor.size_bytes;
    } else {
      packed.coding = io::PackCoding::planes;
      packed.checksum = encode(tensor);
    }
    packed.size_bytes = position_ - packed.offset;
    manifest_.tensors.push_back(std::move(packed));
    ++summary_.tensors;
  }

  PackSummary finish(const Checkpoint& source) {
    manifest_.recipe = lossless_recipe();
    manifest_.sources = fingerprint(source);
    manifest_.metadata = source.metadata();
    std::string end = io::write_pack_end(manifest_, position_);
    write(std::as_bytes(std::span(end)));
    summary_.packed_bytes = position_;
    return summary_;
  }

 private:
  void write(std::span<const std::byte> bytes) {
    if (!bytes.empty()) sink_(bytes);
    position_ += bytes.size();
  }

  void packed(uint64_t plain_bytes) {
    summary_.plain_bytes += plain_bytes;
    if (options_.progress) options_.progress(summary_.plain_bytes);
    options_.stop.throw_if_stopped();
  }

  // Calls `visit` with the tensor's bytes, at most `portion` at a time.
  template <class Visit>
  void for_portions(const StoredTensor& tensor, uint64_t portion, Visit visit) {
    buffer_.resize(std::max<size_t>(buffer_.size(), portion));
    for (uint64_t done = 0; done < tensor.size_bytes;) {
      const uint64_t size = std::min(portion, tensor.size_bytes - done);
      tensor.file->read_exact(tensor.offset + done, size, buffer_.data());
      visit(std::span<const std::byte>(buffer_.data(), size), done);
      done += size;
      packed(size);
    }
  }

  uint64_t copy(const StoredTensor& tensor) {
    io::Checksum sum;
    for_portions(tensor, kCopyBytes, [&](std::span<const std::byte> bytes, uint64_t) {
      sum.update(bytes);
      write(bytes);
    });
    return sum.value();
  }

  uint64_t encode(const StoredTensor& tensor) {
    const unsigned item_bytes = item_bytes_of(tensor.dtype);
    const uint64_t block_bytes = io::kPlaneBlockItems * item_bytes;
    std::vector<io::PlaneEncoder>& encoders = encoders_of(item_bytes);
    std::vector<io::PlaneBlock> blocks;
    std::vector<std::byte> outputs[kBatchBlocks];
    for_portions(
        tensor, kBatchBlocks * block_bytes, [&](std::span<const std::byte> bytes, uint64_t done) {
          const uint64_t first = done / block_bytes;
          const uint64_t count = (bytes.size() + block_bytes - 1) / block_bytes;
          blocks.resize(first + count);
          at::parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
            io::PlaneEncoder& encoder = encoders.at(static_cast<size_t>(at::get_thread_num()));
            for (auto i = static_cast<uint64_t>(begin); i < static_cast<uint64_t>(end); ++i) {
              const uint64_t at = i * block_bytes;
              outputs[i].clear();
              blocks[first + i] = encoder.encode(
                  bytes.subspan(at, std::min<uint64_t>(block_bytes, bytes.size() - at)), first + i,
                  outputs[i]);
            }
          });
          for (uint64_t i = 0; i < count; ++i) write(outputs[i]);
        });
    const std::vector<std::byte> table = io::write_plane_table(blocks, item_bytes);
    write(table);
    return io::checksum(table);
  }

  std::vector<io::PlaneEncoder>& encoders_of(unsigned item_bytes) {
    std::vector<io::PlaneEncoder>& encoders = item_bytes == 2 ? encoders2_ : encoders4_;
    while (encoders.size() < static_cast<size_t>(std::max(at::get_num_threads(), 1)))
      encoders.emplace_back(item_bytes);
    return encoders;
  }

  const ByteSink& sink_;
  const PackOptions& options_;
  uint64_t position_ = 0;
  io::PackManifest manifest_;
  PackSummary summary_;
  std::vector<std::byte> buffer_;
  std::vector<io::PlaneEncoder> encoders2_, encoders4_;  // one a thread, by element size
};

void check_source(const io::PackManifest& manifest, const std::vector<io::PackSource>& now,
                  const std::string& where) {
  std::string difference;
  if (manifest.sources.size() != now.size()) {
    difference = fmt::format("{} files (packed: {})", now.size(), manifest.sources.size());
  } else {
    for (size_t i = 0; i < now.size() && difference.empty(); ++i) {
      difference = io::source_difference(manifest.sources[i], now[i]);
      if (!difference.empty()) difference = now[i].name + ": " + difference;
    }
  }
  if (difference.empty()) return;
  throw_error<FormatError>(
      "{}: is the pack of another checkpoint, or this one changed since: {}; make the pack "
      "again",
      where, difference);
}

void check_unchanged(const Checkpoint& source) {
  for (const auto& file : source.files()) file->check_unchanged();
}

void verify_tensor(const io::File& file, const io::PackTensor& tensor, const StopToken& stop) {
  std::vector<std::byte> buffer;
  auto read = [&](uint64_t offset, uint64_t size) {
    stop.throw_if_stopped();
    buffer.resize(size);
    file.read_exact(tensor.offset + offset, size, buffer.data());
    return std::span<const std::byte>(buffer);
  };
  if (tensor.coding == io::PackCoding::raw) {
    io::Checksum sum;
    for (uint64_t done = 0; done < tensor.size_bytes; done += kCopyBytes)
      sum.update(read(done, std::min(kCopyBytes, tensor.size_bytes - done)));
    if (sum.value() != tensor.checksum) {
      throw_error<FormatError>("{}: tensor \"{}\" is damaged: its checksum differs",
                               file.path().string(), tensor.key);
    }
    return;
  }
  PlaneEncoding encoding(tensor, file.path());
  const uint64_t table_bytes = io::plane_table_bytes(encoding.plain_bytes(), encoding.item_bytes());
  const auto blocks = encoding.parse_table(read(tensor.size_bytes - table_bytes, table_bytes));
  std::vector<std::byte> plain;
  for (size_t i = 0; i < blocks.size(); ++i) {
    plain.resize(blocks[i].items * encoding.item_bytes());
    io::decode_plane_block(read(blocks[i].offset, blocks[i].stored_bytes()), blocks[i], i,
                           encoding.item_bytes(), plain, encoding.where());
  }
}

}  // namespace

std::vector<io::PackSource> fingerprint(const Checkpoint& checkpoint) {
  std::vector<io::PackSource> sources;
  for (const auto& file : checkpoint.files()) sources.push_back(io::describe_source(*file));
  return sources;
}

const std::string& lossless_recipe() {
  static const std::string recipe = "lossless: byte planes, zstd 1 (Huffman), version 1";
  return recipe;
}

PackSummary write_lossless_pack(const Checkpoint& source, const ByteSink& sink,
                                const PackOptions& options) {
  for (const StoredTensor& tensor : source.tensors()) {
    if (tensor.encoding) {
      throw_error<ArgumentError>("{}: is a pack already; pack the checkpoint that it came from",
                                 tensor.file->path().string());
    }
  }
  check_unchanged(source);
  Packer packer(sink, options);
  for (const StoredTensor& tensor : source.tensors()) packer.add(tensor);
  PackSummary summary = packer.finish(source);
  check_unchanged(source);
  return summary;
}

PackSummary write_lossless_pack(const Checkpoint& source, const fs::path& file,
                                const PackOptions& options, io::System& system) {
  io::AtomicFile out(file, system);
  PackSummary summary = write_lossless_pack(
      source, [&](std::span<const std::byte> bytes) { out.write(bytes); }, options);
  out.commit();
  return summary;
}

void verify_pack(const fs::path& path, StopToken stop) {
  auto file = io::File::open(path);
  for (const io::PackTensor& tensor : io::read_pack_manifest(*file).tensors)
    verify_tensor(*file, tensor, stop);
}

std::shared_ptr<const Checkpoint> open_pack(const fs::path& file, const Checkpoint* source) {
  return open_pack(io::File::open(file), source);
}

std::shared_ptr<const Checkpoint> open_pack(std::shared_ptr<const io::File> file,
                                            const Checkpoint* source) {
  io::PackManifest manifest = io::read_pack_manifest(*file);
  if (source) check_source(manifest, fingerprint(*source), file->path().string());
  std::vector<StoredTensor> tensors;
  tensors.reserve(manifest.tensors.size());
  for (io::PackTensor& tensor : manifest.tensors) {
    StoredTensor stored{tensor.key, tensor.dtype,  tensor.shape,
                        file,       tensor.offset, tensor.size_bytes};
    if (tensor.coding == io::PackCoding::planes)
      stored.encoding = std::make_shared<PlaneEncoding>(tensor, file->path());
    tensors.push_back(std::move(stored));
  }
  return Checkpoint::of_tensors(std::move(tensors), std::move(manifest.metadata), {file});
}

// ---- through the cache ----

std::shared_ptr<const Checkpoint> find_cached_pack(PackCache& cache, const Checkpoint& source) {
  std::shared_ptr<const io::File> file =
      cache.find(PackCache::key(fingerprint(source), lossless_recipe()));
  if (!file) return nullptr;
  try {
    return open_pack(std::move(file), &source);
  } catch (const FormatError& error) {
    log::warn("{}; the checkpoint is read instead", error.what());
    return nullptr;
  }
}

std::shared_ptr<const Checkpoint> make_cached_pack(PackCache& cache, const Checkpoint& source,
                                                   const PackOptions& options) {
  if (auto pack = find_cached_pack(cache, source)) return pack;
  CacheContent content;
  content.sources = fingerprint(source);
  content.recipe = lossless_recipe();
  content.origin = fs::absolute(source.files().front()->path()).parent_path().string();
  content.expected_bytes = source.total_bytes() / 4 * 3;
  content.write = [&](const ByteSink& sink) { write_lossless_pack(source, sink, options); };
  content.is_usable = [&](std::shared_ptr<const io::File> file) {
    open_pack(std::move(file), &source);
  };
  return open_pack(cache.find_or_make(content, options.stop), &source);
}

}  // namespace ferry::weights
