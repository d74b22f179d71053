// An encoding for tests: float32 values without low halves, stored as bfloat16.
#pragma once

#include <chrono>
#include <cstring>
#include <thread>

#include "ferry/base/error.h"
#include "ferry/weights/checkpoint.h"
#include "ferry/weights/encoding.h"

namespace ferry {

class WideningEncoding final : public weights::Encoding {
 public:
  explicit WideningEncoding(bool damaged = false, std::chrono::milliseconds delay = {})
      : damaged_(damaged), delay_(delay) {}
  std::string_view name() const override { return "widening"; }
  void decode(std::span<const std::byte> stored, std::span<std::byte> into) const override {
    std::this_thread::sleep_for(delay_);
    if (damaged_) throw_error<FormatError>("damaged");
    if (into.size() != 2 * stored.size()) throw_error<FormatError>("sizes differ");
    for (size_t i = 0; i < stored.size() / 2; ++i) {
      std::memset(into.data() + 4 * i, 0, 2);
      std::memcpy(into.data() + 4 * i + 2, stored.data() + 2 * i, 2);
    }
  }

 private:
  bool damaged_;
  std::chrono::milliseconds delay_;
};

// A stored bfloat16 tensor, seen as an encoded float32 one.
inline weights::StoredTensor widened(weights::StoredTensor stored, bool damaged = false,
                                     std::chrono::milliseconds delay = {}) {
  stored.dtype = io::Dtype::F32;
  stored.encoding = std::make_shared<WideningEncoding>(damaged, delay);
  return stored;
}

}  // namespace ferry
