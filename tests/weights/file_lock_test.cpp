#include "ferry/weights/file_lock.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"

namespace ferry::weights {
namespace {

using testing_io::TempFolder;

TEST(FileLock, OneAtATime) {
  TempFolder folder;
  const auto path = folder / "lock";
  {
    FileLock held = FileLock::wait(path);
    EXPECT_FALSE(FileLock::attempt(path));
    FileLock moved = std::move(held);
    EXPECT_FALSE(FileLock::attempt(path));
  }
  EXPECT_TRUE(FileLock::attempt(path));
}

TEST(FileLock, AProcessThatDiesReleases) {
  TempFolder folder;
  pid_t child = ::fork();
  if (child == 0) {
    FileLock held = FileLock::wait(folder / "lock");
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(FileLock::attempt(folder / "lock"));
}

TEST(FileLock, AStopEndsTheWait) {
  TempFolder folder;
  FileLock held = FileLock::wait(folder / "lock");
  StopSource stop;
  stop.request_stop();
  EXPECT_THROW(FileLock::wait(folder / "lock", stop.token()), Cancelled);
}

TEST(FileLock, ARemovedFileIsALockOnNothing) {
  TempFolder folder;
  FileLock held = FileLock::wait(folder / "lock");
  held.remove_file();
  EXPECT_EQ(folder.entries(), 0u);
  // The next one takes a new file, although the old lock is still held.
  std::optional<FileLock> next = FileLock::attempt(folder / "lock");
  ASSERT_TRUE(next);
  EXPECT_FALSE(FileLock::attempt(folder / "lock"));
}

TEST(FileLock, NoFolderIsAnError) {
  EXPECT_THROW(FileLock::attempt("/no/such/folder/lock"), IoError);
}

}  // namespace
}  // namespace ferry::weights
