#include "ferry/pipelines/hub.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"

namespace ferry::pipelines {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using testing_io::error_of;
using testing_io::TempFolder;
using testing_io::write_text;

class Variables : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"})
      unsetenv(name);
  }
  void TearDown() override { SetUp(); }
};

TEST_F(Variables, CacheFolderFollowsTheVariablesInHuggingFacesOrder) {
  setenv("HOME", "/home/someone", 1);
  EXPECT_EQ(hub_cache_folder(), "/home/someone/.cache/huggingface/hub");
  setenv("XDG_CACHE_HOME", "/x", 1);
  EXPECT_EQ(hub_cache_folder(), "/x/huggingface/hub");
  setenv("HF_HOME", "/h", 1);
  EXPECT_EQ(hub_cache_folder(), "/h/hub");
  setenv("HF_HUB_CACHE", "/c", 1);
  EXPECT_EQ(hub_cache_folder(), "/c");
}

TEST_F(Variables, FindsSnapshotsByBranchTagAndCommit) {
  TempFolder cache;
  setenv("HF_HUB_CACHE", cache.path().c_str(), 1);
  fs::path repo = cache / "models--org--repo";
  fs::create_directories(repo / "snapshots/abc123");
  fs::create_directories(repo / "snapshots/def456");
  fs::create_directories(repo / "refs/refs/pr");
  write_text(repo / "refs/main", "abc123\n");
  write_text(repo / "refs/refs/pr/1", "def456");
  EXPECT_EQ(resolve_folder("org/repo"), repo / "snapshots/abc123");
  EXPECT_EQ(resolve_folder("org/repo@main"), repo / "snapshots/abc123");
  EXPECT_EQ(resolve_folder("org/repo@refs/pr/1"), repo / "snapshots/def456");
  EXPECT_EQ(resolve_folder("org/repo@def456"), repo / "snapshots/def456");
}

TEST_F(Variables, AMissingNameComesWithTheDownloadCommand) {
  TempFolder cache;
  setenv("HF_HUB_CACHE", cache.path().c_str(), 1);
  EXPECT_THAT(error_of<IoError>([] { resolve_folder("org/repo"); }),
              HasSubstr("\n  hf download org/repo"));
  EXPECT_THAT(error_of<IoError>([] { resolve_folder("org/repo@v1.0"); }),
              HasSubstr("\n  hf download org/repo --revision v1.0"));
  EXPECT_THAT(error_of<IoError>([] { resolve_folder("/no/such/folder"); }),
              HasSubstr("no such folder"));
}

TEST(HubName, TakesNamesAndNothingElse) {
  EXPECT_TRUE(HubName::parse("black-forest-labs/FLUX.1-dev"));
  EXPECT_EQ(HubName::parse("a/b@c")->revision, "c");
  for (const char* text :
       {"", "a", "a/b/c", "/a/b", "./a", "../a", "a/b@", "a/b@../../x", "a b/c"}) {
    EXPECT_FALSE(HubName::parse(text)) << text;
  }
}

}  // namespace
}  // namespace ferry::pipelines
