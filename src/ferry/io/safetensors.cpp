#include "ferry/io/safetensors.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "ferry/base/error.h"

namespace ferry::io {
namespace {

using json = nlohmann::json;

// The limit of the format's reference reader.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
// Of values that ferry does not know and skips.
constexpr int kMaxDepth = 32;

uint64_t read_little_endian(const std::byte* bytes) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | std::to_integer<uint64_t>(bytes[i]);
  return value;
}

uint64_t checked_header_length(uint64_t length, uint64_t file_size, const std::string& where) {
  if (length > kMaxHeaderBytes) {
    throw_error<FormatError>(
        "{}: the header claims {} bytes, expected at most {}: not a safetensors file?", where,
        length, kMaxHeaderBytes);
  }
  if (length > file_size - 8) {
    throw_error<FormatError>(
        "{}: the header claims {} bytes, but only {} follow its length: the file is truncated or "
        "not "
        "safetensors",
        where, length, file_size - 8);
  }
  return length;
}

void check_minimal_size(uint64_t file_size, const std::string& where) {
  if (file_size < 8) {
    throw_error<FormatError>(
        "{}: got a file of {} bytes, expected at least 8 of a safetensors file", where, file_size);
  }
}

// Receives the JSON as events and keeps only what a header may hold: no tree is built, and
// duplicate keys, which a tree would swallow, are seen.
class HeaderHandler : public nlohmann::json_sax<json> {
 public:
  HeaderHandler(SafetensorsHeader& header, const std::string& where)
      : header_(header), where_(where) {}

  bool null() override { return scalar("null"); }
  bool boolean(bool) override { return scalar("a boolean"); }
  bool number_integer(number_integer_t value) override {
    if (state_ == State::shape || state_ == State::offsets) {
      fail("\"{}\" holds {}, expected no negative number", field_, value);
    }
    return scalar("a number");
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (state_ == State::shape) {
      if (value > static_cast<uint64_t>(INT64_MAX)) fail("\"shape\" holds {}: too large", value);
      tensor_.shape.push_back(static_cast<int64_t>(value));
      return true;
    }
    if (state_ == State::offsets) {
      if (offset_count_ < 2) offsets_[offset_count_] = value;
      ++offset_count_;
      return true;
    }
    return scalar("a number");
  }
  bool number_float(number_float_t, const string_t& text) override {
    if (state_ == State::shape || state_ == State::offsets) {
      fail("\"{}\" holds {}, expected whole numbers", field_, text);
    }
    return scalar("a number");
  }
  bool string(string_t& value) override {
    if (state_ == State::metadata) {
      header_.metadata[metadata_key_] = value;
      return true;
    }
    if (state_ == State::tensor && field_ == "dtype") {
      std::optional<Dtype> dtype = parse_dtype(value);
      if (!dtype) {
        fail(
            "\"dtype\" is \"{}\", expected one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2, F8_E8M0, "
            "I64, I32, I16, I8, U64, U32, U16, U8, BOOL",
            value);
      }
      tensor_.dtype = *dtype;
      return true;
    }
    return scalar("a string");
  }
  bool binary(binary_t&) override { return scalar("binary"); }

  bool start_object(size_t) override {
    switch (state_) {
      case State::outside:
        state_ = State::top;
        return true;
      case State::top:
        state_ = in_metadata_ ? State::metadata : State::tensor;
        if (!in_metadata_) begin_tensor();
        return true;
      default:
        return start_nested("an object");
    }
  }
  bool end_object() override {
    switch (state_) {
      case State::skip:
        return end_nested();
      case State::tensor:
        end_tensor();
        [[fallthrough]];
      case State::metadata:
        state_ = State::top;
        return true;
      default:
        state_ = State::outside;
        return true;
    }
  }
  bool start_array(size_t) override {
    if (state_ == State::tensor && field_ == "shape") {
      state_ = State::shape;
      return true;
    }
    if (state_ == State::tensor && field_ == "data_offsets") {
      state_ = State::offsets;
      return true;
    }
    return start_nested("an array");
  }
  bool end_array() override {
    if (state_ == State::skip) return end_nested();
    state_ = State::tensor;
    return true;
  }
  bool key(string_t& key) override {
    switch (state_) {
      case State::top:
        if (!names_.insert(key).second) fail_top("the key \"{}\" occurs twice", key);
        in_metadata_ = key == "__metadata__";
        tensor_.name = key;
        return true;
      case State::metadata:
        if (header_.metadata.contains(key)) {
          fail_top("the key \"{}\" occurs twice in __metadata__", key);
        }
        metadata_key_ = key;
        return true;
      case State::tensor:
        for (const std::string& seen : fields_) {
          if (seen == key) fail("\"{}\" occurs twice", key);
        }
        if (fields_.size() >= 64) fail("more than 64 fields");
        fields_.push_back(key);
        field_ = key;
        return true;
      default:
        return true;
    }
  }
  bool parse_error(size_t position, const std::string&, const json::exception& error) override {
    std::string_view reason = error.what();
    if (size_t end = reason.find("] "); end != std::string_view::npos)
      reason.remove_prefix(end + 2);
    fail_top("broken JSON at offset {}: {}", 8 + position, reason);
  }

 private:
  enum class State { outside, top, metadata, tensor, shape, offsets, skip };

  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
    throw FormatError(fmt::format("{}: tensor \"{}\": {}", where_, tensor_.name,
                                  fmt::format(format, std::forward<Args>(args)...)));
  }
  template <class... Args>
  [[noreturn]] void fail_top(fmt::format_string<Args...> format, Args&&... args) {
    throw FormatError(fmt::format("{}: safetensors header: {}", where_,
                                  fmt::format(format, std::forward<Args>(args)...)));
  }

  // A scalar where none of the known ones belongs.
  bool scalar(const char* got) {
    switch (state_) {
      case State::outside:
        fail_top("got {}, expected an object", got);
      case State::top:
        fail_top("\"{}\" is {}, expected an object", tensor_.name, got);
      case State::metadata:
        fail_top("__metadata__ \"{}\" is {}, expected a string", metadata_key_, got);
      case State::tensor:
        if (is_known(field_)) {
          fail("\"{}\" is {}, expected {}", field_, got,
               field_ == "dtype" ? "a string" : "an array of whole numbers");
        }
        return true;
      case State::shape:
      case State::offsets:
        fail("\"{}\" holds {}, expected whole numbers", field_, got);
      case State::skip:
        return true;
    }
    return true;
  }
  bool start_nested(const char* got) {
    if (state_ != State::skip) {
      // Unknown fields of a tensor are skipped, as the reference reader does; all else is known.
      if (state_ != State::tensor || is_known(field_)) return scalar(got);
      state_ = State::skip;
    }
    if (++skip_depth_ > kMaxDepth)
      fail("\"{}\" is nested deeper than {} levels", field_, kMaxDepth);
    return true;
  }
  bool end_nested() {
    if (--skip_depth_ == 0) state_ = State::tensor;
    return true;
  }
  static bool is_known(const std::string& field) {
    return field == "dtype" || field == "shape" || field == "data_offsets";
  }
  bool has_field(const char* field) const {
    return std::find(fields_.begin(), fields_.end(), field) != fields_.end();
  }

  void begin_tensor() {
    tensor_.shape.clear();
    fields_.clear();
    offset_count_ = 0;
  }
  void end_tensor() {
    for (const char* field : {"dtype", "shape", "data_offsets"}) {
      if (!has_field(field)) fail("\"{}\" is missing", field);
    }
    if (offset_count_ != 2) {
      fail("\"data_offsets\" holds {} numbers, expected begin and end", offset_count_);
    }
    if (offsets_[1] < offsets_[0]) {
      fail("\"data_offsets\" end at {} before they begin at {}", offsets_[1], offsets_[0]);
    }
    int64_t bytes = item_size(tensor_.dtype);
    bool overflow = false;
    for (int64_t extent : tensor_.shape) overflow |= __builtin_mul_overflow(bytes, extent, &bytes);
    // [2^40, 2^40, 0] is empty and yet no shape that anyone could compute strides for.
    if (overflow) fail("\"shape\" [{}] has too many elements", fmt::join(tensor_.shape, ", "));
    if (static_cast<uint64_t>(bytes) != offsets_[1] - offsets_[0]) {
      fail("\"data_offsets\" [{}, {}] span {} bytes, expected {} for {} of shape [{}]", offsets_[0],
           offsets_[1], offsets_[1] - offsets_[0], bytes, name(tensor_.dtype),
           fmt::join(tensor_.shape, ", "));
    }
    tensor_.offset = offsets_[0];
    tensor_.size_bytes = static_cast<uint64_t>(bytes);
    header_.tensors.push_back(tensor_);
  }

  SafetensorsHeader& header_;
  const std::string& where_;
  State state_ = State::outside;
  bool in_metadata_ = false;
  int skip_depth_ = 0;
  std::unordered_set<std::string> names_;
  std::string metadata_key_;
  TensorInfo tensor_;
  std::vector<std::string> fields_;  // of the current tensor
  std::string field_;
  uint64_t offsets_[2] = {0, 0};
  size_t offset_count_ = 0;
};

// The ranges must follow each other without overlap or hole and fill the file: a reader that trusts
// offsets would otherwise serve one tensor's bytes as another's.
void check_ranges(SafetensorsHeader& header, uint64_t data_bytes, const std::string& where) {
  std::stable_sort(header.tensors.begin(), header.tensors.end(),
                   [](const TensorInfo& a, const TensorInfo& b) {
                     return std::pair(a.offset, a.size_bytes) < std::pair(b.offset, b.size_bytes);
                   });
  uint64_t expected = 0;
  const TensorInfo* before = nullptr;
  for (const TensorInfo& tensor : header.tensors) {
    uint64_t end = tensor.offset + tensor.size_bytes;
    if (tensor.offset < expected) {
      throw_error<FormatError>(
          "{}: tensor \"{}\" begins at {} and overlaps \"{}\", which ends at {}", where,
          tensor.name, tensor.offset, before->name, expected);
    }
    if (end > data_bytes) {
      throw_error<FormatError>(
          "{}: tensor \"{}\" needs bytes {} to {} of the data, but the file has {}: it is "
          "truncated "
          "(an incomplete download?)",
          where, tensor.name, tensor.offset, end, data_bytes);
    }
    if (tensor.offset > expected) {
      throw_error<FormatError>("{}: {} bytes before tensor \"{}\" at {} belong to no tensor", where,
                               tensor.offset - expected, tensor.name, tensor.offset);
    }
    expected = end;
    before = &tensor;
  }
  if (expected != data_bytes) {
    throw_error<FormatError>(
        "{}: the tensors end after {} bytes of data, but the file has {}: trailing bytes", where,
        expected, data_bytes);
  }
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> bytes, uint64_t file_size,
                                           const std::string& where) {
  check_minimal_size(file_size, where);
  if (bytes.size() < 8) {
    throw_error<FormatError>("{}: got the first {} bytes, expected at least 8", where,
                             bytes.size());
  }
  uint64_t length = checked_header_length(read_little_endian(bytes.data()), file_size, where);
  if (length > bytes.size() - 8) {
    throw_error<FormatError>("{}: got {} bytes of a header of {}", where, bytes.size() - 8, length);
  }
  std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, length);
  if (text.empty() || text.front() != '{') {
    throw_error<FormatError>("{}: the header does not begin with '{{': not a safetensors file?",
                             where);
  }
  // The lexer takes a NUL for the end of the text and would not see what follows it.
  if (size_t nul = text.find('\0'); nul != std::string_view::npos) {
    throw_error<FormatError>("{}: safetensors header: broken JSON: a NUL byte at offset {}", where,
                             8 + nul);
  }

  SafetensorsHeader header;
  header.data_begin = 8 + length;
  HeaderHandler handler(header, where);
  json::sax_parse(text.begin(), text.end(), &handler);
  check_ranges(header, file_size - header.data_begin, where);
  for (TensorInfo& tensor : header.tensors) tensor.offset += header.data_begin;
  return header;
}

SafetensorsHeader read_safetensors_header(const File& file) {
  const std::string where = file.path().string();
  check_minimal_size(file.size_bytes(), where);
  std::vector<std::byte> bytes(8);
  file.read_exact(0, 8, bytes.data());
  uint64_t length =
      checked_header_length(read_little_endian(bytes.data()), file.size_bytes(), where);
  bytes.resize(8 + length);
  file.read_exact(8, length, bytes.data() + 8);
  return parse_safetensors_header(bytes, file.size_bytes(), where);
}

}  // namespace ferry::io
