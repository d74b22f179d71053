// Pack files: a checkpoint's tensors in fewer bytes, with a manifest at the end.
// docs/formats/pack.md describes the bytes.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/io/dtype.h"
#include "ferry/io/file.h"

namespace ferry::io {

// A file that a pack was made from, told apart without reading its content.
struct PackSource {
  std::string name;  // without folder; for messages
  FileIdentity identity;
  std::string header_sha256;  // of the safetensors header with its length

  bool operator==(const PackSource&) const = default;
};

// Describes a safetensors file. Throws IoError.
PackSource describe_source(const File& file);
// What differs between the file that was packed and another one, for messages; empty if nothing.
std::string source_difference(const PackSource& packed, const PackSource& now);

enum class PackCoding { raw, planes };

struct PackTensor {
  std::string key;
  Dtype dtype = Dtype::F32;
  std::vector<int64_t> shape;
  PackCoding coding = PackCoding::raw;
  uint64_t offset = 0;      // from the file's start, a multiple of kPackAlignment
  uint64_t size_bytes = 0;  // in the pack
  uint64_t checksum = 0;    // raw: of the bytes; planes: of the block table at their end

  // Bytes of the tensor in memory; parsing made sure that it can be counted.
  uint64_t plain_bytes() const;
};

struct PackManifest {
  std::string recipe;  // how it was made
  std::vector<PackSource> sources;
  std::map<std::string, std::string> metadata;  // the checkpoint's
  std::vector<PackTensor> tensors;              // in the order of their offsets
};

// Tensors begin where direct reads can.
constexpr uint64_t kPackAlignment = 4096;
// The first bytes of a pack, and the last.
constexpr std::string_view kPackMagic = "FERRYPK1";
constexpr uint64_t kPackFooterBytes = 32;

// The end of a pack whose tensors take the first `offset` bytes: manifest and footer.
std::string write_pack_end(const PackManifest& manifest, uint64_t offset);

// Parses a manifest that describes the file's first `data_end` bytes. Throws FormatError ("{where}:
// …") for whatever a pack does not have: tensors that overlap, leave their place or do not fit
// their shape, unknown dtypes and codings, fields of other types.
PackManifest parse_pack_manifest(std::string_view json, uint64_t data_end,
                                 const std::string& where);

// Reads and checks the end of a pack. Throws FormatError for a file that is none or was torn,
// IoError.
PackManifest read_pack_manifest(const File& file);

}  // namespace ferry::io
