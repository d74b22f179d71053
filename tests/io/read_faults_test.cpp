// The read engines on a system that fails: what a disk may do on a bad day.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <mutex>

#include "ferry/base/error.h"
#include "ferry/io/read_engine.h"
#include "ferry/testing/faulty_system.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using ferry::testing::Fault;
using ferry::testing::FaultySystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr size_t kBytes = 1 << 20;

class ReadFaultsTest : public ::testing::TestWithParam<ReadBackend> {
 protected:
  void SetUp() override {
    system_.plan = [](int64_t, bool) { return Fault::none; };
    content_ = random_bytes(kBytes, 5);
    write_text(folder_ / "data", content_);
    file_ = File::open(folder_ / "data", system_);
    try {
      engine_ = make_read_engine({.backend = GetParam(), .request_bytes = 64 << 10});
    } catch (const IoError&) {
      GTEST_SKIP() << "io_uring is refused here";
    }
  }
  void read_all() { engine_->wait(engine_->submit({{file_, 0, kBytes, kBytes, buffer_.data()}})); }
  std::string_view seen() const { return {reinterpret_cast<const char*>(buffer_.data()), kBytes}; }
  TempFolder folder_;
  std::string content_;
  FaultySystem system_;
  AlignedBuffer buffer_{kBytes};
  std::shared_ptr<const File> file_;
  std::unique_ptr<ReadEngine> engine_;
};

INSTANTIATE_TEST_SUITE_P(Backends, ReadFaultsTest,
                         ::testing::Values(ReadBackend::io_uring, ReadBackend::pread),
                         [](const auto& info) {
                           return info.param == ReadBackend::io_uring ? "io_uring" : "pread";
                         });

TEST_P(ReadFaultsTest, ShortReadsAreContinued) {
  system_.plan = [](int64_t, bool) { return Fault::short_read; };
  read_all();
  EXPECT_EQ(seen(), content_);
  EXPECT_GT(system_.reads(), 64);
  EXPECT_EQ(engine_->bytes_read(), kBytes);
}

TEST_P(ReadFaultsTest, OddShortReadsLeaveDirectIo) {
  system_.grain = 100;
  system_.plan = [](int64_t number, bool) {
    return number % 2 == 0 ? Fault::short_read : Fault::none;
  };
  read_all();
  EXPECT_EQ(seen(), content_);
}

TEST_P(ReadFaultsTest, InterruptionsAreRetried) {
  system_.plan = [](int64_t number, bool) {
    return number % 3 == 0 ? Fault::interrupted : number % 3 == 1 ? Fault::try_again : Fault::none;
  };
  read_all();
  EXPECT_EQ(seen(), content_);
}

TEST_P(ReadFaultsTest, EndlessInterruptionsFail) {
  system_.plan = [](int64_t, bool) { return Fault::try_again; };
  EXPECT_THAT(error_of<IoError>([&] { read_all(); }), HasSubstr("temporarily unavailable"));
}

TEST_P(ReadFaultsTest, DirectRefusedFallsBack) {
  if (file_->direct_fd() < 0) GTEST_SKIP() << "no O_DIRECT here";
  system_.plan = [](int64_t, bool direct) { return direct ? Fault::invalid : Fault::none; };
  read_all();
  EXPECT_EQ(seen(), content_);
}

TEST_P(ReadFaultsTest, InvalidWithoutDirectIsAnError) {
  system_.plan = [](int64_t, bool) { return Fault::invalid; };
  EXPECT_THAT(error_of<IoError>([&] { read_all(); }), HasSubstr("Invalid argument"));
}

TEST_P(ReadFaultsTest, ErrorNamesFileOffsetAndCounts) {
  system_.plan = [](int64_t number, bool) { return number == 5 ? Fault::io_error : Fault::none; };
  EXPECT_THAT(error_of<IoError>([&] { read_all(); }),
              AllOf(HasSubstr((folder_ / "data").string()),
                    HasSubstr("read of 65536 bytes at offset"), HasSubstr("Input/output error"),
                    HasSubstr("got 0 bytes"), HasSubstr("expected at least 65536")));
  // The next ticket is not concerned.
  read_all();
  EXPECT_EQ(seen(), content_);
}

TEST_P(ReadFaultsTest, RandomFaultsNeverGiveWrongBytes) {
  std::mt19937 random(23);
  std::mutex mutex;
  system_.plan = [&](int64_t, bool) {
    std::lock_guard lock(mutex);
    unsigned dice = random() % 100;
    if (dice < 30) return Fault::short_read;
    if (dice < 40) return Fault::interrupted;
    if (dice < 50) return Fault::invalid;
    if (dice < 51) return Fault::io_error;
    return Fault::none;
  };
  int good = 0;
  for (int round = 0; round < 60; ++round) {
    std::memset(buffer_.data(), 0, kBytes);
    try {
      read_all();
      ++good;
      ASSERT_EQ(seen(), content_);
    } catch (const IoError&) {
    }
  }
  RecordProperty("good", good);
}

}  // namespace
}  // namespace ferry::io
