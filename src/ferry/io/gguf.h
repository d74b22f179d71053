// GGUF files, versions 2 and 3 (ggml's docs/gguf.md): a header reader that trusts nothing, and a
// streaming writer.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "ferry/io/file.h"
#include "ferry/io/ggml_type.h"

namespace ferry::io {

// The types of metadata values; the numbers are the format's.
enum class GgufType : uint32_t {
  u8 = 0,
  i8 = 1,
  u16 = 2,
  i16 = 3,
  u32 = 4,
  i32 = 5,
  f32 = 6,
  boolean = 7,
  string = 8,
  u64 = 10,
  i64 = 11,
  f64 = 12,
};

// A metadata value, or an array of them. Integers are held as 64 bits of their signedness, f32 as
// double; `type` says how the file stores them, for an array each element.
struct GgufValue {
  GgufType type = GgufType::u32;
  std::variant<uint64_t, int64_t, double, bool, std::string, std::vector<uint64_t>,
               std::vector<int64_t>, std::vector<double>, std::vector<bool>,
               std::vector<std::string>>
      data;

  bool is_array() const { return data.index() >= 5; }
  // Null for another type.
  const std::string* as_string() const { return std::get_if<std::string>(&data); }
  const std::vector<std::string>* as_strings() const {
    return std::get_if<std::vector<std::string>>(&data);
  }
  // An integer of any width, or nothing: also for one that does not fit.
  std::optional<int64_t> as_integer() const;
  // An array of integers of any width, or nothing: also where one does not fit.
  std::optional<std::vector<int64_t>> as_integers() const;
};

// In the order of the file.
using GgufMetadata = std::vector<std::pair<std::string, GgufValue>>;
// Null if there is none.
const GgufValue* find_value(const GgufMetadata& metadata, std::string_view key);

struct GgufTensor {
  std::string name;
  GgmlType type = GgmlType::F32;
  std::vector<int64_t> shape;  // outermost first, as in torch; in elements
  uint64_t offset = 0;         // of the first byte, from the start of the file
  uint64_t size_bytes = 0;
};

struct GgufHeader {
  uint32_t version = 3;
  uint64_t alignment = 32;
  GgufMetadata metadata;
  std::vector<GgufTensor> tensors;  // in the order of their offsets
  uint64_t data_begin = 0;
};

// Parses the header of a file of `file_size` bytes. `bytes` are the file's first bytes, at least
// the header. Throws FormatError naming `where` and the key or tensor for: another magic, version
// or byte order; counts and lengths that the file cannot hold; a header over 64 MiB; an unknown
// value type, array of arrays or boolean that is neither 0 nor 1; keys or tensors that occur twice;
// an alignment that is no power of two; more than 8 dimensions; sizes that overflow; a type that
// ggml does not have; rows that are no whole blocks; offsets that are not aligned, overlap or end
// past the file. Bytes between and behind tensors are accepted, as other readers do.
GgufHeader parse_gguf_header(std::span<const std::byte> bytes, uint64_t file_size,
                             const std::string& where);

// Reads and parses the header of `file`.
GgufHeader read_gguf_header(const File& file);

// Whether the file begins with the magic of GGUF.
bool is_gguf(const File& file);

// Writes one GGUF file (version 3) as a stream: the header first, then each tensor's bytes in the
// order given; padding is the writer's affair. Appears under `path` at finish(), whole or not at
// all.
class GgufWriter {
 public:
  struct Entry {
    std::string name;
    GgmlType type;
    std::vector<int64_t> shape;  // outermost first
  };
  // Throws IoError; ArgumentError for names or keys that occur twice, rows that are no whole
  // blocks, more than 8 dimensions, values whose data do not fit their type. An alignment other
  // than 32 comes from `general.alignment` in `metadata`.
  GgufWriter(const std::filesystem::path& path, std::vector<Entry> entries,
             const GgufMetadata& metadata = {});
  ~GgufWriter();
  GgufWriter(const GgufWriter&) = delete;
  GgufWriter& operator=(const GgufWriter&) = delete;

  // Appends bytes of the tensors, in any portions. Throws IoError (a full disk), ArgumentError if
  // more than the header promised is written.
  void write(std::span<const std::byte> bytes);
  // Publishes the file. Throws ArgumentError if bytes are missing.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ferry::io
