#include "ferry/weights/lossless_pack.h"

#include <ATen/Parallel.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "stored_fixture.h"

namespace ferry::weights {
namespace {

namespace fs = std::filesystem;
using namespace testing_io;
using testing::AllOf;
using testing::HasSubstr;

// Random bytes as numbers: NaNs with payloads, infinities, denormals.
at::Tensor any_bits(std::vector<int64_t> shape, at::ScalarType dtype) {
  int64_t count = c10::elementSize(dtype);
  for (int64_t extent : shape) count *= extent;
  return at::randint(0, 256, {count}, at::kByte).view(dtype).view(shape);
}

class LosslessPackTest : public testing::Test {
 protected:
  LosslessPackTest() {
    at::manual_seed(3);
    tensors_ = {{"blocks", at::randn({700, 1000}).mul(0.02).to(at::kBFloat16)},  // three blocks
                {"half", at::randn({300, 200}).to(at::kHalf)},
                {"single", at::randn({300, 201})},
                {"noise", any_bits({401, 77}, at::kBFloat16)},
                {"half_noise", any_bits({20001}, at::kHalf)},
                {"single_noise", any_bits({31, 1001}, at::kFloat)},
                {"zeros", at::zeros({100, 100}, at::kBFloat16)},
                {"table", at::randn({1000, 64}).to(at::kBFloat16)},
                {"ids", at::randint(0, 1000, {5000}, at::kLong)},
                {"eight", any_bits({70, 300}, at::kFloat8_e4m3fn)},
                {"double", at::randn({50, 60}, at::kDouble)},
                {"tiny", at::randn({3}).to(at::kBFloat16)},
                {"scalar", at::randn({})},
                {"none", at::zeros({0, 7}, at::kBFloat16)}};
    write_checkpoint(source_path(), tensors_);
    options_.keep_raw = [](const StoredTensor& tensor) { return tensor.key == "table"; };
  }

  fs::path source_path() const { return folder_ / "model.safetensors"; }
  fs::path pack_path() const { return folder_ / "model.pack"; }
  std::shared_ptr<const Checkpoint> source() const { return Checkpoint::open_file(source_path()); }

  TempFolder folder_;
  Tensors tensors_;
  PackOptions options_;
};

TEST_F(LosslessPackTest, HoldsTheSameTensorsInFewerBytes) {
  auto plain = source();
  uint64_t last = 0;
  options_.progress = [&](uint64_t bytes) {
    EXPECT_GE(bytes, last);
    last = bytes;
  };
  PackSummary summary = write_lossless_pack(*plain, pack_path(), options_);
  EXPECT_EQ(summary.plain_bytes, plain->total_bytes());
  EXPECT_EQ(last, plain->total_bytes());
  EXPECT_EQ(summary.packed_bytes, fs::file_size(pack_path()));
  EXPECT_EQ(summary.tensors, tensors_.size());

  for (int threads : {1, 3}) {
    at::set_num_threads(threads);
    auto pack = open_pack(pack_path(), plain.get());
    EXPECT_TRUE(same_bits(*pack, tensors_)) << threads;
    EXPECT_EQ(pack->metadata(), plain->metadata());
  }
  auto pack = open_pack(pack_path());  // stands on its own
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const StoredTensor& stored = pack->tensors()[i];
    EXPECT_EQ(stored.key, plain->tensors()[i].key) << "the order is kept";
    EXPECT_EQ(stored.plain_bytes(), plain->tensors()[i].size_bytes);
    EXPECT_EQ(stored.offset % 4096, 0u);
    const bool raw = stored.key == "table" || stored.key == "ids" || stored.key == "eight" ||
                     stored.key == "double" || stored.plain_bytes() < 16 << 10;
    EXPECT_EQ(stored.encoding == nullptr, raw) << stored.key;
  }
  const StoredTensor* blocks = pack->find("blocks");
  EXPECT_LT(static_cast<double>(blocks->size_bytes),
            0.67 * static_cast<double>(blocks->plain_bytes()));
  EXPECT_NO_THROW(verify_pack(pack_path()));
}

TEST_F(LosslessPackTest, TwoShardsBecomeOnePack) {
  write_checkpoint(folder_ / "m-1.safetensors", {tensors_[0]});
  write_checkpoint(folder_ / "m-2.safetensors", {tensors_[1]});
  write_text(folder_ / "m.safetensors.index.json",
             R"({"weight_map":{"blocks":"m-1.safetensors","half":"m-2.safetensors"}})");
  auto plain = Checkpoint::open_folder(folder_.path(), "m");
  write_lossless_pack(*plain, pack_path());
  EXPECT_TRUE(same_bits(*open_pack(pack_path(), plain.get()), {tensors_[0], tensors_[1]}));
  // One of the shards replaced: the pack no longer belongs.
  write_checkpoint(folder_ / "m-2.safetensors", {{"half", tensors_[1].second + 1}});
  plain = Checkpoint::open_folder(folder_.path(), "m");
  EXPECT_THAT(error_of<FormatError>([&] { open_pack(pack_path(), plain.get()); }),
              AllOf(HasSubstr("pack of another checkpoint"), HasSubstr("m-2.safetensors")));
}

// The same header, other weights.
TEST_F(LosslessPackTest, APackOfAnotherCheckpointIsRefused) {
  write_lossless_pack(*source(), pack_path(), options_);
  Tensors others = tensors_;
  others[0].second = others[0].second + 1;
  write_checkpoint(folder_ / "other.safetensors", others);
  auto other = Checkpoint::open_file(folder_ / "other.safetensors");
  EXPECT_THAT(error_of<FormatError>([&] { open_pack(pack_path(), other.get()); }),
              HasSubstr("pack of another checkpoint"));
  // Changed in place, with the same size.
  timespec times[2] = {{0, UTIME_OMIT}, {1000, 0}};
  ASSERT_EQ(::utimensat(AT_FDCWD, source_path().c_str(), times, 0), 0);
  auto changed = source();
  EXPECT_THAT(error_of<FormatError>([&] { open_pack(pack_path(), changed.get()); }),
              HasSubstr("modification time"));
}

TEST_F(LosslessPackTest, EveryFlippedByteIsFound) {
  write_lossless_pack(*source(), pack_path(), options_);
  const std::string good = read_text(pack_path());
  auto pack = open_pack(pack_path());
  std::vector<bool> is_padding(good.size(), true);
  for (const StoredTensor& tensor : pack->tensors()) {
    std::fill_n(is_padding.begin() + static_cast<long>(tensor.offset), tensor.size_bytes, false);
  }
  const StoredTensor& last = pack->tensors()[tensors_.size() - 1];
  std::fill(is_padding.begin() + static_cast<long>(last.offset + last.size_bytes), is_padding.end(),
            false);
  pack.reset();
  size_t flipped = 0;
  for (size_t at = 4096; at < good.size(); at += 6007) {
    if (is_padding[at]) continue;
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 1);
    write_text(pack_path(), bad);
    EXPECT_THROW(verify_pack(pack_path()), FormatError) << at;
    ++flipped;
  }
  EXPECT_GT(flipped, 100u);
}

TEST_F(LosslessPackTest, ADamagedBlockThrowsAtItsReader) {
  write_lossless_pack(*source(), pack_path(), options_);
  const StoredTensor stored = *open_pack(pack_path())->find("blocks");
  for (uint64_t at : {uint64_t{0}, stored.size_bytes / 2, stored.size_bytes - 1}) {
    std::string bad = read_text(pack_path());
    bad[stored.offset + at] = static_cast<char>(bad[stored.offset + at] ^ 64);
    write_text(folder_ / "bad.pack", bad);
    auto pack = open_pack(folder_ / "bad.pack");
    EXPECT_THAT(error_of<FormatError>([&] { read_stored(*pack->find("blocks")); }),
                AllOf(HasSubstr("bad.pack"), HasSubstr("\"blocks\""), HasSubstr("damaged")));
    EXPECT_TRUE(same_bits(read_stored(*pack->find("half")), tensors_[1].second));
  }
}

TEST_F(LosslessPackTest, ATornPackIsRefused) {
  write_lossless_pack(*source(), pack_path(), options_);
  const uint64_t size = fs::file_size(pack_path());
  for (uint64_t left : {size - 1, size / 2, uint64_t{5000}, uint64_t{0}}) {
    fs::resize_file(pack_path(), left);
    EXPECT_THROW(open_pack(pack_path()), FormatError) << left;
  }
  write_checkpoint(pack_path(), tensors_);
  EXPECT_THAT(error_of<FormatError>([&] { open_pack(pack_path()); }), HasSubstr("not a pack"));
}

TEST_F(LosslessPackTest, AFullDiskLeavesNothing) {
  struct FullDisk : io::System {
    int64_t left = 0;
    ssize_t write(int fd, const void* from, size_t size) override {
      if (left <= 0) return errno = ENOSPC, -1;
      ssize_t n = System::write(fd, from, std::min<size_t>(size, static_cast<size_t>(left)));
      left -= n;
      return n;
    }
  };
  write_text(pack_path(), "the old one");
  write_lossless_pack(*source(), folder_ / "whole.pack", options_);
  const auto whole = static_cast<int64_t>(fs::file_size(folder_ / "whole.pack"));
  for (int64_t room : {int64_t{0}, int64_t{4096}, whole / 2, whole - 1}) {
    FullDisk disk;
    disk.left = room;
    EXPECT_THAT(
        error_of<IoError>([&] { write_lossless_pack(*source(), pack_path(), options_, disk); }),
        HasSubstr("No space left"))
        << room;
    EXPECT_EQ(read_text(pack_path()), "the old one");
    EXPECT_EQ(folder_.entries(), 3u);
  }
}

TEST_F(LosslessPackTest, AKilledPackerLeavesNothing) {
  for (uint64_t after : {uint64_t{1}, uint64_t{1'000'000}}) {
    pid_t child = ::fork();
    if (child == 0) {
      at::set_num_threads(1);  // the parent's worker threads did not come along
      options_.progress = [&](uint64_t bytes) {
        if (bytes >= after) ::kill(::getpid(), SIGKILL);
      };
      write_lossless_pack(*source(), pack_path(), options_);
      ::_exit(0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status));
    EXPECT_EQ(folder_.entries(), 1u) << "the checkpoint alone";
  }
}

TEST_F(LosslessPackTest, CancelledLeavesNothing) {
  StopSource stop;
  options_.stop = stop.token();
  options_.progress = [&](uint64_t) { stop.request_stop(); };
  EXPECT_THROW(write_lossless_pack(*source(), pack_path(), options_), Cancelled);
  EXPECT_EQ(folder_.entries(), 1u);
}

TEST_F(LosslessPackTest, ASourceThatChangesMeanwhileIsRefused) {
  auto plain = source();
  options_.progress = [&](uint64_t bytes) {
    if (bytes < plain->total_bytes()) return;
    timespec times[2] = {{0, UTIME_OMIT}, {1000, 0}};
    ASSERT_EQ(::utimensat(AT_FDCWD, source_path().c_str(), times, 0), 0);
  };
  EXPECT_THROW(write_lossless_pack(*plain, pack_path(), options_), IoError);
  EXPECT_EQ(folder_.entries(), 1u);
}

TEST_F(LosslessPackTest, APackIsNotPackedAgain) {
  write_lossless_pack(*source(), pack_path(), options_);
  EXPECT_THAT(error_of<ArgumentError>(
                  [&] { write_lossless_pack(*open_pack(pack_path()), folder_ / "second.pack"); }),
              HasSubstr("is a pack already"));
}

// ---- through the cache ----

TEST_F(LosslessPackTest, TwoModelsOfOneClassThroughOneCache) {
  Tensors others = tensors_;
  for (size_t i : {0, 1, 2, 7, 12}) others[i].second = tensors_[i].second + 1;
  TempFolder second;
  write_checkpoint(second / "model.safetensors", others);
  PackCache cache(folder_ / "cache", 1 << 30);
  auto plain = source();
  auto other = Checkpoint::open_file(second / "model.safetensors");
  EXPECT_EQ(find_cached_pack(cache, *plain), nullptr);
  for (int round = 0; round < 2; ++round) {
    EXPECT_TRUE(same_bits(*make_cached_pack(cache, *plain, options_), tensors_));
    EXPECT_TRUE(same_bits(*make_cached_pack(cache, *other, options_), others));
  }
  EXPECT_TRUE(same_bits(*find_cached_pack(cache, *plain), tensors_));
  EXPECT_TRUE(same_bits(*find_cached_pack(cache, *other), others));
  EXPECT_EQ(cache.list().size(), 2u);

  // The first one's weights change under the same name: its pack is stale.
  write_checkpoint(source_path(), others);
  plain = source();
  EXPECT_EQ(find_cached_pack(cache, *plain), nullptr);
  EXPECT_TRUE(same_bits(*make_cached_pack(cache, *plain, options_), others));
  EXPECT_EQ(cache.list().size(), 3u);
}

// Flipped bytes that keep size, time and inode get past the cache, not past the pack.
TEST_F(LosslessPackTest, ACachedPackWithABrokenManifestIsMadeAgain) {
  PackCache cache(folder_ / "cache", 1 << 30);
  auto plain = source();
  make_cached_pack(cache, *plain, options_);
  const fs::path file = cache.folder() / (cache.list().at(0).key + ".pack");
  struct stat before {};
  ASSERT_EQ(::stat(file.c_str(), &before), 0);
  {
    std::fstream out(file, std::ios::in | std::ios::out | std::ios::binary);
    out.seekp(-40, std::ios::end);
    out << '!';
  }
  timespec times[2] = {before.st_atim, before.st_mtim};
  ASSERT_EQ(::utimensat(AT_FDCWD, file.c_str(), times, 0), 0);
  EXPECT_EQ(cache.list().at(0).fault, "") << "nothing to see from outside";
  EXPECT_THAT(cache.verify(cache.list().at(0).key), HasSubstr("damaged"));
  EXPECT_EQ(find_cached_pack(cache, *plain), nullptr);
  EXPECT_TRUE(same_bits(*make_cached_pack(cache, *plain, options_), tensors_));
  EXPECT_EQ(cache.verify(cache.list().at(0).key), "");
}

}  // namespace
}  // namespace ferry::weights
