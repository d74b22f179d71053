#include "ferry/pipelines/prompt_cache.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace ferry::pipelines {
namespace {

PromptKey key(const std::string& text, int64_t length = 8, const std::string& encoder = "t5") {
  return {.encoder = encoder, .texts = {text}, .max_length = length};
}

TEST(PromptCache, FindsWhatWasPutUnderAnEqualKey) {
  PromptCache cache;
  const at::Tensor output = at::randn({1, 8, 4});
  cache.put(key("a"), output);
  EXPECT_TRUE(at::equal(cache.find(key("a"), at::kCPU), output));
  EXPECT_FALSE(cache.find(key("b"), at::kCPU).defined());
  EXPECT_FALSE(cache.find(key("a", 9), at::kCPU).defined());
  EXPECT_FALSE(cache.find(key("a", 8, "clip"), at::kCPU).defined());
  PromptKey other = key("a");
  other.setting = "cpu threads 2";
  EXPECT_FALSE(cache.find(other, at::kCPU).defined());
}

TEST(PromptCache, KeepsCopies) {
  PromptCache cache;
  at::Tensor output = at::ones({4});
  cache.put(key("a"), output);
  output.zero_();
  cache.find(key("a"), at::kCPU).zero_();
  EXPECT_TRUE(at::equal(cache.find(key("a"), at::kCPU), at::ones({4})));
}

TEST(PromptCache, TheLeastRecentlyUsedGoesFirst) {
  PromptCache cache(3 * 16);
  for (const char* text : {"a", "b", "c"}) cache.put(key(text), at::ones({4}));
  EXPECT_TRUE(cache.find(key("a"), at::kCPU).defined());
  cache.put(key("d"), at::ones({4}));
  EXPECT_FALSE(cache.find(key("b"), at::kCPU).defined());
  for (const char* text : {"a", "c", "d"}) EXPECT_TRUE(cache.find(key(text), at::kCPU).defined());
  EXPECT_EQ(cache.size_bytes(), 48u);
  cache.put(key("large"), at::ones({13}));  // more than there is room for at all
  EXPECT_EQ(cache.size_bytes(), 48u);
  cache.put(key("d"), at::zeros({4}));  // replaces
  EXPECT_EQ(cache.size_bytes(), 48u);
  cache.set_limit(16);
  EXPECT_TRUE(at::equal(cache.find(key("d"), at::kCPU), at::zeros({4})));
  EXPECT_EQ(cache.size_bytes(), 16u);
}

}  // namespace
}  // namespace ferry::pipelines
