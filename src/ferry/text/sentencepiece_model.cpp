#include "ferry/text/sentencepiece_model.h"

#include <cstring>

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"

namespace ferry::text {
namespace {

// Walks the fields of one protobuf message. Every read is checked against the message's end.
class ProtoReader {
 public:
  enum class Wire : uint8_t { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

  ProtoReader(std::string_view bytes, size_t offset, std::string_view name)
      : bytes_(bytes), offset_(offset), name_(name) {}

  // Moves to the next field; false at the end.
  bool next() {
    if (at_ == bytes_.size()) return false;
    const uint64_t tag = read_varint();
    field_ = static_cast<uint32_t>(tag >> 3);
    wire_ = static_cast<Wire>(tag & 7);
    if (field_ == 0 || tag >> 32 != 0) fail("a field number out of range");
    switch (wire_) {
      case Wire::varint:
        value_ = read_varint();
        break;
      case Wire::bytes:
        value_ = read_varint();
        payload_ = take(value_);
        break;
      case Wire::fixed32:
        payload_ = take(4);
        break;
      case Wire::fixed64:
        payload_ = take(8);
        break;
      default:
        fail(fmt::format("wire type {}, expected 0, 1, 2 or 5", static_cast<int>(wire_)));
    }
    return true;
  }

  uint32_t field() const { return field_; }
  uint64_t varint() const {
    expect(Wire::varint);
    return value_;
  }
  std::string_view bytes() const {
    expect(Wire::bytes);
    return payload_;
  }
  float float32() const {
    expect(Wire::fixed32);
    float value;
    std::memcpy(&value, payload_.data(), sizeof(value));
    return value;
  }
  ProtoReader message() const {
    const std::string_view inner = bytes();
    return {inner, offset_ + static_cast<size_t>(inner.data() - bytes_.data()), name_};
  }
  [[noreturn]] void fail(std::string_view problem) const {
    throw_error<FormatError>("{}: byte {}: {}; not a sentencepiece model, or cut short", name_,
                             offset_ + at_, problem);
  }

 private:
  void expect(Wire wire) const {
    if (wire_ != wire) {
      fail(fmt::format("field {} has wire type {}, expected {}", field_, static_cast<int>(wire_),
                       static_cast<int>(wire)));
    }
  }
  uint64_t read_varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (at_ == bytes_.size()) fail("a number that does not end");
      const auto byte = static_cast<uint8_t>(bytes_[at_++]);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if ((byte & 0x80) == 0) return value;
    }
    fail("a number of more than 64 bits");
  }
  std::string_view take(uint64_t size) {
    if (size > bytes_.size() - at_) {
      fail(fmt::format("field {} is said to have {} bytes, but {} are left", field_, size,
                       bytes_.size() - at_));
    }
    const std::string_view taken = bytes_.substr(at_, size);
    at_ += size;
    return taken;
  }

  std::string_view bytes_;
  size_t offset_;  // of bytes_ within the file
  std::string_view name_;
  size_t at_ = 0;
  uint32_t field_ = 0;
  Wire wire_ = Wire::varint;
  uint64_t value_ = 0;
  std::string_view payload_;
};

// Field numbers of sentencepiece_model.proto.
SentencePieceModel::Entry read_piece(ProtoReader reader) {
  SentencePieceModel::Entry entry;
  while (reader.next()) {
    if (reader.field() == 1) entry.piece = reader.bytes();
    if (reader.field() == 2) entry.score = reader.float32();
    if (reader.field() == 3) {
      if (reader.varint() < 1 || reader.varint() > 6) reader.fail("an unknown type of piece");
      entry.type = static_cast<SentencePieceModel::Type>(reader.varint());
    }
  }
  return entry;
}

void read_trainer_spec(ProtoReader reader, SentencePieceModel& model) {
  while (reader.next()) {
    if (reader.field() == 3) {
      if (reader.varint() < 1 || reader.varint() > 4) reader.fail("an unknown type of model");
      model.kind = static_cast<SentencePieceModel::Kind>(reader.varint());
    }
    if (reader.field() == 35) model.byte_fallback = reader.varint() != 0;
    if (reader.field() == 40) model.unk_id = static_cast<int32_t>(reader.varint());
  }
}

void read_normalizer_spec(ProtoReader reader, SentencePieceModel& model) {
  while (reader.next()) {
    if (reader.field() == 2) model.precompiled_charsmap = reader.bytes();
  }
}

}  // namespace

SentencePieceModel SentencePieceModel::parse(std::string_view bytes, std::string_view name) {
  SentencePieceModel model;
  ProtoReader reader(bytes, 0, name);
  while (reader.next()) {
    if (reader.field() == 1) model.pieces.push_back(read_piece(reader.message()));
    if (reader.field() == 2) read_trainer_spec(reader.message(), model);
    if (reader.field() == 3) read_normalizer_spec(reader.message(), model);
  }
  if (model.pieces.empty()) {
    throw_error<FormatError>("{}: no pieces in {} bytes; not a sentencepiece model", name,
                             bytes.size());
  }
  return model;
}

SentencePieceModel SentencePieceModel::read(const std::filesystem::path& path) {
  return parse(io::read_text_file(path), path.string());
}

}  // namespace ferry::text
