// The GGUF header reader on any bytes. Whatever it accepts must describe ranges of the file that
// share no byte.
#include <cstdint>
#include <cstdlib>

#include "ferry/base/error.h"
#include "ferry/io/gguf.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  try {
    ferry::io::GgufHeader header = ferry::io::parse_gguf_header(bytes, size, "input");
    uint64_t end = header.data_begin;
    for (const ferry::io::GgufTensor& tensor : header.tensors) {
      uint64_t elements = 1;
      for (int64_t extent : tensor.shape) elements *= static_cast<uint64_t>(extent);
      uint64_t blocks = elements / ferry::io::block_elements(tensor.type);
      if (blocks * ferry::io::block_bytes(tensor.type) != tensor.size_bytes) std::abort();
      if (tensor.offset % header.alignment != 0) std::abort();
      if (tensor.size_bytes == 0) continue;
      if (tensor.offset < end || tensor.offset + tensor.size_bytes > size) std::abort();
      end = tensor.offset + tensor.size_bytes;
    }
    for (const auto& [key, value] : header.metadata) {
      (void)value.as_integer();
      (void)value.as_integers();
    }
  } catch (const ferry::FormatError&) {
  }
  return 0;
}
