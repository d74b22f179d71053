#include "ferry/io/read_engine.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <thread>

#include "ferry/base/error.h"
#include "ferry/io/read_ticket.h"
#include "temp_folder.h"

namespace ferry::io {
namespace {

using namespace ferry::testing_io;
using testing::AllOf;
using testing::HasSubstr;

constexpr size_t kFileBytes = (3 << 20) + 1234;
constexpr uint64_t kBlock = 4096;

// One file for all tests, in the usual temporary folder and in memory.
const std::string& content() {
  static const std::string bytes = random_bytes(kFileBytes, 42);
  return bytes;
}

bool uring_works() {
  static const bool works = [] {
    try {
      make_read_engine({.backend = ReadBackend::io_uring});
      return true;
    } catch (const IoError&) {
      return false;
    }
  }();
  return works;
}

struct Mode {
  ReadBackend backend;
  bool direct;
};

std::string mode_name(const testing::TestParamInfo<Mode>& info) {
  return std::string(info.param.backend == ReadBackend::io_uring ? "io_uring" : "pread") +
         (info.param.direct ? "_direct" : "_buffered");
}

class ReadEngineTest : public testing::TestWithParam<Mode> {
 protected:
  void SetUp() override {
    if (GetParam().backend == ReadBackend::io_uring && !uring_works()) {
      GTEST_SKIP() << "io_uring is refused here";
    }
    write_text(folder_ / "data", content());
    file_ = File::open(folder_ / "data");
  }
  ReadEngineOptions options() const {
    ReadEngineOptions options;
    options.backend = GetParam().backend;
    options.direct = GetParam().direct;
    options.request_bytes = 64 << 10;
    return options;
  }
  std::string_view seen(const AlignedBuffer& buffer, size_t offset, size_t size) const {
    return {reinterpret_cast<const char*>(buffer.data()) + offset, size};
  }
  TempFolder folder_;
  std::shared_ptr<const File> file_;
};

INSTANTIATE_TEST_SUITE_P(Backends, ReadEngineTest,
                         testing::Values(Mode{ReadBackend::io_uring, true},
                                         Mode{ReadBackend::io_uring, false},
                                         Mode{ReadBackend::pread, true},
                                         Mode{ReadBackend::pread, false}),
                         mode_name);

TEST_P(ReadEngineTest, WholeFileWithOverRead) {
  auto engine = make_read_engine(options());
  EXPECT_EQ(engine->backend(), GetParam().backend);
  size_t padded = (kFileBytes + kBlock - 1) / kBlock * kBlock;
  AlignedBuffer buffer(padded);
  ReadTicketPtr ticket = engine->submit({{file_, 0, padded, kFileBytes, buffer.data()}});
  engine->wait(ticket);
  EXPECT_TRUE(ticket->done());
  EXPECT_EQ(seen(buffer, 0, kFileBytes), content());
  EXPECT_EQ(engine->bytes_read(), kFileBytes);
  engine->wait(ticket);  // again is harmless
}

TEST_P(ReadEngineTest, IdleTimeIsNoReadTime) {
  using namespace std::chrono_literals;
  using Clock = std::chrono::steady_clock;
  ReadEngineOptions o = options();
  o.rate_limit_bytes_per_s = 20'000'000;
  auto engine = make_read_engine(o);
  EXPECT_EQ(engine->read_time().rate(), 0);
  AlignedBuffer buffer(kFileBytes);
  const auto begin = Clock::now();
  std::this_thread::sleep_for(100ms);
  engine->wait(engine->submit({{file_, 0, kFileBytes, kFileBytes, buffer.data()}}));
  const ReadTime read = engine->read_time();
  const std::chrono::duration<double> busy = Clock::now() - begin - 100ms;
  EXPECT_EQ(read.bytes, kFileBytes);
  EXPECT_GE(read.seconds, 0.95 * kFileBytes / 20e6) << "waiting for the rate counts";
  EXPECT_LE(read.seconds, busy.count());
  std::this_thread::sleep_for(20ms);
  EXPECT_EQ(engine->read_time().seconds, read.seconds);

  engine->cancel(engine->submit({{file_, 0, kFileBytes, kFileBytes, buffer.data()}}));
  const double cancelled = engine->read_time().seconds;
  std::this_thread::sleep_for(20ms);
  EXPECT_EQ(engine->read_time().seconds, cancelled);
}

TEST_P(ReadEngineTest, RandomRangesAgreeWithTheFile) {
  std::mt19937 random(3);
  for (unsigned depth : {1u, 2u, 7u, 64u}) {
    ReadEngineOptions o = options();
    o.queue_depth = depth;
    o.request_bytes = 4096u << (random() % 5);
    auto engine = make_read_engine(o);
    for (int round = 0; round < 12; ++round) {
      AlignedBuffer buffer(kFileBytes + (1 << 20));
      std::vector<ReadRequest> requests;
      std::vector<ReadRequest> expected;
      std::byte* at = buffer.data();
      for (unsigned i = 0; i < 1 + random() % 9; ++i) {
        bool aligned = random() % 2 == 0;
        uint64_t offset = random() % kFileBytes;
        uint64_t size = random() % 200000;
        if (aligned) {
          offset = offset / kBlock * kBlock;
          size = (size + kBlock) / kBlock * kBlock;
          at = buffer.data() + (at - buffer.data() + kBlock - 1) / kBlock * kBlock;
        }
        uint64_t available = std::min<uint64_t>(size, kFileBytes - offset);
        if (!aligned) size = available;
        if (static_cast<uint64_t>(at - buffer.data()) + size > buffer.size_bytes()) break;
        requests.push_back({file_, offset, size, available, at});
        at += size;
      }
      expected = requests;
      engine->wait(engine->submit(std::move(requests)));
      for (const ReadRequest& r : expected) {
        ASSERT_EQ(std::string_view(reinterpret_cast<char*>(r.into), r.min_bytes),
                  std::string_view(content()).substr(r.offset, r.min_bytes))
            << r.offset << " " << r.size_bytes;
      }
    }
  }
}

TEST_P(ReadEngineTest, ManyTicketsReapedInAnyOrder) {
  auto engine = make_read_engine(options());
  constexpr size_t kPiece = 128 << 10;
  constexpr size_t kPieces = 24;
  AlignedBuffer buffer(kPiece * kPieces);
  std::vector<ReadTicketPtr> tickets;
  for (size_t i = 0; i < kPieces; ++i) {
    tickets.push_back(
        engine->submit({{file_, i * kPiece, kPiece, kPiece, buffer.data() + i * kPiece}}));
  }
  for (size_t i = kPieces; i-- > 0;) engine->wait(tickets[i]);
  EXPECT_EQ(seen(buffer, 0, kPiece * kPieces),
            std::string_view(content()).substr(0, buffer.size_bytes()));
}

// Who waits for the first of many does not wait for all of the others: a read begins when all that
// lies a window before it has ended.
TEST_P(ReadEngineTest, AWindowKeepsTheOrder) {
  if (GetParam().backend != ReadBackend::io_uring) GTEST_SKIP() << "a pool takes them in order";
  ReadEngineOptions o = options();
  o.window_bytes = 128 << 10;
  o.request_bytes = 64 << 10;
  constexpr size_t kPieces = 48;
  for (int round = 0; round < 20; ++round) {
    // A request each: none goes past a multiple of its size.
    AlignedBuffer memory(kPieces * o.request_bytes, o.request_bytes);
    auto engine = make_read_engine(o);
    std::vector<ReadTicketPtr> tickets;
    // Each more than a third of the window, so that no three share it. Long ones first, which the
    // short ones behind them would overtake.
    for (size_t i = 0; i < kPieces; ++i) {
      const size_t size = i % 4 == 0 ? 64 << 10 : 44 << 10;
      std::byte* into = memory.data() + i * o.request_bytes;
      tickets.push_back(engine->submit({{file_, i * (8 << 10), size, size, into}}));
    }
    while (!tickets.back()->done()) {
      for (size_t i = 2; i < kPieces; ++i) {
        if (!tickets[i]->done()) continue;
        EXPECT_TRUE(tickets[i - 2]->done()) << i;
      }
    }
  }
}

TEST_P(ReadEngineTest, TheThreadThatAskedEnds) {
  ReadEngineOptions o = options();
  o.window_bytes = o.request_bytes;
  auto engine = make_read_engine(o);
  AlignedBuffer buffer(2 << 20);
  ReadTicketPtr ticket;
  std::thread([&] {
    ticket = engine->submit({{file_, 0, buffer.size_bytes(), buffer.size_bytes(), buffer.data()}});
  }).join();
  EXPECT_NO_THROW(engine->wait(ticket));
  EXPECT_EQ(seen(buffer, 0, buffer.size_bytes()),
            std::string_view(content()).substr(0, buffer.size_bytes()));
}

// Tickets that come while others are on their way, from several threads.
TEST_P(ReadEngineTest, ThreadsLeaveTicketsAtOnce) {
  ReadEngineOptions o = options();
  auto engine = make_read_engine(o);
  constexpr size_t kThreads = 4;
  constexpr size_t kPieces = 16;
  constexpr size_t kPiece = 40 << 10;
  AlignedBuffer buffer(kThreads * kPieces * kPiece);
  std::vector<std::vector<ReadTicketPtr>> tickets(kThreads);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = t; i < kThreads * kPieces; i += kThreads)
        tickets[t].push_back(
            engine->submit({{file_, i * kPiece, kPiece, kPiece, buffer.data() + i * kPiece}}));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& mine : tickets) {
    for (const ReadTicketPtr& ticket : mine) engine->wait(ticket);
  }
  EXPECT_EQ(seen(buffer, 0, buffer.size_bytes()),
            std::string_view(content()).substr(0, buffer.size_bytes()));
}

// A file of which a byte at offset 1 can be read once it was released: a pipe is behind it.
class HungFile {
 public:
  explicit HungFile(const std::filesystem::path& any) : file(File::open(any)) {
    EXPECT_EQ(::pipe(ends_), 0);
    EXPECT_GE(::dup2(ends_[0], file->buffered_fd()), 0);
  }
  ~HungFile() {
    for (int end : ends_) ::close(end);
  }
  void release() { EXPECT_EQ(::write(ends_[1], "x", 1), 1); }

  const std::shared_ptr<const File> file;

 private:
  int ends_[2] = {-1, -1};
};

bool becomes_true(const std::function<bool()>& condition,
                  std::chrono::seconds within = std::chrono::seconds(10)) {
  const auto limit = std::chrono::steady_clock::now() + within;
  while (!condition() && std::chrono::steady_clock::now() < limit) std::this_thread::yield();
  return condition();
}

// It holds nobody up: who leaves a ticket wakes the reading thread.
TEST_P(ReadEngineTest, ReadsWhileAnotherReadHangs) {
  if (GetParam().backend != ReadBackend::io_uring) GTEST_SKIP() << "pread refuses a pipe";
  auto engine = make_read_engine(options());
  HungFile hung(folder_ / "data");
  AlignedBuffer buffer(2 * kBlock);
  const auto first = engine->submit({{hung.file, 1, 1, 1, buffer.data() + 1}});
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const auto second = engine->submit({{file_, 0, kBlock, kBlock, buffer.data() + kBlock}});
  EXPECT_TRUE(becomes_true([&] { return second->done(); }));
  EXPECT_FALSE(first->done());
  hung.release();
  engine->wait(first);
  engine->wait(second);
  EXPECT_EQ(seen(buffer, 1, 1), "x");
  EXPECT_EQ(seen(buffer, kBlock, kBlock), std::string_view(content()).substr(0, kBlock));
}

// Who waits for a ticket waits for all of it, in whatever order: the window is for what comes
// behind.
TEST_P(ReadEngineTest, AWindowHoldsBackOtherTicketsOnly) {
  if (GetParam().backend != ReadBackend::io_uring) GTEST_SKIP() << "pread refuses a pipe";
  ReadEngineOptions o = options();
  o.request_bytes = 64 << 10;
  o.window_bytes = 2 * o.request_bytes;
  constexpr size_t kRest = 1 << 20;
  auto engine = make_read_engine(o);
  HungFile hung(folder_ / "data");
  AlignedBuffer buffer(o.request_bytes + kRest + kBlock, o.request_bytes);
  std::byte* rest = buffer.data() + o.request_bytes;
  const auto first =
      engine->submit({{hung.file, 1, 1, 1, buffer.data() + 1}, {file_, 0, kRest, kRest, rest}});
  const auto second = engine->submit({{file_, 0, kBlock, kBlock, rest + kRest}});
  EXPECT_TRUE(becomes_true([&] { return engine->bytes_read() == kRest; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(second->done());
  EXPECT_FALSE(first->done());
  hung.release();
  engine->wait(first);
  engine->wait(second);
  EXPECT_EQ(seen(buffer, o.request_bytes, kRest), std::string_view(content()).substr(0, kRest));
}

// Three quarters of it in whole tickets like the first, or two; behind a large one nothing but,
// once only its end is left, a quarter.
TEST_P(ReadEngineTest, AWindowIsMadeForTheFirstTicket) {
  if (GetParam().backend != ReadBackend::io_uring) GTEST_SKIP() << "pread refuses a pipe";
  ReadEngineOptions o = options();
  o.request_bytes = 64 << 10;
  o.window_bytes = 16 * o.request_bytes;
  o.queue_depth = 64;
  constexpr size_t kOthers = 16;
  struct Case {
    size_t first, fit;  // in requests
    bool last = false;  // the hung read is the last of the first ticket, not its first
  };
  for (const Case& c : {Case{0, 11}, Case{3, 9}, Case{5, 5}, Case{9, 9}, Case{12, 0}, Case{20, 0},
                        Case{3, 12, true}, Case{20, 3, true}}) {
    auto engine = make_read_engine(o);
    HungFile hung(folder_ / "data");
    AlignedBuffer buffer((1 + c.first + kOthers) * o.request_bytes, o.request_bytes);
    std::byte* into = buffer.data() + o.request_bytes;
    const size_t rest = c.first * o.request_bytes;
    std::vector<ReadRequest> requests = {{hung.file, 1, 1, 1, buffer.data() + 1},
                                         {file_, 0, rest, rest, into}};
    if (c.last) std::swap(requests[0], requests[1]);
    const auto first = engine->submit(requests);
    std::vector<ReadTicketPtr> others;
    for (size_t i = 0; i < kOthers; ++i) {
      std::byte* at = into + rest + i * o.request_bytes;
      others.push_back(engine->submit({{file_, 0, o.request_bytes, o.request_bytes, at}}));
    }
    EXPECT_TRUE(
        becomes_true([&] { return engine->bytes_read() >= rest + c.fit * o.request_bytes; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(engine->bytes_read(), rest + c.fit * o.request_bytes) << c.first << c.last;
    hung.release();
    engine->wait(first);
    for (const auto& ticket : others) engine->wait(ticket);
  }
}

TEST_P(ReadEngineTest, ReadsWhileNobodyWaits) {
  ReadEngineOptions o = options();
  o.queue_depth = 1;
  auto engine = make_read_engine(o);
  AlignedBuffer buffer(1 << 20);
  ReadTicketPtr ticket = engine->submit({{file_, 0, 1 << 20, 1 << 20, buffer.data()}});
  ASSERT_TRUE(becomes_true([&] { return ticket->done(); }, std::chrono::seconds(20)));
  EXPECT_EQ(seen(buffer, 0, 1 << 20), std::string_view(content()).substr(0, 1 << 20));
}

TEST_P(ReadEngineTest, EmptyTickets) {
  auto engine = make_read_engine(options());
  std::byte byte{};
  EXPECT_TRUE(engine->submit({})->done());
  ReadTicketPtr ticket = engine->submit({{file_, 5, 0, 0, nullptr}, {file_, 0, 0, 0, &byte}});
  EXPECT_TRUE(ticket->done());
  engine->wait(ticket);
  engine->cancel(ticket);
  EXPECT_EQ(engine->bytes_read(), 0u);
}

TEST_P(ReadEngineTest, BadRequests) {
  auto engine = make_read_engine(options());
  std::byte byte{};
  EXPECT_THROW(engine->submit({{nullptr, 0, 1, 1, &byte}}), ArgumentError);
  EXPECT_THROW(engine->submit({{file_, 0, 1, 1, nullptr}}), ArgumentError);
  EXPECT_THROW(engine->submit({{file_, 0, 1, 2, &byte}}), ArgumentError);
  EXPECT_THROW(engine->submit({{file_, UINT64_MAX - 1, 1, 1, &byte}}), ArgumentError);
}

TEST_P(ReadEngineTest, TruncatedWhileOpen) {
  auto engine = make_read_engine(options());
  constexpr uint64_t kLeft = (1 << 20) + 100;
  ASSERT_EQ(::truncate((folder_ / "data").c_str(), kLeft), 0);
  AlignedBuffer buffer(3 << 20);
  ReadTicketPtr ticket = engine->submit({{file_, 0, 3 << 20, 3 << 20, buffer.data()}});
  std::string message = error_of<IoError>([&] { engine->wait(ticket); });
  EXPECT_THAT(message, AllOf(HasSubstr((folder_ / "data").string()), HasSubstr("offset "),
                             HasSubstr("expected at least"), HasSubstr("truncated")));
  EXPECT_TRUE(ticket->done());
  // The error stays with its ticket: the engine goes on.
  EXPECT_THROW(engine->wait(ticket), IoError);
  engine->wait(engine->submit({{file_, 4096, 8192, 8192, buffer.data()}}));
  EXPECT_EQ(seen(buffer, 0, 8192), std::string_view(content()).substr(4096, 8192));
}

TEST_P(ReadEngineTest, MinBytesDecideAtTheEnd) {
  auto engine = make_read_engine(options());
  AlignedBuffer buffer(kBlock * 2);
  uint64_t last = kFileBytes / kBlock * kBlock;
  uint64_t tail = kFileBytes - last;
  engine->wait(engine->submit({{file_, last, kBlock, tail, buffer.data()}}));
  EXPECT_EQ(seen(buffer, 0, tail), std::string_view(content()).substr(last));
  ReadTicketPtr ticket = engine->submit({{file_, last, kBlock, tail + 1, buffer.data()}});
  EXPECT_THAT(
      error_of<IoError>([&] { engine->wait(ticket); }),
      AllOf(HasSubstr("offset " + std::to_string(last)), HasSubstr("got " + std::to_string(tail)),
            HasSubstr("expected at least " + std::to_string(tail + 1))));
  // Unset: all of it.
  ReadTicketPtr unset = engine->submit({{file_, last, kBlock, 0, buffer.data()}});
  EXPECT_THROW(engine->wait(unset), IoError);
}

TEST_P(ReadEngineTest, CancelAtRandomTimes) {
  std::mt19937 random(11);
  for (int round = 0; round < 25; ++round) {
    ReadEngineOptions o = options();
    o.queue_depth = 1 + random() % 16;
    o.request_bytes = 32 << 10;
    auto engine = make_read_engine(o);
    AlignedBuffer first(1 << 20);
    AlignedBuffer second(1 << 20);
    ReadTicketPtr a = engine->submit({{file_, 0, 1 << 20, 1 << 20, first.data()}});
    ReadTicketPtr b = engine->submit({{file_, 1 << 20, 1 << 20, 1 << 20, second.data()}});
    if (random() % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
    bool was_done = a->done();
    engine->cancel(a);
    ASSERT_TRUE(a->done());
    // Nothing writes there any more.
    std::memset(first.data(), 0x5a, first.size_bytes());
    if (!was_done) {
      try {
        engine->wait(a);  // it may have ended just before
      } catch (const Cancelled&) {
      }
    }
    engine->wait(b);
    EXPECT_EQ(seen(second, 0, 1 << 20), std::string_view(content()).substr(1 << 20, 1 << 20));
    EXPECT_EQ(seen(first, 0, 1 << 20).find_first_not_of('\x5a'), std::string_view::npos);
  }
}

TEST_P(ReadEngineTest, CancelledTicketThrowsCancelled) {
  ReadEngineOptions o = options();
  o.rate_limit_bytes_per_s = 1 << 20;  // so that it cannot be done yet
  auto engine = make_read_engine(o);
  AlignedBuffer buffer(1 << 20);
  ReadTicketPtr ticket = engine->submit({{file_, 0, 1 << 20, 1 << 20, buffer.data()}});
  engine->cancel(ticket);
  EXPECT_TRUE(ticket->done());
  EXPECT_THROW(engine->wait(ticket), Cancelled);
}

TEST_P(ReadEngineTest, DestroyedInTheMiddle) {
  AlignedBuffer buffer(3 << 20);
  ReadTicketPtr ticket;
  for (int round = 0; round < 10; ++round) {
    auto engine = make_read_engine(options());
    ticket = engine->submit({{file_, 0, 3 << 20, 3 << 20, buffer.data()}});
    engine.reset();
    EXPECT_TRUE(ticket->done());
    std::memset(buffer.data(), 0, buffer.size_bytes());
  }
  EXPECT_EQ(seen(buffer, 0, 3 << 20).find_first_not_of('\0'), std::string_view::npos);
}

TEST_P(ReadEngineTest, RateLimitHolds) {
  ReadEngineOptions o = options();
  o.rate_limit_bytes_per_s = 8 << 20;
  auto engine = make_read_engine(o);
  AlignedBuffer buffer(2 << 20);
  auto begin = std::chrono::steady_clock::now();
  engine->wait(engine->submit({{file_, 0, 2 << 20, 2 << 20, buffer.data()}}));
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT_GE(seconds, 0.249);  // 2 MiB at 8 MiB/s
  EXPECT_LE(seconds, 20.0);
}

TEST_P(ReadEngineTest, FilesInMemory) {
  if (!std::filesystem::is_directory("/dev/shm")) GTEST_SKIP() << "no tmpfs";
  TempFolder memory("/dev/shm");
  write_text(memory / "data", content());
  auto file = File::open(memory / "data");
  auto engine = make_read_engine(options());
  AlignedBuffer buffer(kFileBytes);
  engine->wait(engine->submit({{file, 0, kFileBytes, kFileBytes, buffer.data()}}));
  EXPECT_EQ(seen(buffer, 0, kFileBytes), content());
  engine->wait(engine->submit({{file, 8192, 65536, 65536, buffer.data()}}));
  EXPECT_EQ(seen(buffer, 0, 65536), std::string_view(content()).substr(8192, 65536));
}

// Two that share a huge page of new memory would both clear it.
TEST(ReadTicket, ChunksEndWhereMemoryHasAMultipleOfTheirSize) {
  TempFolder folder;
  write_text(folder / "bytes", std::string(300 << 10, 'x'));
  constexpr uint64_t kChunk = 64 << 10;
  AlignedBuffer memory(300 << 10);
  ReadRequest request{File::open(folder / "bytes"), 0, 200 << 10, 0, memory.data() + 4096};
  auto ticket = std::make_shared<Ticket>(std::vector<ReadRequest>{request}, /*direct=*/true);
  uint64_t position = 0;
  while (ticket->has_next()) {
    const uint64_t size = ticket->next_size(kChunk);
    const Chunk chunk = ticket->next(ticket, kChunk);
    EXPECT_EQ(chunk.size_bytes, size);
    EXPECT_EQ(chunk.offset, position);
    EXPECT_EQ(chunk.into, request.into + position);
    EXPECT_GT(size, 0u);
    position += size;
    const auto first = reinterpret_cast<uintptr_t>(chunk.into);
    EXPECT_EQ(first / kChunk, (first + size - 1) / kChunk);
    if (ticket->has_next()) {
      EXPECT_EQ((first + size) % kChunk, 0u);
    }
    ticket->chunk_ended();
  }
  EXPECT_EQ(position, request.size_bytes);
}

// With a clock of its own: reads that wait are credited the time until somebody looks, as a disk
// would read on; idle time is not.
TEST(RateLimiter, CreditsWaitingTimeOnly) {
  using std::chrono::milliseconds;
  RateLimiter limiter(1000);  // a byte each millisecond
  RateLimiter::Clock::time_point start{std::chrono::hours(1)};
  limiter.begin(start);
  EXPECT_EQ(limiter.start_of(100), start + milliseconds(100));
  limiter.take(100);
  EXPECT_EQ(limiter.start_of(100), start + milliseconds(200));
  // However late the consumer comes, what waits starts at the times the disk would have.
  limiter.take(100);
  limiter.take(100);
  EXPECT_EQ(limiter.start_of(100), start + milliseconds(400));
  // Work after a pause begins anew, work right behind queues up.
  limiter.begin(start + milliseconds(1000));
  EXPECT_EQ(limiter.start_of(50), start + milliseconds(1050));
  limiter.take(500);
  limiter.begin(start + milliseconds(1100));
  EXPECT_EQ(limiter.start_of(100), start + milliseconds(1600));
  EXPECT_FALSE(RateLimiter(0).limited());
}

TEST(ReadEngineChoice, UringIsUsedWhereItWorks) {
  if (!uring_works()) GTEST_SKIP() << "io_uring is refused here";
  auto engine = make_read_engine();
  if (std::getenv("FERRY_READ_BACKEND") == nullptr) {
    EXPECT_EQ(engine->backend(), ReadBackend::io_uring);
    EXPECT_THAT(engine->reason(), AllOf(HasSubstr("io_uring"), HasSubstr("available")));
  }
}

// Going on would let the kernel write into memory that was given back.
TEST(UringDeathTest, EndsWhereTheKernelTakesNoMoreCalls) {
  if (!uring_works()) GTEST_SKIP() << "io_uring is refused here";
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  TempFolder folder;
  write_text(folder / "data", content());
  auto read_without_a_ring = [&folder] {
    auto engine = make_read_engine({.backend = ReadBackend::io_uring});
    const int other = ::open("/dev/null", O_RDONLY);
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code ignored;
      const auto target = std::filesystem::read_symlink(entry.path(), ignored).string();
      if (target.find("io_uring") != std::string::npos) {
        ::dup2(other, std::stoi(entry.path().filename()));
      }
    }
    AlignedBuffer buffer(kBlock);
    engine->wait(engine->submit({{File::open(folder / "data"), 0, kBlock, 0, buffer.data()}}));
  };
  EXPECT_DEATH(read_without_a_ring(), "io_uring_enter failed");
}

TEST(ReadEngineChoice, VariableOverridesAutomaticOnly) {
  const char* before = std::getenv("FERRY_READ_BACKEND");
  std::string saved = before == nullptr ? "" : before;
  ::setenv("FERRY_READ_BACKEND", "pread", 1);
  auto engine = make_read_engine();
  EXPECT_EQ(engine->backend(), ReadBackend::pread);
  EXPECT_THAT(engine->reason(), HasSubstr("requested"));
  if (uring_works()) {
    EXPECT_EQ(make_read_engine({.backend = ReadBackend::io_uring})->backend(),
              ReadBackend::io_uring);
  }
  ::setenv("FERRY_READ_BACKEND", "floppy", 1);
  EXPECT_THROW(make_read_engine(), ArgumentError);
  if (before == nullptr) {
    ::unsetenv("FERRY_READ_BACKEND");
  } else {
    ::setenv("FERRY_READ_BACKEND", saved.c_str(), 1);
  }
}

}  // namespace
}  // namespace ferry::io
