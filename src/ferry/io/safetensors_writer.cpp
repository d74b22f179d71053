#include <fmt/ranges.h>

#include <nlohmann/json.hpp>
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

}  // namespace

struct SafetensorsWriter::State {
  AtomicFile file;
  uint64_t data_bytes;
  uint64_t written = 0;
};

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, std::vector<Entry> entries,
                                     const std::map<std::string, std::string>& metadata) {
  uint64_t data_bytes = 0;
  std::string text = make_header(entries, metadata, path.string(), data_bytes);
  std::string begin;
  for (int i = 0; i < 8; ++i) begin += static_cast<char>(text.size() >> (8 * i) & 0xff);
  begin += text;
  state_.reset(new State{AtomicFile(path), data_bytes});
  state_->file.write(std::as_bytes(std::span(begin)));
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(std::span<const std::byte> bytes) {
  uint64_t left = state_->data_bytes - state_->written;
  if (bytes.size() > left) {
    throw_error<ArgumentError>("{}: got {} bytes more, expected at most {} of {}",
                               state_->file.path().string(), bytes.size(), left,
                               state_->data_bytes);
  }
  state_->file.write(bytes);
  state_->written += bytes.size();
}

void SafetensorsWriter::finish() {
  if (state_->written != state_->data_bytes) {
    throw_error<ArgumentError>("{}: finished after {} bytes of data, expected {}",
                               state_->file.path().string(), state_->written, state_->data_bytes);
  }
  state_->file.commit();
}

}  // namespace ferry::io
