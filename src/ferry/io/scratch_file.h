// A file without a name, on disk or in memory: nothing of it is left when the process ends, however
// it ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

#include "ferry/io/file.h"

namespace ferry::io {

// Grows by appending; what was written can be read through file() at once. Not thread-safe;
// file() is.
class ScratchFile {
 public:
  // In `folder`, which is made if it is missing. Throws IoError.
  explicit ScratchFile(const std::filesystem::path& folder, System& system = System::real());
  ~ScratchFile();
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  // In memory (memfd_create). Throws IoError.
  struct InMemory {};
  explicit ScratchFile(InMemory, System& system = System::real());

  // One after the other; `align` makes the next one start on a multiple of `unit`, by default a
  // page, as O_DIRECT wants. Returns where. Throws IoError (a full disk).
  uint64_t append(std::span<const std::byte> bytes);
  void align(uint64_t unit = 4096);
  // Gives back the space of what nobody reads any more (whole pages); what is there then reads as
  // zeros. Where the file system cannot, it is given back with the file. Thread-safe.
  void discard(uint64_t offset, uint64_t size_bytes) noexcept;
  const std::shared_ptr<const File>& file() const { return file_; }

 private:
  void open_for_reading();

  std::filesystem::path path_;  // for messages
  System* system_;
  int fd_ = -1;
  uint64_t end_ = 0;
  std::shared_ptr<const File> file_;
};

// Where files go that can be made again: what was measured, packs, scratch. $FERRY_CACHE_DIR, else
// $XDG_CACHE_HOME/ferry, else ~/.cache/ferry, else the system's temporary folder.
std::filesystem::path cache_folder();

}  // namespace ferry::io
