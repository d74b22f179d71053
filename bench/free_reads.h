// The reads of a limit: the same bytes as a streamed step, unsynchronised.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "ferry/io/read_engine.h"

namespace ferry::bench {

// The first `bytes` of files in large requests, all of them asked for at once, into memory that is
// overwritten again and again.
class FreeReads {
 public:
  using Files = std::vector<std::shared_ptr<const io::File>>;

  // Into a scratch of its own.
  FreeReads(const Files& files, uint64_t bytes, uint64_t scratch_bytes)
      : scratch_(std::max<uint64_t>(scratch_bytes, 64 << 20)) {
    ask(files, bytes, places({{scratch_.data(), scratch_.size_bytes()}}));
  }
  // Into memory of others, which nobody else may use meanwhile and which has room for a request.
  // Where memory lies in the machine makes a virtual disk up to a tenth faster or slower, for as
  // long as it lies there.
  FreeReads(const Files& files, uint64_t bytes, std::vector<std::span<std::byte>> memory) {
    ask(files, bytes, places(std::move(memory)));
  }

  void run() { reader_->wait(reader_->submit(requests_)); }

 private:
  static constexpr uint64_t kRequest = io::ReadEngineOptions{}.request_bytes;

  // All of `memory`, which may overlap, that is a whole request on a request's boundary.
  static std::vector<std::byte*> places(std::vector<std::span<std::byte>> memory) {
    std::sort(memory.begin(), memory.end(),
              [](const auto& a, const auto& b) { return a.data() < b.data(); });
    std::vector<std::byte*> places;
    for (size_t i = 0; i < memory.size();) {
      std::byte* place = memory[i].data();
      std::byte* end = place;
      for (; i < memory.size() && memory[i].data() <= end; ++i)
        end = std::max(end, memory[i].data() + memory[i].size());
      place += (kRequest - reinterpret_cast<uintptr_t>(place) % kRequest) % kRequest;
      for (; place + kRequest <= end; place += kRequest) places.push_back(place);
    }
    return places;
  }

  void ask(const Files& files, uint64_t bytes, const std::vector<std::byte*>& places) {
    io::ReadEngineOptions options;
    options.queue_depth = 512;
    options.window_bytes = 0;
    reader_ = io::make_read_engine(options);
    for (const auto& file : files) {
      for (uint64_t offset = 0; offset + kRequest <= file->size_bytes() && bytes >= kRequest;
           offset += kRequest, bytes -= kRequest) {
        std::byte* into = places.at(requests_.size() % places.size());
        requests_.push_back({file, offset, kRequest, kRequest, into});
      }
    }
  }

  io::AlignedBuffer scratch_;
  std::unique_ptr<io::ReadEngine> reader_;
  std::vector<io::ReadRequest> requests_;
};

}  // namespace ferry::bench
