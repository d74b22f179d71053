// Weights that no longer equal their checkpoint, kept in a file without a name.
#pragma once

#include <vector>

#include "ferry/weights/binding.h"

namespace ferry::weights {

// disk: in io::cache_folder(). memory: pageable host memory, for weights that have to be somewhere
// near and were never on disk.
enum class PrivateHome { disk, memory };

// Writes `values` (any device; the shapes of `slots`) one after the other to a scratch file of this
// process and returns where they are. Thread-safe. Throws IoError (a full disk).
std::vector<StoredTensor> write_private_file(const std::vector<BoundSlot>& slots,
                                             const std::vector<at::Tensor>& values,
                                             PrivateHome home = PrivateHome::disk);

}  // namespace ferry::weights
