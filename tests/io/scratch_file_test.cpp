#include "ferry/io/scratch_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>

#include "ferry/base/error.h"
#include "ferry/io/atomic_file.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

TEST(ScratchFile, WhatIsAppendedCanBeReadAtOnce) {
  testing_io::TempFolder folder;
  ScratchFile scratch(folder.path() / "made");
  EXPECT_EQ(scratch.append(bytes_of("abc")), 0u);
  EXPECT_EQ(scratch.append(bytes_of("defg")), 3u);
  scratch.align();
  EXPECT_EQ(scratch.append(bytes_of("h")), 4096u);
  std::string text(8, '?');
  scratch.file()->check_unchanged();  // it grew since it was opened, which is its business
  scratch.file()->read_exact(0, 7, reinterpret_cast<std::byte*>(text.data()));
  scratch.file()->read_exact(4096, 1, reinterpret_cast<std::byte*>(text.data()) + 7);
  EXPECT_EQ(text, "abcdefgh");
  EXPECT_TRUE(std::filesystem::is_empty(folder.path() / "made")) << "it has no name";
}

TEST(ScratchFile, AFolderThatCannotBeMadeIsAnError) {
  testing_io::TempFolder folder;
  write_file(folder.path() / "file", std::string_view("x"));
  EXPECT_THROW(ScratchFile(folder.path() / "file" / "below"), IoError);
}

// A disk that takes `room` bytes.
class FullDisk : public System {
 public:
  explicit FullDisk(size_t room) : room_(room) {}
  ssize_t write(int fd, const void* from, size_t size) override {
    if (room_ == 0) {
      errno = ENOSPC;
      return -1;
    }
    const ssize_t n = System::write(fd, from, std::min(size, room_));
    room_ -= static_cast<size_t>(n);
    return n;
  }
  size_t room_;
};

TEST(ScratchFile, AFullDiskLosesOnlyWhatDidNotFit) {
  testing_io::TempFolder folder;
  FullDisk disk(5);
  ScratchFile scratch(folder.path(), disk);
  scratch.append(bytes_of("abc"));
  EXPECT_THROW(scratch.append(bytes_of("defg")), IoError);
  disk.room_ = 100;
  EXPECT_EQ(scratch.append(bytes_of("hi")), 3u);
  std::string text(5, '?');
  scratch.file()->read_exact(0, 5, reinterpret_cast<std::byte*>(text.data()));
  EXPECT_EQ(text, "abchi");
}

TEST(ScratchFile, WhatIsDiscardedTakesNoSpace) {
  testing_io::TempFolder folder;
  ScratchFile on_disk(folder.path());
  ScratchFile in_memory{ScratchFile::InMemory()};
  for (ScratchFile* scratch : {&on_disk, &in_memory}) {
    auto space = [&] {
      struct stat found {};
      EXPECT_EQ(::fstat(scratch->file()->buffered_fd(), &found), 0);
      return found.st_blocks * 512;
    };
    const std::string first(1 << 20, 'a'), second(1 << 20, 'b');
    scratch->append(bytes_of(first));
    const uint64_t at = scratch->append(bytes_of(second));
    EXPECT_GE(space(), 2 << 20);
    scratch->discard(0, first.size());
    EXPECT_LT(space(), 3 << 19);
    std::string text(4, '?');
    scratch->file()->read_exact(at, 4, reinterpret_cast<std::byte*>(text.data()));
    EXPECT_EQ(text, "bbbb");
  }
}

}  // namespace
}  // namespace ferry::io
