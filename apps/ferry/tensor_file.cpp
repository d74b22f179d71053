#include "tensor_file.h"

#include <ATen/ATen.h>

#include "ferry/io/safetensors.h"
#include "ferry/tensor/dtype.h"
#include "ferry/weights/binding.h"

namespace ferry::cli {

std::map<std::string, at::Tensor> load_tensors(const std::filesystem::path& path) {
  auto checkpoint = weights::Checkpoint::open_file(path);
  std::map<std::string, at::Tensor> tensors;
  for (const auto& stored : checkpoint->tensors())
    tensors[stored.key] = weights::read_stored(stored);
  return tensors;
}

void save_tensors(const std::filesystem::path& path,
                  const std::map<std::string, at::Tensor>& tensors) {
  std::vector<io::SafetensorsWriter::Entry> entries;
  for (const auto& [name, tensor] : tensors) {
    entries.push_back({name, tensor::from_torch(tensor.scalar_type()), tensor.sizes().vec()});
  }
  io::SafetensorsWriter writer(path, entries);
  for (const auto& [name, tensor] : tensors) {
    at::Tensor data = tensor.detach().cpu().contiguous();
    writer.write({static_cast<const std::byte*>(data.const_data_ptr()), data.nbytes()});
  }
  writer.finish();
}

}  // namespace ferry::cli
