#include "ferry/weights/private_file.h"

#include <ATen/ATen.h>

#include <mutex>
#include <utility>

#include "ferry/io/scratch_file.h"
#include "ferry/tensor/dtype.h"

namespace ferry::weights {

namespace {
// Of each tensor: no element is cut by it, whatever its size, and neighbours go to an accelerator
// in one copy.
constexpr uint64_t kItemAlignment = 256;

// What was written at once. Every tensor in it holds it, by way of its file; with the last one its
// space is free again.
struct Range {
  explicit Range(std::shared_ptr<io::ScratchFile> file) : scratch(std::move(file)) {}
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
  ~Range() { scratch->discard(offset, size_bytes); }

  std::shared_ptr<io::ScratchFile> scratch;
  uint64_t offset = 0;
  uint64_t size_bytes = 0;
};

}  // namespace

std::vector<StoredTensor> write_private_file(const std::vector<BoundSlot>& slots,
                                             const std::vector<at::Tensor>& values,
                                             PrivateHome home) {
  // One file of each kind a process, opened at the first use; it lives as long as a weight that is
  // in it, and what was replaced in it takes no space.
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
  auto range = std::make_shared<Range>(scratch);
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
    if (i == 0) range->offset = one.offset;
    range->size_bytes = one.offset + one.size_bytes - range->offset;
    one.file = std::shared_ptr<const io::File>(range, scratch->file().get());
    stored.push_back(std::move(one));
  }
  // The last page is read whole.
  scratch->align();
  return stored;
}

}  // namespace ferry::weights
