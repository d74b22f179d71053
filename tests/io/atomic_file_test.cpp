#include "ferry/io/atomic_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fcntl.h>
#include <cerrno>

#include "ferry/base/error.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using testing::HasSubstr;

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// A system that refuses O_TMPFILE, and more as told.
struct OddSystem : System {
  bool no_tmpfile = true;
  int fail_fsync = 0;
  int fail_rename = 0;
  ssize_t write_limit = -1;  // then ENOSPC
  int open(const char* path, int flags, mode_t mode) override {
    if (no_tmpfile && (flags & O_TMPFILE) == O_TMPFILE) return errno = EOPNOTSUPP, -1;
    return System::open(path, flags, mode);
  }
  ssize_t write(int fd, const void* from, size_t size) override {
    if (write_limit < 0) return System::write(fd, from, std::min<size_t>(size, 7));
    if (write_limit == 0) return errno = ENOSPC, -1;
    ssize_t n = System::write(fd, from, std::min<size_t>(size, write_limit));
    write_limit -= n;
    return n;
  }
  int fsync(int fd) override {
    return fail_fsync != 0 ? (errno = fail_fsync, -1) : System::fsync(fd);
  }
  int rename(const char* from, const char* to) override {
    return fail_rename != 0 ? (errno = fail_rename, -1) : System::rename(from, to);
  }
};

TEST(AtomicFile, AppearsAtCommitOnly) {
  TempFolder folder;
  write_text(folder / "a.json", "old");
  AtomicFile file(folder / "a.json");
  file.write(bytes_of("new "));
  file.write(bytes_of("content"));
  EXPECT_EQ(read_text(folder / "a.json"), "old");
  file.commit();
  EXPECT_EQ(read_text(folder / "a.json"), "new content");
  EXPECT_EQ(folder.entries(), 1u);
  EXPECT_THROW(file.commit(), IoError);
  EXPECT_THROW(file.write(bytes_of("x")), IoError);
}

TEST(AtomicFile, WithoutTmpfileAndWithShortWrites) {
  TempFolder folder;
  OddSystem system;
  std::string text = random_bytes(1000);
  {
    AtomicFile file(folder / "b", system);
    file.write(bytes_of(text));
    EXPECT_EQ(folder.entries(), 1u);  // the temporary name
    file.commit();
  }
  EXPECT_EQ(read_text(folder / "b"), text);
  EXPECT_EQ(folder.entries(), 1u);
}

TEST(AtomicFile, UncommittedLeavesNothing) {
  TempFolder folder;
  OddSystem odd;
  for (System* system : {&System::real(), static_cast<System*>(&odd)}) {
    AtomicFile file(folder / "c", *system);
    file.write(bytes_of("half"));
  }
  EXPECT_EQ(folder.entries(), 0u);
}

TEST(AtomicFile, FailuresKeepTheOldFileAndLeaveNothing) {
  for (bool no_tmpfile : {false, true}) {
    TempFolder folder;
    write_text(folder / "d", "old");
    OddSystem system;
    system.no_tmpfile = no_tmpfile;
    auto attempt = [&] {
      AtomicFile file(folder / "d", system);
      file.write(bytes_of("0123456789"));
      file.commit();
    };
    system.write_limit = 4;
    EXPECT_THAT(error_of<IoError>(attempt),
                testing::AllOf(HasSubstr((folder / "d").string()), HasSubstr("No space left"),
                               HasSubstr("after the first 4")));
    system.write_limit = -1;
    system.fail_fsync = EIO;
    EXPECT_THAT(error_of<IoError>(attempt), HasSubstr("flush to disk"));
    system.fail_fsync = 0;
    system.fail_rename = EACCES;
    EXPECT_THAT(error_of<IoError>(attempt), HasSubstr("rename into place"));
    EXPECT_EQ(read_text(folder / "d"), "old");
    EXPECT_EQ(folder.entries(), 1u);
  }
}

TEST(AtomicFile, KilledProcessLeavesNothing) {
  TempFolder folder;
  if (int fd = ::open(folder.path().c_str(), O_TMPFILE | O_WRONLY, 0600); fd < 0) {
    GTEST_SKIP() << "no O_TMPFILE here";
  } else {
    ::close(fd);
  }
  pid_t child = ::fork();
  if (child == 0) {
    AtomicFile file(folder / "e");
    file.write(bytes_of("half"));
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(folder.entries(), 0u);
}

TEST(AtomicFile, FileSizeLimit) {
  TempFolder folder;
  pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit limit{.rlim_cur = 1000, .rlim_max = 1000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    try {
      write_file(folder / "f", random_bytes(4096));
    } catch (const IoError&) {
      ::_exit(3);
    }
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 3);
  EXPECT_EQ(folder.entries(), 0u);
}

TEST(AtomicFile, BadTargets) {
  TempFolder folder;
  EXPECT_THAT(error_of<IoError>([&] { write_file(folder / "no/such/file", "x"); }),
              HasSubstr("does the folder exist?"));
  EXPECT_THAT(error_of<IoError>([&] { write_file(folder.path(), "x"); }), HasSubstr("folder"));
  EXPECT_THROW(write_file("", "x"), IoError);
  EXPECT_EQ(folder.entries(), 0u);
}

TEST(AtomicFile, FollowsLinksAndWritesToDevices) {
  TempFolder folder;
  write_text(folder / "target", "old");
  std::filesystem::create_symlink("target", folder / "link");
  write_file(folder / "link", "new");
  EXPECT_TRUE(std::filesystem::is_symlink(folder / "link"));
  EXPECT_EQ(read_text(folder / "target"), "new");
  write_file("/dev/null", "gone");
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
}

TEST(AtomicFile, PermissionsFollowTheUmask) {
  TempFolder folder;
  mode_t before = ::umask(027);
  write_file(folder / "g", "x");
  ::umask(before);
  struct stat st {};
  ASSERT_EQ(::stat((folder / "g").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0640u);
}

}  // namespace
}  // namespace ferry::io
