// diffusion_pytorch_model.safetensors.index.json from anywhere, beside two real shards: refused, or
// a checkpoint whose tensors lie within those shards.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/weights/checkpoint.h"
#include "scratch_folder.h"

namespace {

const char* kBase = "diffusion_pytorch_model";

void write_shard(const std::filesystem::path& path, const std::string& key) {
  ferry::io::SafetensorsWriter writer(path, {{key, ferry::io::Dtype::F32, {4}}});
  std::vector<std::byte> bytes(16);
  writer.write(bytes);
  writer.finish();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace ferry;
  static const fuzz::ScratchFolder folder("index");
  static const bool written = [] {
    write_shard(folder.path() / "model-00001-of-00002.safetensors", "a");
    write_shard(folder.path() / "model-00002-of-00002.safetensors", "b.weight");
    return true;
  }();
  (void)written;
  folder.write(std::string(kBase) + ".safetensors.index.json",
               {reinterpret_cast<const char*>(data), size});
  try {
    auto checkpoint = weights::Checkpoint::open_folder(folder.path(), kBase);
    for (const auto& tensor : checkpoint->tensors()) {
      if (tensor.offset + tensor.size_bytes > tensor.file->size_bytes()) std::abort();
      if (tensor.file->path().parent_path() != folder.path()) std::abort();
      if (checkpoint->find(tensor.key) != &tensor) std::abort();
    }
  } catch (const Error&) {
  }
  return 0;
}
