#include "ferry/weights/private_file.h"

#include <ATen/ATen.h>

#include <mutex>

#include "ferry/io/scratch_file.h"
#include "ferry/tensor/dtype.h"

namespace ferry::weights {

namespace {
// Of each tensor: no element is cut by it, whatever its size, and neighbours go to an accelerator
// in one copy.
constexpr uint64_t kItemAlignment = 256;
}  // namespace

std::vector<StoredTensor> write_private_file(const std::vector<BoundSlot>& slots,
                                             const std::vector<at::Tensor>& values,
                                             PrivateHome home) {
  // One file of each kind a process, opened at the first use; it lives as long as a weight that is
  // in it.
  static std::mutex mutex;
  static std::weak_ptr<io::ScratchFile> files[2];
  std::lock_guard lock(mutex);
  std::weak_ptr<io::ScratchFile>& shared = files[static_cast<size_t>(home)];
  std::shared_ptr<io::ScratchFile> scratch = shared.lock();
  if (!scratch) {
    scratch = home == PrivateHome::disk
                  ? std::make_shared<io::ScratchFile>(io::cache_folder())
                  : std::make_shared<io::ScratchFile>(io::ScratchFile::InMemory());
    shared = scratch;
  }

  std::vector<StoredTensor> stored;
  scratch->align();
  for (size_t i = 0; i < values.size(); ++i) {
    scratch->align(kItemAlignment);
    at::Tensor value = values[i].detach().to(at::kCPU).contiguous();
    StoredTensor one;
    one.key = slots[i].slot.name();
    one.dtype = tensor::from_torch(value.scalar_type());
    one.shape = value.sizes().vec();
    one.size_bytes = value.nbytes();
    one.offset =
        scratch->append({static_cast<const std::byte*>(value.const_data_ptr()), one.size_bytes});
    // The stored tensor holds the scratch file by way of its reading side.
    one.file = std::shared_ptr<const io::File>(scratch, scratch->file().get());
    stored.push_back(std::move(one));
  }
  // The last page is read whole.
  scratch->align();
  return stored;
}

}  // namespace ferry::weights
