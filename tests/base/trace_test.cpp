#include "ferry/base/trace.h"

#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

namespace ferry {
namespace {

using nlohmann::json;

std::vector<json> events_of(const Trace& trace, const std::string& phase) {
  std::vector<json> out;
  json parsed = json::parse(trace.to_json());
  for (const json& event : parsed["traceEvents"]) {
    if (event["ph"] == phase) out.push_back(event);
  }
  return out;
}

TEST(Trace, EmptyIsValid) {
  Trace trace;
  EXPECT_TRUE(json::parse(trace.to_json())["traceEvents"].is_array());
}

TEST(Trace, CompleteEventHasTimesTrackAndArgs) {
  Trace trace;
  auto begin = Trace::Clock::now();
  trace.complete("io", "read", begin, begin + std::chrono::microseconds(1500), "reads",
                 {{"bytes", "1024"}});
  std::vector<json> events = events_of(trace, "X");
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0]["cat"], "io");
  EXPECT_EQ(events[0]["name"], "read");
  EXPECT_DOUBLE_EQ(events[0]["dur"].get<double>(), 1500.0);
  EXPECT_GE(events[0]["ts"].get<double>(), 0);
  EXPECT_EQ(events[0]["args"]["bytes"], "1024");
  std::map<int, std::string> names;
  for (const json& meta : events_of(trace, "M")) {
    if (meta["name"] == "thread_name") names[meta["tid"]] = meta["args"]["name"];
  }
  EXPECT_EQ(names.at(events[0]["tid"]), "reads");
}

TEST(Trace, AnyBytesGiveValidJson) {
  Trace trace;
  std::string all;
  for (int i = 0; i < 256; ++i) all += static_cast<char>(i);
  const std::string texts[] = {all,
                               "gr\xc3\xb6\xc3\x9f"
                               "e",
                               "\xf0\x9f\x8e\xa8",
                               "\xed\xa0\x80",
                               "\xc0\xaf",
                               "cut \xe2\x82",
                               "\"\\\n"};
  for (const std::string& text : texts) {
    trace.complete(text, text, Trace::Clock::now(), Trace::Clock::now(), text, {{text, text}});
  }
  trace.counter("nan", std::numeric_limits<double>::quiet_NaN());
  std::vector<json> events = events_of(trace, "X");
  ASSERT_EQ(events.size(), std::size(texts));
  EXPECT_EQ(events[1]["name"], texts[1]);
  EXPECT_EQ(events[2]["name"], texts[2]);
  EXPECT_EQ(events[6]["name"], texts[6]);
}

TEST(Trace, SpanAndNullTrace) {
  Trace trace;
  {
    TraceSpan span(&trace, "compute", "block 3", "compute");
    span.arg("rows", "256");
    TraceSpan none(nullptr, "compute", "nothing");
    none.arg("rows", "256");
  }
  std::vector<json> events = events_of(trace, "X");
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0]["args"]["rows"], "256");
}

TEST(Trace, ThreadsGetTracksOfTheirOwn) {
  Trace trace;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&trace] {
      for (int i = 0; i < 100; ++i) TraceSpan span(&trace, "c", "n");
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::map<int, int> counts;
  for (const json& event : events_of(trace, "X")) ++counts[event["tid"].get<int>()];
  EXPECT_EQ(counts.size(), 4u);
  for (const auto& [track, count] : counts) EXPECT_EQ(count, 100);
}

TEST(Trace, CountsWhatItDrops) {
  Trace trace(2);
  for (int i = 0; i < 5; ++i) trace.instant("c", "n");
  EXPECT_EQ(trace.size(), 2u);
  EXPECT_EQ(json::parse(trace.to_json())["otherData"]["dropped_events"], "3");
}

}  // namespace
}  // namespace ferry
