#include "ferry/base/stop_token.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <thread>

namespace ferry {
namespace {

TEST(StopToken, DefaultNeverStops) {
  StopToken token;
  EXPECT_FALSE(token.stop_requested());
  EXPECT_NO_THROW(token.throw_if_stopped());
}

TEST(StopToken, CopiesShareTheFlag) {
  StopSource source;
  StopSource copy = source;
  StopToken token = source.token();
  StopToken other = token;
  EXPECT_NO_THROW(other.throw_if_stopped());
  copy.request_stop();
  EXPECT_TRUE(source.stop_requested());
  EXPECT_TRUE(other.stop_requested());
  EXPECT_THROW(token.throw_if_stopped(), Cancelled);
}

TEST(StopToken, OutlivesItsSource) {
  StopToken token;
  {
    StopSource source;
    token = source.token();
    source.request_stop();
  }
  EXPECT_TRUE(token.stop_requested());
}

TEST(StopToken, StopsAnotherThread) {
  StopSource source;
  std::thread worker([token = source.token()] {
    while (!token.stop_requested()) std::this_thread::yield();
  });
  source.request_stop();
  worker.join();
}

StopSource* signal_source = nullptr;

TEST(StopToken, FromASignalHandler) {
  StopSource source;
  signal_source = &source;
  struct sigaction action {};
  struct sigaction before {};
  action.sa_handler = [](int) { signal_source->request_stop(); };
  ASSERT_EQ(sigaction(SIGUSR1, &action, &before), 0);
  raise(SIGUSR1);
  sigaction(SIGUSR1, &before, nullptr);
  EXPECT_TRUE(source.stop_requested());
}

}  // namespace
}  // namespace ferry
