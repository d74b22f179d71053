// Weights that no longer equal their checkpoint, kept in a file without a name.
#pragma once

#include <vector>

#include "ferry/weights/binding.h"

namespace ferry::weights {

// Writes `values` (any device; the shapes of `slots`) one after the other to a scratch file of this
// process in io::cache_folder() and returns where they are. Thread-safe. Throws IoError (a full
// disk).
std::vector<StoredTensor> write_private_file(const std::vector<BoundSlot>& slots,
                                             const std::vector<at::Tensor>& values);

}  // namespace ferry::weights
