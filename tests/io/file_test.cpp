#include "ferry/io/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fcntl.h>
#include <bit>

#include "ferry/base/error.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using testing::AllOf;
using testing::HasSubstr;

TEST(File, ReadsRanges) {
  TempFolder folder;
  std::string content = random_bytes(10007);
  write_text(folder / "a", content);
  auto file = File::open(folder / "a");
  EXPECT_EQ(file->size_bytes(), content.size());
  EXPECT_TRUE(std::has_single_bit(file->direct_alignment()));
  for (auto [offset, size] : {std::pair<size_t, size_t>{0, 10007}, {1, 1}, {9999, 8}, {10007, 0}}) {
    std::string got(size, '\0');
    file->read_exact(offset, size, reinterpret_cast<std::byte*>(got.data()));
    EXPECT_EQ(got, content.substr(offset, size));
  }
}

TEST(File, PastTheEnd) {
  TempFolder folder;
  write_text(folder / "a", "12345");
  auto file = File::open(folder / "a");
  std::byte into[16];
  EXPECT_THAT(error_of<IoError>([&] { file->read_exact(3, 3, into); }),
              AllOf(HasSubstr((folder / "a").string()), HasSubstr("3 bytes at offset 3"),
                    HasSubstr("has 5")));
  EXPECT_THROW(file->read_exact(UINT64_MAX, 2, into), IoError);
}

TEST(File, WhatCannotBeOpened) {
  TempFolder folder;
  EXPECT_THAT(error_of<IoError>([&] { File::open(folder / "none"); }),
              AllOf(HasSubstr("none"), HasSubstr("No such file")));
  EXPECT_THAT(error_of<IoError>([&] { File::open(folder.path()); }), HasSubstr("a folder"));
  ASSERT_EQ(::mkfifo((folder / "fifo").c_str(), 0600), 0);
  EXPECT_THAT(error_of<IoError>([&] { File::open(folder / "fifo"); }), HasSubstr("pipe"));
}

TEST(File, NoticesTruncationAndChange) {
  TempFolder folder;
  write_text(folder / "a", random_bytes(8192));
  auto file = File::open(folder / "a");
  EXPECT_NO_THROW(file->check_unchanged());
  ASSERT_EQ(::truncate((folder / "a").c_str(), 4096), 0);
  EXPECT_THAT(error_of<IoError>([&] { file->check_unchanged(); }),
              AllOf(HasSubstr("truncated"), HasSubstr("got a file of 4096"), HasSubstr("8192")));
  std::vector<std::byte> into(8192);
  EXPECT_THAT(error_of<IoError>([&] { file->read_exact(0, 8192, into.data()); }),
              AllOf(HasSubstr("offset 0"), HasSubstr("got 4096"), HasSubstr("expected 8192")));

  write_text(folder / "b", "same size");
  auto other = File::open(folder / "b");
  timespec times[2] = {{.tv_sec = 1, .tv_nsec = 0}, {.tv_sec = 1, .tv_nsec = 0}};
  ASSERT_EQ(::utimensat(AT_FDCWD, (folder / "b").c_str(), times, 0), 0);
  EXPECT_THAT(error_of<IoError>([&] { other->check_unchanged(); }), HasSubstr("modified in place"));
}

TEST(File, ReplacedByRenameStaysReadable) {
  TempFolder folder;
  write_text(folder / "a", "old content");
  auto file = File::open(folder / "a");
  write_text(folder / "b", "new content");
  std::filesystem::rename(folder / "b", folder / "a");
  EXPECT_NO_THROW(file->check_unchanged());
  std::string got(3, '\0');
  file->read_exact(0, 3, reinterpret_cast<std::byte*>(got.data()));
  EXPECT_EQ(got, "old");
}

}  // namespace
}  // namespace ferry::io
