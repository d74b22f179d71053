// The safetensors header reader on any bytes. Whatever it accepts must describe exactly the file.
#include <cstdint>
#include <cstdlib>

#include "ferry/base/error.h"
#include "ferry/io/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  try {
    ferry::io::SafetensorsHeader header = ferry::io::parse_safetensors_header(bytes, size, "input");
    uint64_t end = header.data_begin;
    for (const ferry::io::TensorInfo& tensor : header.tensors) {
      uint64_t count = 1;
      for (int64_t extent : tensor.shape) count *= static_cast<uint64_t>(extent);
      if (tensor.offset != end) std::abort();
      if (count * ferry::io::item_size(tensor.dtype) != tensor.size_bytes) std::abort();
      end += tensor.size_bytes;
    }
    if (end != size) std::abort();
  } catch (const ferry::FormatError&) {
  }
  return 0;
}
