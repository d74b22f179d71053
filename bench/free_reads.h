// The reads of a limit: the same bytes as a streamed step, unsynchronised.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "ferry/io/read_engine.h"

namespace ferry::bench {

// The first `bytes` of files in large requests, all of them asked for at once, into a scratch that
// is overwritten again and again.
class FreeReads {
 public:
  FreeReads(const std::vector<std::shared_ptr<const io::File>>& files, uint64_t bytes,
            uint64_t scratch_bytes)
      : scratch_(std::max<uint64_t>(scratch_bytes, 64 << 20)) {
    io::ReadEngineOptions options;
    options.queue_depth = 512;
    options.window_bytes = 0;
    reader_ = io::make_read_engine(options);
    uint64_t place = 0;
    for (const auto& file : files) {
      for (uint64_t offset = 0; offset + kRequest <= file->size_bytes() && bytes >= kRequest;
           offset += kRequest, bytes -= kRequest) {
        requests_.push_back({file, offset, kRequest, kRequest, scratch_.data() + place});
        place = (place + kRequest) % (scratch_.size_bytes() / kRequest * kRequest);
      }
    }
  }
  void run() { reader_->wait(reader_->submit(requests_)); }

 private:
  static constexpr uint64_t kRequest = io::ReadEngineOptions{}.request_bytes;
  io::AlignedBuffer scratch_;
  std::unique_ptr<io::ReadEngine> reader_;
  std::vector<io::ReadRequest> requests_;
};

}  // namespace ferry::bench
