#include "ferry/io/pack_file.h"

#include <fmt/ranges.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "ferry/io/byte_planes.h"
#include "ferry/io/checksum.h"
#include "ferry/io/json_file.h"

namespace ferry::io {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kMaxManifestBytes = 100'000'000;  // as many as a safetensors header may have
constexpr const char* kFormat = "ferry-pack";

struct Footer {
  uint64_t offset = 0;  // of the manifest
  uint64_t bytes = 0;
  uint64_t sum = 0;  // of the manifest, seeded with its offset
  char magic[8] = {};
};
static_assert(sizeof(Footer) == kPackFooterBytes);

uint64_t manifest_checksum(std::string_view json, uint64_t offset) {
  return checksum(std::as_bytes(std::span(json)), offset);
}

const char* coding_name(PackCoding coding) {
  return coding == PackCoding::raw ? "raw" : "planes";
}

// Fields of JSON from outside, with messages that say where and what was expected.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) fail("expected an object");
  }

  const Json& get(const char* name) const {
    auto it = object_.find(name);
    if (it == object_.end()) fail(fmt::format("\"{}\" is missing", name));
    return *it;
  }
  std::string text(const char* name) const {
    const Json& value = get(name);
    if (!value.is_string()) fail(fmt::format("\"{}\": expected a string", name));
    return value;
  }
  uint64_t number(const char* name) const {
    const Json& value = get(name);
    if (!value.is_number_unsigned())
      fail(fmt::format("\"{}\": expected a whole number of at least 0", name));
    return value;
  }
  const Json& array(const char* name) const {
    const Json& value = get(name);
    if (!value.is_array()) fail(fmt::format("\"{}\": expected an array", name));
    return value;
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw_error<FormatError>("{}: {}", where_, what);
  }
  const std::string& where() const { return where_; }

 private:
  const Json& object_;
  std::string where_;
};

PackSource parse_source(const Json& json, const std::string& where) {
  Fields fields(json, where);
  PackSource source;
  source.name = fields.text("name");
  source.identity.device = fields.number("device");
  source.identity.inode = fields.number("inode");
  source.identity.size_bytes = fields.number("size_bytes");
  const Json& time = fields.get("mtime_ns");
  if (!time.is_number_integer()) fields.fail("\"mtime_ns\": expected a whole number");
  source.identity.mtime_ns = time;
  source.header_sha256 = fields.text("header_sha256");
  return source;
}

PackTensor parse_tensor(const Json& json, const std::string& pack) {
  Fields named(json, pack + ": a tensor");
  PackTensor tensor;
  tensor.key = named.text("key");
  Fields fields(json, fmt::format("{}: tensor \"{}\"", pack, tensor.key));
  std::string dtype = fields.text("dtype");
  if (auto known = parse_dtype(dtype)) {
    tensor.dtype = *known;
  } else {
    fields.fail(fmt::format("\"dtype\" is \"{}\", which no ferry knows", dtype));
  }
  int64_t bytes = item_size(tensor.dtype);
  bool overflow = false;
  for (const Json& extent : fields.array("shape")) {
    if (!extent.is_number_unsigned() || extent > static_cast<uint64_t>(INT64_MAX))
      fields.fail("\"shape\": expected whole numbers of at least 0");
    tensor.shape.push_back(extent);
    overflow |= __builtin_mul_overflow(bytes, tensor.shape.back(), &bytes);
  }
  if (overflow) fields.fail("\"shape\" has too many elements");
  const auto plain_bytes = static_cast<uint64_t>(bytes);
  tensor.offset = fields.number("offset");
  tensor.size_bytes = fields.number("size_bytes");
  tensor.checksum = parse_checksum(fields.text("checksum"), fields.where());
  std::string coding = fields.text("coding");
  if (coding == coding_name(PackCoding::raw)) {
    if (tensor.size_bytes != plain_bytes) {
      fields.fail(fmt::format("has {} bytes, expected {} for {} of shape [{}]", tensor.size_bytes,
                              plain_bytes, name(tensor.dtype), fmt::join(tensor.shape, ", ")));
    }
  } else if (coding == coding_name(PackCoding::planes)) {
    tensor.coding = PackCoding::planes;
    const auto item_bytes = static_cast<unsigned>(item_size(tensor.dtype));
    if (item_bytes != 2 && item_bytes != 4)
      fields.fail(fmt::format("{} is never split into planes", dtype));
    const uint64_t table = plane_table_bytes(plain_bytes, item_bytes);
    if (tensor.size_bytes < table || tensor.size_bytes - table > plain_bytes) {
      fields.fail(fmt::format("has {} bytes, expected {} to {}", tensor.size_bytes, table,
                              table + plain_bytes));
    }
  } else {
    fields.fail(fmt::format("\"coding\" is \"{}\", expected raw or planes: made by a newer ferry?",
                            coding));
  }
  return tensor;
}

// Tensors lie one after the other, each at the next aligned offset behind the one before.
void check_places(const PackManifest& manifest, uint64_t data_end, const std::string& where) {
  uint64_t end = kPackAlignment;  // the first page holds the magic
  for (const PackTensor& tensor : manifest.tensors) {
    if (tensor.offset % kPackAlignment != 0 || tensor.offset < end ||
        tensor.offset - end >= kPackAlignment || tensor.offset > data_end ||
        tensor.size_bytes > data_end - tensor.offset) {
      throw_error<FormatError>(
          "{}: tensor \"{}\" of {} bytes at offset {}: expected the first multiple of {} from {} "
          "on, within {} bytes of data",
          where, tensor.key, tensor.size_bytes, tensor.offset, kPackAlignment, end, data_end);
    }
    end = tensor.offset + tensor.size_bytes;
  }
}

}  // namespace

uint64_t PackTensor::plain_bytes() const {
  auto bytes = static_cast<uint64_t>(item_size(dtype));
  for (int64_t extent : shape) bytes *= static_cast<uint64_t>(extent);
  return bytes;
}

PackSource describe_source(const File& file) {
  uint64_t length = 0;
  if (file.size_bytes() < sizeof(length)) {
    throw_error<FormatError>("{}: got a file of {} bytes, expected a safetensors file",
                             file.path().string(), file.size_bytes());
  }
  file.read_exact(0, sizeof(length), reinterpret_cast<std::byte*>(&length));
  if (length > kMaxManifestBytes || length > file.size_bytes() - sizeof(length)) {
    throw_error<FormatError>("{}: the header claims {} bytes: not a safetensors file",
                             file.path().string(), length);
  }
  std::vector<std::byte> header(sizeof(length) + length);
  file.read_exact(0, header.size(), header.data());
  return {file.path().filename().string(), file.opened(), sha256_hex(header)};
}

std::string source_difference(const PackSource& packed, const PackSource& now) {
  std::vector<std::string> differences;
  auto compare = [&](const char* what, const auto& then, const auto& current) {
    if (then != current)
      differences.push_back(fmt::format("{} {} (packed: {})", what, current, then));
  };
  compare("name", packed.name, now.name);
  compare("size", packed.identity.size_bytes, now.identity.size_bytes);
  compare("modification time in ns", packed.identity.mtime_ns, now.identity.mtime_ns);
  compare("header's SHA-256", packed.header_sha256, now.header_sha256);
  compare("inode", packed.identity.inode, now.identity.inode);
  compare("device", packed.identity.device, now.identity.device);
  return fmt::format("{}", fmt::join(differences, ", "));
}

std::string write_pack_end(const PackManifest& manifest, uint64_t offset) {
  nlohmann::ordered_json json = {{"format", kFormat}, {"version", 1}, {"recipe", manifest.recipe}};
  auto& sources = json["sources"] = nlohmann::ordered_json::array();
  for (const PackSource& source : manifest.sources) {
    sources.push_back({{"name", source.name},
                       {"device", source.identity.device},
                       {"inode", source.identity.inode},
                       {"size_bytes", source.identity.size_bytes},
                       {"mtime_ns", source.identity.mtime_ns},
                       {"header_sha256", source.header_sha256}});
  }
  json["metadata"] = manifest.metadata;
  auto& tensors = json["tensors"] = nlohmann::ordered_json::array();
  for (const PackTensor& tensor : manifest.tensors) {
    tensors.push_back({{"key", tensor.key},
                       {"dtype", name(tensor.dtype)},
                       {"shape", tensor.shape},
                       {"coding", coding_name(tensor.coding)},
                       {"offset", tensor.offset},
                       {"size_bytes", tensor.size_bytes},
                       {"checksum", checksum_text(tensor.checksum)}});
  }
  // Names are UTF-8 in any safetensors file; what is not is replaced here and found to differ.
  std::string text = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  Footer footer{offset, text.size(), manifest_checksum(text, offset), {}};
  std::memcpy(footer.magic, kPackMagic.data(), sizeof(footer.magic));
  text.append(reinterpret_cast<const char*>(&footer), sizeof(footer));
  return text;
}

PackManifest parse_pack_manifest(std::string_view text, uint64_t data_end,
                                 const std::string& where) {
  Json json = parse_json(text, where);
  Fields fields(json, where);
  if (fields.text("format") != kFormat || fields.number("version") != 1) {
    throw_error<FormatError>("{}: format {} version {}: this ferry reads {} version 1", where,
                             fields.text("format"), fields.number("version"), kFormat);
  }
  PackManifest manifest;
  manifest.recipe = fields.text("recipe");
  for (const Json& source : fields.array("sources"))
    manifest.sources.push_back(parse_source(source, where + ": a source"));
  const Json& metadata = fields.get("metadata");
  if (!metadata.is_object()) fields.fail("\"metadata\": expected an object");
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) fields.fail(fmt::format("metadata \"{}\": expected a string", key));
    manifest.metadata.emplace(key, value);
  }
  for (const Json& tensor : fields.array("tensors"))
    manifest.tensors.push_back(parse_tensor(tensor, where));
  check_places(manifest, data_end, where);
  return manifest;
}

PackManifest read_pack_manifest(const File& file) {
  const std::string where = file.path().string();
  Footer footer;
  if (file.size_bytes() < kPackAlignment + sizeof(footer)) {
    throw_error<FormatError>("{}: got a file of {} bytes, expected a pack: not a pack or torn",
                             where, file.size_bytes());
  }
  char magic[8];
  file.read_exact(0, sizeof(magic), reinterpret_cast<std::byte*>(magic));
  const uint64_t end = file.size_bytes() - sizeof(footer);
  file.read_exact(end, sizeof(footer), reinterpret_cast<std::byte*>(&footer));
  if (std::string_view(magic, 8) != kPackMagic || std::string_view(footer.magic, 8) != kPackMagic) {
    throw_error<FormatError>("{}: does not begin and end as a pack does: not a pack, or torn",
                             where);
  }
  if (footer.bytes > kMaxManifestBytes || footer.bytes > end || footer.offset < kPackAlignment ||
      footer.offset != end - footer.bytes) {
    throw_error<FormatError>(
        "{}: the manifest claims {} bytes at offset {}, expected them to end at {}: torn", where,
        footer.bytes, footer.offset, end);
  }
  std::string text(footer.bytes, '\0');
  file.read_exact(footer.offset, text.size(), reinterpret_cast<std::byte*>(text.data()));
  if (manifest_checksum(text, footer.offset) != footer.sum)
    throw_error<FormatError>("{}: the manifest's checksum differs: torn or flipped bytes", where);
  return parse_pack_manifest(text, footer.offset, where);
}

}  // namespace ferry::io
