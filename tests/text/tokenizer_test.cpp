// Options, special tokens and the choice of files. Expected ids: transformers 5.23.
#include "ferry/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "ferry/base/error.h"
#include "folder.h"

namespace ferry::text {
namespace {

using Ids = std::vector<int64_t>;

std::shared_ptr<const Tokenizer> fixture(const std::string& name) {
  return Tokenizer::from_pretrained(FERRY_FIXTURES "/tokenizers/" + name);
}

const std::vector<std::string> kPrompts = {"a red circle",
                                           "a very large blue square on a white background"};
const Ids kLongClip = {912, 320, 85, 584, 344, 568, 560, 600, 634, 320, 599, 685, 913};

TEST(Tokenizer, KnowsItsSpecialTokens) {
  const auto clip = fixture("clip-files");
  EXPECT_EQ(clip->class_name(), "CLIPTokenizer");
  EXPECT_EQ(clip->model_max_length(), 77);
  EXPECT_EQ(clip->size(), 914);
  EXPECT_EQ(clip->special_tokens().bos, "<|startoftext|>");
  EXPECT_EQ(clip->id_of(clip->special_tokens().bos), 912);
  EXPECT_EQ(clip->id_of(clip->special_tokens().pad), 913);
  EXPECT_EQ(clip->id_of(clip->special_tokens().mask), std::nullopt);
  EXPECT_EQ(clip->id_to_token(913), "<|endoftext|>");
  EXPECT_EQ(clip->id_to_token(914), std::nullopt);
  EXPECT_EQ(clip->id_to_token(-1), std::nullopt);
  const auto t5 = fixture("t5-spiece");
  EXPECT_EQ(t5->class_name(), "T5Tokenizer");
  EXPECT_EQ(t5->model_max_length(), 512);
  EXPECT_EQ(t5->size(), 800);
  EXPECT_EQ(t5->token_to_id("<extra_id_0>"), 799);
  EXPECT_EQ(t5->special_tokens().bos, std::nullopt);
}

TEST(Tokenizer, PadsToTheLongest) {
  const auto batch = fixture("clip-files")->encode(kPrompts, {.padding = Padding::longest});
  EXPECT_EQ(batch[0].ids, (Ids{912, 320, 683, 677, 913, 913, 913, 913, 913, 913, 913, 913, 913}));
  EXPECT_EQ(batch[0].attention_mask, (Ids{1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(batch[1].ids, kLongClip);
  const auto t5 = fixture("t5-spiece")->encode(kPrompts, {.padding = Padding::longest});
  EXPECT_EQ(t5[0].ids, (Ids{44, 92, 65, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(t5[0].attention_mask, (Ids{1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
}

TEST(Tokenizer, PadsAndCutsToMaxLength) {
  const EncodeOptions options{.max_length = 12, .padding = Padding::max_length, .truncation = true};
  const auto batch = fixture("clip-files")->encode(kPrompts, options);
  EXPECT_EQ(batch[0].ids, (Ids{912, 320, 683, 677, 913, 913, 913, 913, 913, 913, 913, 913}));
  EXPECT_EQ(batch[1].ids, (Ids{912, 320, 85, 584, 344, 568, 560, 600, 634, 320, 599, 913}));
  const auto t5 = fixture("t5-spiece")->encode(kPrompts, options);
  EXPECT_EQ(t5[1].ids, (Ids{44, 5, 70, 698, 29, 52, 50, 43, 49, 44, 68, 1}));
}

TEST(Tokenizer, UsesModelMaxLengthByDefault) {
  const auto encoding =
      fixture("clip-files")
          ->encode(std::string(5000, '!'), {.padding = Padding::max_length, .truncation = true});
  EXPECT_EQ(encoding.ids.size(), 77u);
  EXPECT_EQ(encoding.ids.back(), 913);
}

TEST(Tokenizer, CutsOnlyWhenAsked) {
  const auto encoding = fixture("clip-files")->encode(kPrompts[1], {.max_length = 4});
  EXPECT_EQ(encoding.ids, kLongClip);
}

TEST(Tokenizer, LeavesOutSpecialTokens) {
  const EncodeOptions options{.add_special_tokens = false};
  EXPECT_EQ(fixture("clip-files")->encode(kPrompts[0], options).ids, (Ids{320, 683, 677}));
  EXPECT_EQ(fixture("t5-spiece")->encode(kPrompts[0], options).ids, (Ids{44, 92, 65}));
  EXPECT_TRUE(fixture("t5-spiece")->encode("", options).ids.empty());
}

TEST(Tokenizer, Decodes) {
  const auto clip = fixture("clip-files");
  const Ids ids = clip->encode("a large red circle!").ids;
  EXPECT_EQ(clip->decode(ids), "<|startoftext|>a large red circle ! <|endoftext|>");
  EXPECT_EQ(clip->decode(ids, true), "a large red circle !");
  EXPECT_EQ(clip->decode(clip->encode("<|startoftext|>Hi <|endoftext|>").ids, true), "hi");
  EXPECT_EQ(clip->decode(clip->encode("\x1e a \x1f").ids, true), "a");  // str.strip()
  const auto t5 = fixture("t5-spiece");
  EXPECT_EQ(t5->decode(t5->encode("a large red <extra_id_0> circle!").ids),
            "a large red<extra_id_0> circle!</s>");
  EXPECT_THROW(t5->decode(Ids{-1}), ArgumentError);
  EXPECT_EQ(t5->decode(Ids{1000000}), "");
}

// As published folders have it: objects with flags, a pad token that is an ordinary word, sides.
TEST(Tokenizer, TakesFlagsAndSidesFromTheConfig) {
  Folder folder("clip-files");
  folder.remove("special_tokens_map.json").write("tokenizer_config.json", R"({
      "tokenizer_class": "CLIPTokenizerFast", "model_max_length": 77, "pad_token": "!",
      "bos_token": {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": false,
                    "normalized": true, "rstrip": false, "single_word": false},
      "padding_side": "left", "truncation_side": "left"})");
  const auto tokenizer = Tokenizer::from_pretrained(folder.path());
  const std::vector<std::string> texts = {"Hi! <|STARTOFTEXT|> x <|ENDOFTEXT|>", "abc def ghi"};
  const auto batch = tokenizer->encode(texts, {.padding = Padding::longest});
  EXPECT_EQ(batch[0].ids, (Ids{912, 71, 328, 0, 912, 343, 800, 908, 804, 913}));
  EXPECT_EQ(batch[1].ids, (Ids{0, 912, 64, 65, 322, 729, 325, 534, 328, 913}));
  EXPECT_EQ(batch[1].attention_mask, (Ids{0, 1, 1, 1, 1, 1, 1, 1, 1, 1}));
  EXPECT_EQ(tokenizer->encode("abc def ghi jkl", {.max_length = 5, .truncation = true}).ids,
            (Ids{912, 73, 74, 331, 913}));
}

TEST(Tokenizer, AddsTheTokensOfAddedTokensJson) {
  Folder folder("clip-files");
  folder.write("added_tokens.json", R"({"<cat-toy>": 9999, "Dog": 10000})");
  const auto tokenizer = Tokenizer::from_pretrained(folder.path());
  EXPECT_EQ(tokenizer->size(), 916);
  EXPECT_EQ(tokenizer->encode("a <cat-toy>dog doG").ids, (Ids{912, 320, 914, 915, 915, 913}));
  EXPECT_EQ(tokenizer->encode("a <CAT-TOY>Dog").ids, (Ids{912, 320, 914, 915, 913}));
}

TEST(Tokenizer, SplitsSpecialTokensWhenTheConfigSaysSo) {
  Folder folder("clip-files");
  folder.write("tokenizer_config.json",
               R"({"tokenizer_class": "CLIPTokenizer", "split_special_tokens": true})");
  const auto tokenizer = Tokenizer::from_pretrained(folder.path());
  EXPECT_EQ(tokenizer->encode("a<|endoftext|>").ids, (Ids{912, 320, 800, 908, 804, 913}));
  EXPECT_EQ(tokenizer->model_max_length(), Tokenizer::kNoMaxLength);
}

TEST(Tokenizer, ChoosesByClassThenByFiles) {
  const std::string t5 = FERRY_FIXTURES "/tokenizers/t5-json";
  EXPECT_EQ(Tokenizer::from_pretrained(t5)->class_name(), "T5Tokenizer");
  EXPECT_EQ(Tokenizer::from_pretrained(t5, "T5TokenizerFast")->class_name(), "T5Tokenizer");
  EXPECT_EQ(Tokenizer::from_pretrained(t5, "Qwen2Tokenizer")->class_name(), "Qwen2Tokenizer");
  for (const auto& [name, expected] :
       {std::pair("clip-files", "CLIPTokenizer"), std::pair("t5-spiece", "T5Tokenizer")}) {
    Folder folder((std::string(name)));
    folder.remove("tokenizer_config.json").remove("special_tokens_map.json");
    EXPECT_EQ(Tokenizer::from_pretrained(folder.path())->class_name(), expected);
  }
}

TEST(Tokenizer, RefusesWhatCannotWork) {
  const auto clip = fixture("clip-files");
  EXPECT_THROW(clip->encode("a", {.max_length = 1, .truncation = true}), ArgumentError);
  EXPECT_THROW(clip->encode("a", {.max_length = -1}), ArgumentError);
  EXPECT_EQ(clip->encode("a b", {.max_length = 2, .truncation = true}).ids, (Ids{912, 913}));
  try {
    clip->encode("ab\xC3(");
    FAIL();
  } catch (const ArgumentError& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("byte 2"));
  }
  EXPECT_THROW(clip->encode("\xED\xA0\x80"), ArgumentError);  // a surrogate
  Folder folder;
  folder.write("tokenizer.json",
               R"({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "u"},
                                     "pre_tokenizer": {"type": "WhitespaceSplit"}})");
  const auto plain = Tokenizer::from_pretrained(folder.path());
  EXPECT_EQ(plain->encode("a a").ids, (Ids{0, 0}));
  EXPECT_THROW(plain->encode("b"), ArgumentError);  // the unknown token is unknown
  EXPECT_THROW(plain->encode("a", {.padding = Padding::longest}), ArgumentError);
  EXPECT_THROW(plain->encode("a", {.padding = Padding::max_length}), ArgumentError);
}

// No stage may be quadratic or recurse over the text; a quadratic one would take minutes.
TEST(Tokenizer, TakesVeryLongTexts) {
  std::vector<std::string> texts = {std::string(100000, 'a'), std::string(100000, ' '),
                                    std::string(100000, '!'), std::string(100000, '1')};
  for (const char* part : {"ab", "e\u0301", "\u0301", "日", "👩‍👩‍👧‍👦", "a b ",
                           "<|endoftext|>", "<extra_id_1> ", "\u2581", "'s"}) {
    std::string text;
    while (text.size() < 100000) text += part;
    texts.push_back(text);
  }
  const auto start = std::chrono::steady_clock::now();
  for (const char* name : {"clip-files", "t5-spiece", "t5-json-bytes"}) {
    const auto tokenizer = fixture(name);
    for (const std::string& text : texts) EXPECT_GE(tokenizer->encode(text).ids.size(), 1u);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

TEST(Tokenizer, MayBeSharedByThreads) {
  const auto tokenizer = fixture("clip-json");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 50; ++k) EXPECT_EQ(tokenizer->encode(kPrompts[1]).ids, kLongClip);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace ferry::text
