#include <fmt/ranges.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <unordered_set>

#include "ferry/base/error.h"
#include "ferry/io/atomic_file.h"
#include "ferry/io/gguf.h"
#include "ferry/io/gguf_layout.h"

namespace ferry::io {

namespace {

// Appends to the header in little-endian order.
class Header {
 public:
  Header(std::string& out, const std::string& where) : out_(out), where_(where) {}

  template <class T>
  void number(T value) {
    char bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    out_.append(bytes, sizeof(T));
  }
  void text(const std::string& value) {
    number<uint64_t>(value.size());
    out_ += value;
  }
  void value(const std::string& key, const GgufValue& value) {
    text(key);
    if (value.is_array()) number<uint32_t>(9);
    number(static_cast<uint32_t>(value.type));
    std::visit([&](const auto& data) { this->data(key, value.type, data); }, value.data);
  }

 private:
  template <class T>
  void data(const std::string& key, GgufType type, const std::vector<T>& values) {
    number<uint64_t>(values.size());
    for (const T& value : values) data(key, type, value);
  }
  void data(const std::string& key, GgufType type, const std::string& value) {
    if (type != GgufType::string) refuse(key);
    text(value);
  }
  void data(const std::string& key, GgufType type, bool value) {
    if (type != GgufType::boolean) refuse(key);
    number<uint8_t>(value ? 1 : 0);
  }
  void data(const std::string& key, GgufType type, double value) {
    if (type == GgufType::f32) return number(static_cast<float>(value));
    if (type == GgufType::f64) return number(value);
    refuse(key);
  }
  void data(const std::string& key, GgufType type, uint64_t value) {
    switch (type) {
      case GgufType::u8:
        return narrow<uint8_t>(key, value);
      case GgufType::u16:
        return narrow<uint16_t>(key, value);
      case GgufType::u32:
        return narrow<uint32_t>(key, value);
      case GgufType::u64:
        return number(value);
      default:
        refuse(key);
    }
  }
  void data(const std::string& key, GgufType type, int64_t value) {
    switch (type) {
      case GgufType::i8:
        return narrow<int8_t>(key, value);
      case GgufType::i16:
        return narrow<int16_t>(key, value);
      case GgufType::i32:
        return narrow<int32_t>(key, value);
      case GgufType::i64:
        return number(value);
      default:
        refuse(key);
    }
  }
  template <class T, class V>
  void narrow(const std::string& key, V value) {
    if (value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max()) refuse(key);
    number(static_cast<T>(value));
  }
  [[noreturn]] void refuse(const std::string& key) const {
    throw_error<ArgumentError>("{}: the value of \"{}\" does not fit its GGUF type", where_, key);
  }

  std::string& out_;
  const std::string& where_;
};

uint64_t wanted_alignment(const GgufMetadata& metadata, const std::string& where) {
  const GgufValue* value = find_value(metadata, "general.alignment");
  if (!value) return kDefaultAlignment;
  std::optional<int64_t> alignment = value->as_integer();
  if (!alignment || !is_alignment(static_cast<uint64_t>(*alignment))) {
    throw_error<ArgumentError>("{}: \"general.alignment\" must be a power of two up to {}", where,
                               kMaxAlignment);
  }
  return static_cast<uint64_t>(*alignment);
}

}  // namespace

struct GgufWriter::State {
  AtomicFile file;
  uint64_t alignment;
  std::vector<uint64_t> sizes;  // of the tensors, in order
  size_t current = 0;
  uint64_t written = 0;  // of the current tensor

  // Past tensors that are complete, with their padding.
  void advance() {
    while (current < sizes.size() && written == sizes[current]) {
      std::vector<std::byte> padding(align_up(written, alignment) - written);
      file.write(padding);
      written = 0;
      ++current;
    }
  }
};

GgufWriter::GgufWriter(const std::filesystem::path& path, std::vector<Entry> entries,
                       const GgufMetadata& metadata) {
  const std::string where = path.string();
  const uint64_t alignment = wanted_alignment(metadata, where);
  std::string begin = "GGUF";
  Header header(begin, where);
  header.number<uint32_t>(3);
  header.number<uint64_t>(entries.size());
  header.number<uint64_t>(metadata.size());
  std::unordered_set<std::string> keys, names;
  for (const auto& [key, value] : metadata) {
    if (!keys.insert(key).second) {
      throw_error<ArgumentError>("{}: the key \"{}\" occurs twice", where, key);
    }
    header.value(key, value);
  }
  std::vector<uint64_t> sizes;
  uint64_t offset = 0;
  for (const Entry& entry : entries) {
    if (!names.insert(entry.name).second) {
      throw_error<ArgumentError>("{}: the tensor name \"{}\" occurs twice", where, entry.name);
    }
    std::string problem;
    sizes.push_back(gguf_tensor_bytes(entry.type, entry.shape, problem));
    if (entry.shape.size() > kMaxDimensions) problem = "too many dimensions";
    if (!problem.empty()) {
      throw_error<ArgumentError>("{}: tensor \"{}\": {}", where, entry.name, problem);
    }
    header.text(entry.name);
    header.number(static_cast<uint32_t>(entry.shape.size()));
    for (size_t i = entry.shape.size(); i > 0; --i)
      header.number(static_cast<uint64_t>(entry.shape[i - 1]));
    header.number(static_cast<uint32_t>(entry.type));
    header.number(offset);
    if (__builtin_add_overflow(offset, align_up(sizes.back(), alignment), &offset)) {
      throw_error<ArgumentError>("{}: the tensors have too many bytes", where);
    }
  }
  begin.append(align_up(begin.size(), alignment) - begin.size(), '\0');
  state_.reset(new State{AtomicFile(path), alignment, std::move(sizes)});
  state_->file.write(std::as_bytes(std::span(begin)));
  state_->advance();
}

GgufWriter::~GgufWriter() = default;

void GgufWriter::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    if (state_->current == state_->sizes.size()) {
      throw_error<ArgumentError>("{}: got {} bytes more than its {} tensors have",
                                 state_->file.path().string(), bytes.size(), state_->sizes.size());
    }
    uint64_t left = state_->sizes[state_->current] - state_->written;
    size_t size = std::min<uint64_t>(left, bytes.size());
    state_->file.write(bytes.first(size));
    state_->written += size;
    bytes = bytes.subspan(size);
    state_->advance();
  }
}

void GgufWriter::finish() {
  if (state_->current != state_->sizes.size()) {
    throw_error<ArgumentError>("{}: finished with {} of {} tensors complete",
                               state_->file.path().string(), state_->current, state_->sizes.size());
  }
  state_->file.commit();
}

}  // namespace ferry::io
