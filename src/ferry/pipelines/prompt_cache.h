// What text encoders gave for prompts, remembered by content: a second picture of the same prompt
// needs no text encoder.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <list>
#include <string>
#include <vector>

#include "ferry/weights/weights_state.h"

namespace ferry::pipelines {

// Everything that decides an encoder's output, to the last bit.
struct PromptKey {
  std::string encoder = {};             // the component
  std::vector<std::string> texts = {};  // a batch: alone, a text may meet another kernel
  int64_t max_length = 0;               // tokens
  std::string setting = {};             // device, threads, attention: how it computes
  weights::WeightsState weights = {};

  bool operator==(const PromptKey& other) const = default;
};

// The most recently used outputs, in host memory, up to a number of bytes. Not thread-safe.
class PromptCache {
 public:
  // Bytes of the outputs; 0 remembers nothing. T5-XXL's output for 512 tokens takes 4 MiB.
  explicit PromptCache(uint64_t limit_bytes = 16 << 20) : limit_bytes_(limit_bytes) {}

  // A copy of its own, on `device`; undefined if it is not remembered.
  at::Tensor find(const PromptKey& key, at::Device device);
  // Keeps a copy. One that is larger than the limit is not kept.
  void put(PromptKey key, const at::Tensor& output);
  void set_limit(uint64_t limit_bytes);
  uint64_t size_bytes() const { return size_bytes_; }

 private:
  struct Entry {
    PromptKey key;
    at::Tensor output;
  };
  void drop_beyond_limit();

  uint64_t limit_bytes_;
  uint64_t size_bytes_ = 0;
  std::list<Entry> entries_;  // least recently used first
};

}  // namespace ferry::pipelines
