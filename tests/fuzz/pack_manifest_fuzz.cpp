// The manifest of a pack from any bytes. Whatever is accepted must lie within the data and fit the
// shapes, and must be written and read back unchanged.
#include <cstdint>
#include <cstdlib>

#include "ferry/base/error.h"
#include "ferry/io/pack_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace ferry::io;
  constexpr uint64_t kDataEnd = 1 << 20;
  std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    PackManifest manifest = parse_pack_manifest(text, kDataEnd, "input");
    uint64_t end = kPackAlignment;
    for (const PackTensor& tensor : manifest.tensors) {
      if (tensor.offset < end || tensor.offset % kPackAlignment != 0) std::abort();
      if (tensor.coding == PackCoding::raw && tensor.plain_bytes() != tensor.size_bytes)
        std::abort();
      end = tensor.offset + tensor.size_bytes;
      if (end > kDataEnd) std::abort();
    }
    std::string again = write_pack_end(manifest, kDataEnd);
    again.resize(again.size() - kPackFooterBytes);
    PackManifest second = parse_pack_manifest(again, kDataEnd, "output");
    if (second.tensors.size() != manifest.tensors.size() || second.sources != manifest.sources)
      std::abort();
  } catch (const ferry::FormatError&) {
  }
  return 0;
}
