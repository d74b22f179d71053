#include "ferry/io/gguf.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <unordered_set>

#include "ferry/base/error.h"
#include "ferry/io/gguf_layout.h"

namespace ferry::io {
namespace {

static_assert(std::endian::native == std::endian::little);

// Vocabularies of 250k tokens with their merges take some 15 MB.
constexpr uint64_t kMaxHeaderBytes = 64ull << 20;
constexpr uint64_t kMaxKeyBytes = 65535;  // the format's
// ggml's own limit is 63; names of up to 127 are in use.
constexpr uint64_t kMaxNameBytes = 4096;

// The bytes of a header, front to back, brought in portions.
class Cursor {
 public:
  virtual ~Cursor() = default;
  Cursor(uint64_t file_size, const std::string& where) : file_size_(file_size), where_(where) {}

  uint64_t position() const { return position_; }
  uint64_t left() const { return file_size_ - position_; }

  void read(void* into, uint64_t size, std::string_view what) {
    require(size, what);
    copy(position_, {static_cast<std::byte*>(into), size});
    position_ += size;
  }
  template <class T>
  T number(std::string_view what) {
    T value;
    read(&value, sizeof(value), what);
    return value;
  }
  std::string text(uint64_t max_bytes, std::string_view what) {
    auto length = number<uint64_t>(what);
    if (length > max_bytes) {
      fail("{} is of {} bytes, expected at most {}", what, length, max_bytes);
    }
    require(length, what);
    std::string out(length, '\0');
    read(out.data(), length, what);
    return out;
  }
  // Before anything is allocated for `count` items of at least `item_bytes` each.
  void require_items(uint64_t count, uint64_t item_bytes, std::string_view what) {
    if (count > left() / item_bytes) {
      fail(
          "{} of {}, more than the {} bytes that follow can hold: the file is truncated or damaged",
          what, count, left());
    }
    if (count > (kMaxHeaderBytes - std::min(position_, kMaxHeaderBytes)) / item_bytes) too_long();
  }

  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    throw FormatError(fmt::format("{}: GGUF header at offset {}: {}", where_, position_,
                                  fmt::format(format, std::forward<Args>(args)...)));
  }

 protected:
  virtual void copy(uint64_t offset, std::span<std::byte> into) = 0;

 private:
  [[noreturn]] void too_long() const {
    fail("the header is longer than {} MiB, more than ferry takes", kMaxHeaderBytes >> 20);
  }
  void require(uint64_t size, std::string_view what) const {
    if (size > left()) {
      fail(
          "{} needs {} bytes, but the file ends after {}: it is truncated (an incomplete "
          "download?)",
          what, size, left());
    }
    if (position_ > kMaxHeaderBytes || size > kMaxHeaderBytes - position_) too_long();
  }

  uint64_t file_size_;
  const std::string& where_;
  uint64_t position_ = 0;
};

class MemoryCursor : public Cursor {
 public:
  MemoryCursor(std::span<const std::byte> bytes, uint64_t file_size, const std::string& where)
      : Cursor(file_size, where), bytes_(bytes) {}

 protected:
  void copy(uint64_t offset, std::span<std::byte> into) override {
    if (offset > bytes_.size() || into.size() > bytes_.size() - offset) {
      fail("got only the first {} bytes of the header", bytes_.size());
    }
    if (!into.empty()) std::memcpy(into.data(), bytes_.data() + offset, into.size());
  }

 private:
  std::span<const std::byte> bytes_;
};

class FileCursor : public Cursor {
 public:
  FileCursor(const File& file, const std::string& where)
      : Cursor(file.size_bytes(), where), file_(file) {}

 protected:
  void copy(uint64_t offset, std::span<std::byte> into) override {
    while (!into.empty()) {
      if (offset < begin_ || offset >= begin_ + window_.size()) {
        begin_ = offset;
        window_.resize(std::min<uint64_t>(1 << 20, file_.size_bytes() - offset));
        file_.read_exact(begin_, window_.size(), window_.data());
      }
      size_t size = std::min<uint64_t>(into.size(), begin_ + window_.size() - offset);
      std::memcpy(into.data(), window_.data() + (offset - begin_), size);
      into = into.subspan(size);
      offset += size;
    }
  }

 private:
  const File& file_;
  uint64_t begin_ = 0;
  std::vector<std::byte> window_;
};

bool read_bool(Cursor& cursor, const std::string& key) {
  auto byte = cursor.number<uint8_t>(key);
  if (byte > 1) cursor.fail("\"{}\" holds the boolean {}, expected 0 or 1", key, byte);
  return byte == 1;
}

template <class Stored, class Held>
void read_numbers(Cursor& cursor, const std::string& key, uint64_t count, bool is_array,
                  GgufValue& value) {
  if (!is_array) {
    value.data = static_cast<Held>(cursor.number<Stored>(key));
    return;
  }
  cursor.require_items(count, sizeof(Stored), fmt::format("\"{}\" is an array", key));
  std::vector<Stored> stored(count);
  cursor.read(stored.data(), count * sizeof(Stored), key);
  value.data = std::vector<Held>(stored.begin(), stored.end());
}

void read_strings(Cursor& cursor, const std::string& key, uint64_t count, bool is_array,
                  GgufValue& value) {
  if (!is_array) {
    value.data = cursor.text(kMaxHeaderBytes, key);
    return;
  }
  cursor.require_items(count, 8, fmt::format("\"{}\" is an array", key));
  std::vector<std::string> strings;
  strings.reserve(count);
  for (uint64_t i = 0; i < count; ++i) strings.push_back(cursor.text(kMaxHeaderBytes, key));
  value.data = std::move(strings);
}

void read_bools(Cursor& cursor, const std::string& key, uint64_t count, bool is_array,
                GgufValue& value) {
  if (!is_array) {
    value.data = read_bool(cursor, key);
    return;
  }
  cursor.require_items(count, 1, fmt::format("\"{}\" is an array", key));
  std::vector<bool> bools(count);
  for (uint64_t i = 0; i < count; ++i) bools[i] = read_bool(cursor, key);
  value.data = std::move(bools);
}

GgufValue read_value(Cursor& cursor, const std::string& key) {
  constexpr uint32_t kArray = 9;
  auto number = cursor.number<uint32_t>(key);
  const bool is_array = number == kArray;
  uint64_t count = 0;
  if (is_array) {
    number = cursor.number<uint32_t>(key);
    if (number == kArray)
      cursor.fail("\"{}\" is an array of arrays, which ferry does not read", key);
    count = cursor.number<uint64_t>(key);
  }
  GgufValue value{static_cast<GgufType>(number), {}};
  switch (value.type) {
    case GgufType::u8:
      read_numbers<uint8_t, uint64_t>(cursor, key, count, is_array, value);
      return value;
    case GgufType::i8:
      read_numbers<int8_t, int64_t>(cursor, key, count, is_array, value);
      return value;
    case GgufType::u16:
      read_numbers<uint16_t, uint64_t>(cursor, key, count, is_array, value);
      return value;
    case GgufType::i16:
      read_numbers<int16_t, int64_t>(cursor, key, count, is_array, value);
      return value;
    case GgufType::u32:
      read_numbers<uint32_t, uint64_t>(cursor, key, count, is_array, value);
      return value;
    case GgufType::i32:
      read_numbers<int32_t, int64_t>(cursor, key, count, is_array, value);
      return value;
    case GgufType::f32:
      read_numbers<float, double>(cursor, key, count, is_array, value);
      return value;
    case GgufType::u64:
      read_numbers<uint64_t, uint64_t>(cursor, key, count, is_array, value);
      return value;
    case GgufType::i64:
      read_numbers<int64_t, int64_t>(cursor, key, count, is_array, value);
      return value;
    case GgufType::f64:
      read_numbers<double, double>(cursor, key, count, is_array, value);
      return value;
    case GgufType::boolean:
      read_bools(cursor, key, count, is_array, value);
      return value;
    case GgufType::string:
      read_strings(cursor, key, count, is_array, value);
      return value;
  }
  cursor.fail("\"{}\" is of the unknown value type {}", key, number);
}

uint32_t read_version(Cursor& cursor) {
  char magic[4];
  cursor.read(magic, 4, "the magic");
  if (std::memcmp(magic, "GGUF", 4) != 0) {
    cursor.fail("the file does not begin with \"GGUF\": not a GGUF file?");
  }
  auto version = cursor.number<uint32_t>("the version");
  if (version != 0 && (version & 0xffff) == 0) {
    cursor.fail("the file is of the big-endian kind, which ferry does not read");
  }
  if (version != 2 && version != 3) {
    cursor.fail("the version is {}, expected 2 or 3: convert the file anew", version);
  }
  return version;
}

uint64_t alignment_of(const Cursor& cursor, const GgufMetadata& metadata) {
  const GgufValue* value = find_value(metadata, "general.alignment");
  if (!value) return kDefaultAlignment;
  std::optional<int64_t> alignment = value->as_integer();
  if (!alignment || !is_alignment(static_cast<uint64_t>(*alignment))) {
    cursor.fail("\"general.alignment\" is {}, expected a power of two up to {}",
                alignment ? std::to_string(*alignment) : "no whole number", kMaxAlignment);
  }
  return static_cast<uint64_t>(*alignment);
}

GgufTensor read_tensor_info(Cursor& cursor, uint64_t alignment) {
  GgufTensor tensor;
  tensor.name = cursor.text(kMaxNameBytes, "a tensor's name");
  auto dimensions = cursor.number<uint32_t>(tensor.name);
  if (dimensions > kMaxDimensions) {
    cursor.fail("tensor \"{}\" has {} dimensions, expected at most {}", tensor.name, dimensions,
                kMaxDimensions);
  }
  tensor.shape.resize(dimensions);
  for (uint32_t i = 0; i < dimensions; ++i) {
    auto extent = cursor.number<uint64_t>(tensor.name);
    if (extent > static_cast<uint64_t>(INT64_MAX)) {
      cursor.fail("tensor \"{}\": a dimension is {}: too large", tensor.name, extent);
    }
    tensor.shape[dimensions - 1 - i] = static_cast<int64_t>(extent);
  }
  auto number = cursor.number<uint32_t>(tensor.name);
  std::optional<GgmlType> type = parse_ggml_type(number);
  if (!type) {
    cursor.fail("tensor \"{}\" is of type {}, which ferry does not know", tensor.name, number);
  }
  tensor.type = *type;
  std::string problem;
  tensor.size_bytes = gguf_tensor_bytes(tensor.type, tensor.shape, problem);
  if (!problem.empty()) cursor.fail("tensor \"{}\": {}", tensor.name, problem);
  tensor.offset = cursor.number<uint64_t>(tensor.name);
  if (tensor.offset % alignment != 0) {
    cursor.fail("tensor \"{}\" begins at {}, which is no multiple of the alignment {}", tensor.name,
                tensor.offset, alignment);
  }
  return tensor;
}

// Each range must lie in the file, and no two may share bytes: whoever trusts offsets would
// otherwise serve one tensor's bytes as another's.
void check_ranges(GgufHeader& header, uint64_t file_size, const std::string& where) {
  std::stable_sort(header.tensors.begin(), header.tensors.end(),
                   [](const GgufTensor& a, const GgufTensor& b) {
                     return std::pair(a.offset, a.size_bytes) < std::pair(b.offset, b.size_bytes);
                   });
  uint64_t data_bytes = file_size - std::min(file_size, header.data_begin);
  uint64_t end = 0;
  const GgufTensor* before = nullptr;
  for (GgufTensor& tensor : header.tensors) {
    if (tensor.offset > data_bytes || tensor.size_bytes > data_bytes - tensor.offset) {
      throw_error<FormatError>(
          "{}: tensor \"{}\" needs {} bytes at {} of the data, but the file has {}: it is "
          "truncated "
          "(an incomplete download?)",
          where, tensor.name, tensor.size_bytes, tensor.offset, data_bytes);
    }
    if (tensor.size_bytes > 0 && tensor.offset < end) {
      throw_error<FormatError>(
          "{}: tensor \"{}\" begins at {} and overlaps \"{}\", which ends at {}", where,
          tensor.name, tensor.offset, before->name, end);
    }
    if (tensor.size_bytes > 0) {
      end = tensor.offset + tensor.size_bytes;
      before = &tensor;
    }
  }
  for (GgufTensor& tensor : header.tensors) tensor.offset += header.data_begin;
}

GgufHeader parse(Cursor& cursor, uint64_t file_size, const std::string& where) {
  GgufHeader header;
  header.version = read_version(cursor);
  auto tensors = cursor.number<uint64_t>("the number of tensors");
  auto values = cursor.number<uint64_t>("the number of metadata values");
  // A key of no bytes with a type and one byte; a tensor of no name and no dimensions.
  cursor.require_items(values, 8 + 4 + 1, "the header claims a number of metadata values");
  cursor.require_items(tensors, 8 + 4 + 4 + 8, "the header claims a number of tensors");
  std::unordered_set<std::string> keys;
  for (uint64_t i = 0; i < values; ++i) {
    std::string key = cursor.text(kMaxKeyBytes, "a metadata key");
    if (!keys.insert(key).second) cursor.fail("the key \"{}\" occurs twice", key);
    GgufValue value = read_value(cursor, key);
    header.metadata.emplace_back(std::move(key), std::move(value));
  }
  header.alignment = alignment_of(cursor, header.metadata);
  std::unordered_set<std::string> names;
  for (uint64_t i = 0; i < tensors; ++i) {
    header.tensors.push_back(read_tensor_info(cursor, header.alignment));
    const std::string& name = header.tensors.back().name;
    if (!names.insert(name).second) cursor.fail("the tensor \"{}\" occurs twice", name);
  }
  header.data_begin = align_up(cursor.position(), header.alignment);
  check_ranges(header, file_size, where);
  return header;
}

}  // namespace

std::optional<int64_t> GgufValue::as_integer() const {
  if (const auto* value = std::get_if<int64_t>(&data)) return *value;
  const auto* value = std::get_if<uint64_t>(&data);
  if (!value || *value > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
  return static_cast<int64_t>(*value);
}

std::optional<std::vector<int64_t>> GgufValue::as_integers() const {
  if (const auto* values = std::get_if<std::vector<int64_t>>(&data)) return *values;
  const auto* values = std::get_if<std::vector<uint64_t>>(&data);
  if (!values) return std::nullopt;
  auto fits = [](uint64_t value) { return value <= static_cast<uint64_t>(INT64_MAX); };
  if (!std::all_of(values->begin(), values->end(), fits)) return std::nullopt;
  return std::vector<int64_t>(values->begin(), values->end());
}

const GgufValue* find_value(const GgufMetadata& metadata, std::string_view key) {
  for (const auto& [name, value] : metadata) {
    if (name == key) return &value;
  }
  return nullptr;
}

GgufHeader parse_gguf_header(std::span<const std::byte> bytes, uint64_t file_size,
                             const std::string& where) {
  MemoryCursor cursor(bytes, file_size, where);
  return parse(cursor, file_size, where);
}

GgufHeader read_gguf_header(const File& file) {
  const std::string where = file.path().string();
  FileCursor cursor(file, where);
  return parse(cursor, file.size_bytes(), where);
}

bool is_gguf(const File& file) {
  char magic[4] = {};
  if (file.size_bytes() < 4) return false;
  file.read_exact(0, 4, reinterpret_cast<std::byte*>(magic));
  return std::memcmp(magic, "GGUF", 4) == 0;
}

}  // namespace ferry::io
