#include "ferry/weights/pack_cache.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <optional>
#include <set>
#include <thread>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"

namespace ferry::weights {
namespace {

namespace fs = std::filesystem;
using namespace testing_io;
using testing::ElementsAre;
using testing::HasSubstr;

io::PackSource source_named(const std::string& name) {
  return {name, {.device = 1, .inode = 2, .size_bytes = 3, .mtime_ns = 4}, "sha of " + name};
}

std::string key_named(const std::string& name) {
  return PackCache::key({source_named(name)}, "recipe");
}

// An entry whose bytes follow from its name.
std::string bytes_named(const std::string& name, size_t size = 1000) {
  return random_bytes(size, static_cast<unsigned>(std::hash<std::string>{}(name)));
}

CacheContent content_named(const std::string& name, size_t size = 1000) {
  CacheContent content;
  content.sources = {source_named(name)};
  content.recipe = "recipe";
  content.origin = "/models/" + name;
  content.expected_bytes = size;
  content.write = [name, size](const ByteSink& sink) {
    const std::string bytes = bytes_named(name, size);
    // In portions, as real makers do.
    for (size_t at = 0; at < bytes.size(); at += 300)
      sink(std::as_bytes(std::span(bytes)).subspan(at, std::min<size_t>(300, bytes.size() - at)));
  };
  return content;
}

std::string bytes_of(const std::shared_ptr<const io::File>& file) {
  if (!file) return "no file";
  std::string bytes(file->size_bytes(), '\0');
  file->read_exact(0, bytes.size(), reinterpret_cast<std::byte*>(bytes.data()));
  return bytes;
}

class PackCacheTest : public testing::Test {
 protected:
  fs::path data(const std::string& name) const {
    return cache_.folder() / (key_named(name) + ".pack");
  }
  fs::path manifest(const std::string& name) const {
    return cache_.folder() / (key_named(name) + ".json");
  }
  std::vector<std::string> origins() const {
    std::vector<std::string> origins;
    for (const CacheEntry& entry : cache_.list()) origins.push_back(entry.origin);
    return origins;
  }
  std::string fault() const { return cache_.list().at(0).fault; }
  // What is not used has to be made again, and is right then.
  void expect_made_again(const std::string& name) {
    EXPECT_EQ(cache_.find(key_named(name)), nullptr);
    EXPECT_EQ(bytes_of(cache_.find_or_make(content_named(name))), bytes_named(name));
    EXPECT_EQ(bytes_of(cache_.find(key_named(name))), bytes_named(name));
    EXPECT_EQ(cache_.verify(key_named(name)), "");
  }
  static void tick() { std::this_thread::sleep_for(std::chrono::milliseconds(15)); }

  TempFolder folder_;
  PackCache cache_{folder_.path(), 2500};
};

TEST(PackCacheFolder, FollowsTheEnvironment) {
  const char* names[] = {"FERRY_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "FERRY_CACHE_LIMIT"};
  std::vector<std::optional<std::string>> saved;
  for (const char* name : names) {
    const char* value = ::getenv(name);
    saved.push_back(value ? std::optional<std::string>(value) : std::nullopt);
  }
  ::setenv("FERRY_CACHE_DIR", "/a", 1);
  ::setenv("XDG_CACHE_HOME", "/b", 1);
  ::setenv("HOME", "/c", 1);
  EXPECT_EQ(PackCache::default_folder(), "/a");
  ::unsetenv("FERRY_CACHE_DIR");
  EXPECT_EQ(PackCache::default_folder(), "/b/ferry");
  ::setenv("XDG_CACHE_HOME", "", 1);
  EXPECT_EQ(PackCache::default_folder(), "/c/.cache/ferry");
  ::unsetenv("HOME");
  EXPECT_EQ(PackCache::default_folder(), fs::temp_directory_path() / "ferry");
  ::setenv("FERRY_CACHE_LIMIT", "3MiB", 1);
  EXPECT_EQ(PackCache::default_limit_bytes(), 3u << 20);
  for (size_t i = 0; i < saved.size(); ++i) {
    if (saved[i]) {
      ::setenv(names[i], saved[i]->c_str(), 1);
    } else {
      ::unsetenv(names[i]);
    }
  }
}

TEST_F(PackCacheTest, TheKeyFollowsContentAndRecipe) {
  const io::PackSource source = source_named("a");
  const std::string key = PackCache::key({source}, "r");
  EXPECT_EQ(key.size(), 64u);
  std::set<std::string> keys = {key, PackCache::key({source}, "s"),
                                PackCache::key({source, source}, "r"), PackCache::key({}, "r")};
  for (int field = 0; field < 5; ++field) {
    io::PackSource other = source;
    if (field == 0) other.identity.device = 9;
    if (field == 1) other.identity.inode = 9;
    if (field == 2) other.identity.size_bytes = 9;
    if (field == 3) other.identity.mtime_ns = 9;
    if (field == 4) other.header_sha256 = "9";
    keys.insert(PackCache::key({other}, "r"));
  }
  EXPECT_EQ(keys.size(), 9u);
  io::PackSource renamed = source;
  renamed.name = "b";
  EXPECT_EQ(PackCache::key({renamed}, "r"), key) << "found under another path it is the same";
}

TEST_F(PackCacheTest, MadeOnceThenFound) {
  EXPECT_EQ(cache_.find(key_named("a")), nullptr);
  EXPECT_EQ(cache_.find("../../etc/passwd"), nullptr);
  EXPECT_TRUE(cache_.list().empty());
  int made = 0;
  CacheContent content = content_named("a");
  content.write = [&, write = content.write](const ByteSink& sink) {
    ++made;
    write(sink);
  };
  for (int i = 0; i < 3; ++i) EXPECT_EQ(bytes_of(cache_.find_or_make(content)), bytes_named("a"));
  EXPECT_EQ(made, 1);
  EXPECT_EQ(bytes_of(cache_.find(key_named("a"))), bytes_named("a"));
  ASSERT_EQ(cache_.list().size(), 1u);
  const CacheEntry entry = cache_.list()[0];
  EXPECT_EQ(entry.key, key_named("a"));
  EXPECT_EQ(entry.recipe, "recipe");
  EXPECT_EQ(entry.size_bytes, 1000u);
  EXPECT_EQ(entry.fault, "");
  EXPECT_EQ(cache_.verify(entry.key), "");
  EXPECT_TRUE(cache_.remove(entry.key));
  EXPECT_FALSE(cache_.remove(entry.key));
  EXPECT_EQ(cache_.find(entry.key), nullptr);
  for (const auto& left : fs::directory_iterator(cache_.folder()))
    EXPECT_EQ(left.path().filename(), "evict.lock");
}

TEST_F(PackCacheTest, TheLeastRecentlyUsedGoes) {
  for (const char* name : {"a", "b"}) {
    cache_.find_or_make(content_named(name));
    tick();
  }
  std::shared_ptr<const io::File> in_use = cache_.find(key_named("b"));
  tick();
  cache_.find(key_named("a"));
  tick();
  cache_.find_or_make(content_named("c"));
  EXPECT_THAT(origins(), ElementsAre("/models/c", "/models/a"));
  EXPECT_EQ(bytes_of(in_use), bytes_named("b")) << "whoever has it open keeps it";
  EXPECT_FALSE(fs::exists(data("b")));
  EXPECT_THROW(cache_.find_or_make(content_named("huge", 2501)), BudgetError);
  EXPECT_EQ(cache_.list().size(), 2u) << "nothing was removed for what cannot fit";
}

// Content that turns out larger than expected: the others make room for it afterwards.
TEST_F(PackCacheTest, TheNewEntryIsKept) {
  cache_.find_or_make(content_named("a"));
  tick();
  CacheContent content = content_named("b", 2400);
  content.expected_bytes = 10;
  EXPECT_EQ(bytes_of(cache_.find_or_make(content)), bytes_named("b", 2400));
  EXPECT_THAT(origins(), ElementsAre("/models/b"));
}

// ---- files that must never be used ----

TEST_F(PackCacheTest, TornFiles) {
  cache_.find_or_make(content_named("a"));
  for (uint64_t size : {999u, 500u, 0u, 1001u}) {
    fs::resize_file(data("a"), size);
    EXPECT_THAT(fault(), HasSubstr("expected 1000"));
    EXPECT_THAT(cache_.verify(key_named("a")), HasSubstr("expected 1000"));
    expect_made_again("a");
  }
  fs::remove(data("a"));
  EXPECT_THAT(fault(), HasSubstr("No such file"));
  expect_made_again("a");
}

TEST_F(PackCacheTest, ChangedFiles) {
  cache_.find_or_make(content_named("a"));
  tick();
  write_text(data("a"), random_bytes(1000, 99));  // in place: same size, same inode
  EXPECT_THAT(fault(), HasSubstr("changed after it was made"));
  expect_made_again("a");
  // Replaced by a file of the same size and time.
  struct stat before {};
  ASSERT_EQ(::stat(data("a").c_str(), &before), 0);
  write_text(folder_ / "other", random_bytes(1000, 98));
  timespec times[2] = {before.st_atim, before.st_mtim};
  ASSERT_EQ(::utimensat(AT_FDCWD, (folder_ / "other").c_str(), times, 0), 0);
  fs::rename(folder_ / "other", data("a"));
  expect_made_again("a");
  // Flipped without a trace: only reading finds it.
  ASSERT_EQ(::stat(data("a").c_str(), &before), 0);
  write_text(data("a"), random_bytes(1000, 97));
  times[1] = before.st_mtim;
  ASSERT_EQ(::utimensat(AT_FDCWD, data("a").c_str(), times, 0), 0);
  EXPECT_THAT(cache_.verify(key_named("a")), HasSubstr("damaged"));
}

TEST_F(PackCacheTest, ForeignFiles) {
  cache_.find_or_make(content_named("a"));
  cache_.find_or_make(content_named("b"));
  // One entry's files under the other's names, linked so that inode, size and time are right.
  fs::remove(data("b"));
  fs::create_hard_link(data("a"), data("b"));
  expect_made_again("b");
  fs::remove(data("b"));
  fs::remove(manifest("b"));
  fs::create_hard_link(data("a"), data("b"));
  fs::copy_file(manifest("a"), manifest("b"));
  expect_made_again("b");
  // A manifest with the right key that does not follow from its sources and recipe.
  std::string text = read_text(manifest("b"));
  text.replace(text.find("\"recipe\": \"recipe\""), 18, "\"recipe\": \"recipf\"");
  write_text(manifest("b"), text);
  expect_made_again("b");
}

TEST_F(PackCacheTest, BrokenManifests) {
  cache_.find_or_make(content_named("a"));
  const std::string good = read_text(manifest("a"));
  std::string newer = good;
  newer.replace(newer.find("\"version\": 1"), 12, "\"version\": 2");
  for (const std::string& text : {std::string(), std::string("{}"), std::string("[1]"),
                                  good.substr(0, good.size() / 2), newer, random_bytes(500)}) {
    write_text(manifest("a"), text);
    EXPECT_NE(fault(), "");
    expect_made_again("a");
  }
}

TEST_F(PackCacheTest, WhatTheOwnerCannotUseIsMadeAgain) {
  cache_.find_or_make(content_named("a"));
  CacheContent content = content_named("a");
  int asked = 0;
  content.is_usable = [&](const std::shared_ptr<const io::File>&) {
    if (++asked <= 2) throw_error<FormatError>("cannot be used");
  };
  const auto before = cache_.find(key_named("a"))->opened();
  EXPECT_FALSE(cache_.find_or_make(content)->opened() == before);
}

// ---- makers that fail ----

TEST_F(PackCacheTest, AFailedMakerLeavesNothing) {
  CacheContent content = content_named("a");
  content.write = [](const ByteSink& sink) {
    std::byte bytes[10] = {};
    sink(bytes);
    throw_error<IoError>("the disk is gone");
  };
  EXPECT_THROW(cache_.find_or_make(content), IoError);
  StopSource stop;
  stop.request_stop();
  EXPECT_THROW(cache_.find_or_make(content_named("a"), stop.token()), Cancelled);
  for (const auto& left : fs::directory_iterator(cache_.folder()))
    EXPECT_EQ(left.path().filename(), "evict.lock");
  expect_made_again("a");
}

// Runs `work` in `count` processes at once; all have to exit with 0.
template <class Work>
void in_processes(int count, Work work) {
  std::vector<pid_t> children;
  for (int i = 0; i < count; ++i) {
    pid_t child = ::fork();
    if (child == 0) {
      int code = 1;
      try {
        code = work(i) ? 0 : 2;
      } catch (const std::exception& error) {
        fmt::print(stderr, "process {}: {}\n", i, error.what());
      }
      ::_exit(code);
    }
    children.push_back(child);
  }
  for (pid_t child : children) {
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  }
}

TEST_F(PackCacheTest, ProcessesMakeAnEntryOnce) {
  const fs::path log = folder_ / "made";
  in_processes(4, [&](int) {
    CacheContent content = content_named("a");
    content.write = [&, write = content.write](const ByteSink& sink) {
      int fd = ::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
      bool ok = ::write(fd, "x", 1) == 1;
      ::close(fd);
      if (!ok) throw_error<IoError>("log");
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      write(sink);
    };
    return bytes_of(cache_.find_or_make(content)) == bytes_named("a");
  });
  EXPECT_EQ(read_text(log), "x");
}

TEST_F(PackCacheTest, AKilledMakerIsNoObstacle) {
  pid_t child = ::fork();
  if (child == 0) {
    CacheContent content = content_named("a");
    content.write = [](const ByteSink& sink) {
      std::byte bytes[100] = {};
      sink(bytes);
      ::kill(::getpid(), SIGKILL);
    };
    cache_.find_or_make(content);
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_TRUE(cache_.list().empty());
  // What it might have left where files cannot be written without a name, or between two renames.
  write_text(cache_.folder() / ("." + key_named("x") + ".pack.tmp-1-0"), "half");
  write_text(data("y"), "whole, without a manifest");
  write_text(cache_.folder() / "notes.txt", "somebody's own");
  expect_made_again("a");
  EXPECT_FALSE(fs::exists(cache_.folder() / ("." + key_named("x") + ".pack.tmp-1-0")));
  EXPECT_FALSE(fs::exists(data("y")));
  EXPECT_TRUE(fs::exists(cache_.folder() / "notes.txt"));
}

// Six entries where two fit: processes evict each other's all the time, and read right ones only.
TEST_F(PackCacheTest, ProcessesThatEvictEachOther) {
  in_processes(3, [&](int process) {
    for (int i = 0; i < 60; ++i) {
      const std::string name = std::to_string((i * (process + 1) + process) % 6);
      auto file = cache_.find_or_make(content_named(name));
      if (bytes_of(file) != bytes_named(name)) return false;
      if (i % 10 == 9) cache_.remove(key_named(name));
    }
    return true;
  });
  cache_.evict(2500);
  EXPECT_LE(cache_.list().size(), 2u);
  for (const CacheEntry& entry : cache_.list()) {
    EXPECT_EQ(entry.fault, "");
    EXPECT_EQ(cache_.verify(entry.key), "");
  }
}

TEST_F(PackCacheTest, WhatIsBeingMadeIsNotRemoved) {
  CacheContent content = content_named("a");
  bool removed = true;
  content.write = [&, write = content.write](const ByteSink& sink) {
    removed = cache_.remove(key_named("a"));
    cache_.evict(0);
    write(sink);
  };
  EXPECT_EQ(bytes_of(cache_.find_or_make(content)), bytes_named("a"));
  EXPECT_FALSE(removed);
}

}  // namespace
}  // namespace ferry::weights
