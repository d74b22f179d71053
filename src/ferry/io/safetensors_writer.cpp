#include <fmt/ranges.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_set>

#include "ferry/base/error.h"
#include "ferry/io/atomic_file.h"
#include "ferry/io/safetensors.h"

namespace ferry::io {
namespace {

using Entry = SafetensorsWriter::Entry;

uint64_t checked_bytes(const Entry& entry, const std::string& where) {
  int64_t bytes = item_size(entry.dtype);
  for (int64_t extent : entry.shape) {
    if (extent < 0 || __builtin_mul_overflow(bytes, extent, &bytes)) {
      throw_error<ArgumentError>("{}: tensor \"{}\": shape [{}] is negative or too large", where,
                                 entry.name, fmt::join(entry.shape, ", "));
    }
  }
  return static_cast<uint64_t>(bytes);
}

// Sets `data_bytes` to what the entries need. Keys keep the order of the entries.
std::string make_header(const std::vector<Entry>& entries,
                        const std::map<std::string, std::string>& metadata,
                        const std::string& where, uint64_t& data_bytes) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  // Built as a list: ordered_json looks every new key up in all that are there.
  auto& object = header.get_ref<nlohmann::ordered_json::object_t&>();
  if (!metadata.empty()) object.emplace_back("__metadata__", metadata);
  std::unordered_set<std::string> names = {"__metadata__"};
  data_bytes = 0;
  for (const Entry& entry : entries) {
    if (!names.insert(entry.name).second) {
      throw_error<ArgumentError>("{}: the tensor name \"{}\" {}", where, entry.name,
                                 entry.name == "__metadata__" ? "is reserved" : "occurs twice");
    }
    uint64_t end = 0;
    if (__builtin_add_overflow(data_bytes, checked_bytes(entry, where), &end)) {
      throw_error<ArgumentError>("{}: the tensors have too many bytes", where);
    }
    nlohmann::ordered_json fields;
    fields["dtype"] = name(entry.dtype);
    fields["shape"] = entry.shape;
    fields["data_offsets"] = {data_bytes, end};
    object.emplace_back(entry.name, std::move(fields));
    data_bytes = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception& error) {
    throw_error<ArgumentError>("{}: a name or metadata value is not valid UTF-8: {}", where,
                               error.what());
  }
  // Spaces up to a multiple of 8, so that the data begin aligned.
  text.append((8 - text.size() % 8) % 8, ' ');
  if (text.size() > 100'000'000) {
    throw_error<ArgumentError>("{}: a header of {} bytes is more than safetensors allows", where,
                               text.size());
  }
  return text;
}

// The file's first bytes: the header's length and the header.
std::string begin_of(const std::vector<Entry>& entries,
                     const std::map<std::string, std::string>& metadata, const std::string& where,
                     uint64_t& data_bytes) {
  const std::string text = make_header(entries, metadata, where, data_bytes);
  std::string begin;
  for (int i = 0; i < 8; ++i) begin += static_cast<char>(text.size() >> (8 * i) & 0xff);
  return begin + text;
}

}  // namespace

struct SafetensorsWriter::State {
  std::optional<AtomicFile> file;  // none where a sink keeps the bytes
  Sink sink;
  std::string where;
  uint64_t data_bytes = 0;
  uint64_t written = 0;
};

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, std::vector<Entry> entries,
                                     const std::map<std::string, std::string>& metadata)
    : state_(std::make_unique<State>()) {
  // Before the file is made: entries that are refused leave nothing behind.
  const std::string begin = begin_of(entries, metadata, path.string(), state_->data_bytes);
  AtomicFile& file = state_->file.emplace(path);
  state_->where = file.path().string();
  state_->sink = [&file](std::span<const std::byte> bytes) { file.write(bytes); };
  state_->sink(std::as_bytes(std::span(begin)));
}

SafetensorsWriter::SafetensorsWriter(Sink sink, const std::string& where,
                                     std::vector<Entry> entries,
                                     const std::map<std::string, std::string>& metadata)
    : state_(std::make_unique<State>()) {
  state_->sink = std::move(sink);
  state_->where = where;
  const std::string begin = begin_of(entries, metadata, where, state_->data_bytes);
  state_->sink(std::as_bytes(std::span(begin)));
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(std::span<const std::byte> bytes) {
  uint64_t left = state_->data_bytes - state_->written;
  if (bytes.size() > left) {
    throw_error<ArgumentError>("{}: got {} bytes more, expected at most {} of {}", state_->where,
                               bytes.size(), left, state_->data_bytes);
  }
  state_->sink(bytes);
  state_->written += bytes.size();
}

void SafetensorsWriter::finish() {
  if (state_->written != state_->data_bytes) {
    throw_error<ArgumentError>("{}: finished after {} bytes of data, expected {}", state_->where,
                               state_->written, state_->data_bytes);
  }
  if (state_->file) state_->file->commit();
}

}  // namespace ferry::io
