// Safetensors files: a header reader that trusts nothing, and a streaming writer.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ferry/io/dtype.h"
#include "ferry/io/file.h"

namespace ferry::io {

struct TensorInfo {
  std::string name;
  Dtype dtype = Dtype::F32;
  std::vector<int64_t> shape;  // outermost first
  uint64_t offset = 0;         // of the first byte, from the start of the file
  uint64_t size_bytes = 0;
};

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // in the order of their offsets
  std::map<std::string, std::string> metadata;
  uint64_t data_begin = 0;  // 8 + header length
};

// Parses the 8-byte length and the JSON of a file of `file_size` bytes. `bytes` are the file's
// first bytes: at least 8, and at least 8 + header length unless the length itself is refused.
// Throws FormatError naming `where` for: a file too short, a header length over 100 MB or past the
// end, broken JSON, duplicate keys, an unknown dtype, a negative or overflowing shape, a range that
// does not match dtype and shape, overlaps, holes, a range past the end, trailing bytes.
// Data that is not aligned to its item size is accepted (readers copy).
SafetensorsHeader parse_safetensors_header(std::span<const std::byte> bytes, uint64_t file_size,
                                           const std::string& where);

// Reads and parses the header of `file`.
SafetensorsHeader read_safetensors_header(const File& file);

// Writes one safetensors file as a stream: the header first, then each tensor's bytes in the order
// given.
class SafetensorsWriter {
 public:
  // Receives a file's bytes in order.
  using Sink = std::function<void(std::span<const std::byte>)>;
  struct Entry {
    std::string name;
    Dtype dtype;
    std::vector<int64_t> shape;
  };
  // Written to a temporary name beside `path`, fsynced and renamed by finish(); the destructor of
  // an unfinished writer removes the temporary file. Throws IoError, ArgumentError (duplicate
  // names).
  SafetensorsWriter(const std::filesystem::path& path, std::vector<Entry> entries,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});
  // To whoever keeps the bytes; `where` names that place in errors.
  SafetensorsWriter(Sink sink, const std::string& where, std::vector<Entry> entries,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // Appends bytes of the data section, in any portions. Throws IoError (a full disk), ArgumentError
  // if more than the header promised is written.
  void write(std::span<const std::byte> bytes);
  // Publishes the file. Throws ArgumentError if bytes are missing.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ferry::io
