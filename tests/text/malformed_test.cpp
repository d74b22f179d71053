// Every broken file is a FormatError that names the file and the key.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/text/tokenize_file.h"
#include "ferry/text/tokenizer.h"
#include "folder.h"

namespace ferry::text {
namespace {

using nlohmann::json;
using testing::HasSubstr;

template <class E>
void expect_failure(const Folder& folder, const std::vector<std::string>& parts) {
  try {
    Tokenizer::from_pretrained(folder.path());
    FAIL() << "loads, though it should name " << parts.back();
  } catch (const E& e) {
    for (const std::string& part : parts) EXPECT_THAT(e.what(), HasSubstr(part));
  }
}

struct Case {
  const char* pointer;  // of the value that is replaced
  const char* value;    // "": removed
  const char* key;      // that the message has to name
};

json small_tokenizer() {
  return json::parse(
      R"({"version": "1.0", "added_tokens": [{"id": 0, "content": "<s>", "special": true,
      "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "a+"},
      "content": "b"}, {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="},
      {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
      "lowercase": true}, {"type": "Strip", "strip_left": true, "strip_right": true}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"String": " "},
      "behavior": "Removed", "invert": false}, {"type": "Metaspace", "replacement": "▁",
      "prepend_scheme": "always", "split": true}, {"type": "FixedLength", "length": 3},
      {"type": "ByteLevel", "add_prefix_space": true, "use_regex": true}]},
    "post_processor": {"type": "Sequence", "processors": [{"type": "RobertaProcessing", "sep": ["<s>", 0],
      "cls": ["<s>", 0]}, {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>",
      "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {"<s>": {"id":
      "<s>", "ids": [0], "tokens": ["<s>"]}}}]},
    "decoder": {"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0},
      {"type": "WordPiece", "prefix": "##", "cleanup": true}]},
    "padding": {"direction": "Right", "pad_token": "<s>"}, "truncation": {"direction": "Left"},
    "model": {"type": "BPE", "dropout": null, "unk_token": "<s>", "fuse_unk": true, "vocab": {"<s>": 0,
      "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]}})");
}

TEST(Malformed, TheSmallTokenizerItselfIsFine) {
  Folder folder;
  folder.write("tokenizer.json", small_tokenizer().dump());
  EXPECT_NO_THROW(Tokenizer::from_pretrained(folder.path()));
}

TEST(Malformed, EachKeyOfTokenizerJson) {
  const Case cases[] = {
      {"/version", R"("2.0")", "version"},
      {"/model", "", "model"},
      {"/model", "[]", "model"},
      {"/model/type", R"("Neural")", "model.type"},
      {"/model/vocab", "", "vocab"},
      {"/model/vocab", "[1]", "model.vocab"},
      {"/model/vocab/a", "-1", "model.vocab.a"},
      {"/model/vocab/a", "1.5", "model.vocab.a"},
      {"/model/vocab/a", "4294967296", "model.vocab.a"},
      {"/model/merges", "", "merges"},
      {"/model/merges", "{}", "model.merges"},
      {"/model/merges/0", R"("ab")", "model.merges"},
      {"/model/merges/0", R"("a b c")", "model.merges"},
      {"/model/merges/0", R"(["a", "x"])", "'x' is not in the vocabulary"},
      {"/model/merges/0", R"(["b", "a"])", "'ba' is not in the vocabulary"},
      {"/model/dropout", "0.1", "model.dropout"},
      {"/model/fuse_unk", "1", "model.fuse_unk"},
      {"/model/unk_token", "7", "model.unk_token"},
      {"/added_tokens", "{}", "added_tokens"},
      {"/added_tokens/0/content", "", "content"},
      {"/added_tokens/0/special", R"("yes")", "added_tokens.0.special"},
      {"/added_tokens/0/id", "-5", "added_tokens.0.id"},
      {"/normalizer/type", R"("Rot13")", "normalizer.type: 'Rot13'"},
      {"/normalizer/type", "", "type"},
      {"/normalizer/normalizers", "{}", "normalizer.normalizers"},
      {"/normalizer/normalizers/0/pattern", "{}", "normalizer.normalizers.0.pattern"},
      {"/normalizer/normalizers/0/pattern/Regex", R"("(")", "normalizer.normalizers.0.pattern"},
      {"/normalizer/normalizers/0/content", "", "content"},
      {"/normalizer/normalizers/1/precompiled_charsmap", R"("*")", "precompiled_charsmap"},
      {"/normalizer/normalizers/1/precompiled_charsmap", R"("AAA=")", "precompiled_charsmap"},
      {"/normalizer/normalizers/1/precompiled_charsmap", R"("/////wAAAAA=")",
       "precompiled_charsmap"},
      {"/normalizer/normalizers/2/clean_text", "", "clean_text"},
      {"/normalizer/normalizers/3/strip_left", "null", "strip_left"},
      {"/pre_tokenizer/type", R"("Oracle")", "pre_tokenizer.type: 'Oracle'"},
      {"/pre_tokenizer/pretokenizers/0/pattern/String", R"("")", "pretokenizers.0.pattern"},
      {"/pre_tokenizer/pretokenizers/0/behavior", R"("Eaten")", "pretokenizers.0.behavior"},
      {"/pre_tokenizer/pretokenizers/0/invert", "", "invert"},
      {"/pre_tokenizer/pretokenizers/1/replacement", R"("ab")", "pretokenizers.1.replacement"},
      {"/pre_tokenizer/pretokenizers/1/replacement", R"("")", "pretokenizers.1.replacement"},
      {"/pre_tokenizer/pretokenizers/1/prepend_scheme", R"("last")", "prepend_scheme"},
      {"/pre_tokenizer/pretokenizers/2/length", "0", "pretokenizers.2.length"},
      {"/pre_tokenizer/pretokenizers/3/add_prefix_space", "", "add_prefix_space"},
      {"/post_processor/type", R"("Wrap")", "post_processor.type: 'Wrap'"},
      {"/post_processor/processors/0/sep", R"(["<s>"])", "processors.0.sep"},
      {"/post_processor/processors/0/cls", R"(["<s>", -1])", "processors.0.cls"},
      {"/post_processor/processors/1/special_tokens/<s>", "", "'<s>' is missing"},
      {"/post_processor/processors/1/single/1/Sequence/id", R"("B")", "processors.1.single.1"},
      {"/post_processor/processors/1/single/0", "{}", "processors.1.single.0"},
      {"/decoder/type", R"("CTC")", "decoder.type: 'CTC'"},
      {"/decoder/decoders/0/start", "-1", "decoders.0.start"},
      {"/decoder/decoders/1/prefix", "", "prefix"},
      {"/padding/direction", R"("Up")", "padding.direction"},
      {"/truncation/direction", "3", "truncation.direction"},
  };
  for (const Case& one : cases) {
    SCOPED_TRACE(std::string(one.pointer) + " = " + one.value);
    json broken = small_tokenizer();
    const json::json_pointer pointer(one.pointer);
    if (std::string_view(one.value).empty()) {
      broken[pointer.parent_pointer()].erase(pointer.back());
    } else {
      broken[pointer] = json::parse(one.value);
    }
    Folder folder;
    folder.write("tokenizer.json", broken.dump());
    expect_failure<FormatError>(folder, {"tokenizer.json", one.key});
  }
}

TEST(Malformed, OtherModels) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"type": "Unigram", "vocab": {}})", "model.vocab"},
      {R"({"type": "Unigram", "vocab": [["a"]]})", "model.vocab: entry 0"},
      {R"({"type": "Unigram", "vocab": [["a", "1"]]})", "model.vocab: entry 0"},
      {R"({"type": "Unigram", "vocab": [["a", 1]], "unk_id": 1})", "model: unk_id is 1"},
      {R"({"type": "Unigram", "vocab": [["a", 1]], "unk_id": -1})", "model.unk_id"},
      {R"({"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"})",
       "continuing_subword_prefix"},
      {R"({"type": "WordLevel", "vocab": {"a": 0}})", "unk_token"},
  };
  for (const auto& [model, key] : cases) {
    Folder folder;
    folder.write("tokenizer.json", R"({"model": )" + std::string(model) + "}");
    expect_failure<FormatError>(folder, {"tokenizer.json", key});
  }
}

TEST(Malformed, NoJsonOrTooDeep) {
  for (const char* text : {"", "{", "nul", "{\"model\": \"\\ud800\"}", "\xff", "[] []"}) {
    Folder folder;
    folder.write("tokenizer.json", text);
    expect_failure<FormatError>(folder, {"tokenizer.json"});
  }
  Folder folder;
  folder.write("tokenizer.json", std::string(100000, '['));
  expect_failure<FormatError>(folder, {"tokenizer.json", "deeper"});
}

TEST(Malformed, ConfigFiles) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"tokenizer_class": 3})", "tokenizer_class"},
      {R"({"padding_side": "up"})", "padding_side"},
      {R"({"model_max_length": "77"})", "model_max_length"},
      {R"({"model_max_length": -1})", "model_max_length"},
      {R"({"added_tokens_decoder": {"x": {"content": "a"}}})", "added_tokens_decoder"},
      {R"({"added_tokens_decoder": {"1": {}}})", "added_tokens_decoder.1"},
      {R"({"bos_token": {"text": "a"}})", "bos_token"},
      {R"({"extra_special_tokens": [1]})", "extra_special_tokens.0"},
      {R"({"split_special_tokens": "no"})", "split_special_tokens"},
      {"[]", "tokenizer_config.json"},
  };
  for (const auto& [config, key] : cases) {
    SCOPED_TRACE(config);
    Folder folder("clip-files");
    folder.remove("special_tokens_map.json").write("tokenizer_config.json", config);
    expect_failure<FormatError>(folder, {"tokenizer_config.json", key});
  }
  Folder added("clip-files");
  added.write("added_tokens.json", R"({"<x>": "y"})");
  expect_failure<FormatError>(added, {"added_tokens.json", "<x>"});
}

TEST(Malformed, VocabAndMerges) {
  Folder vocab("clip-files");
  vocab.write("vocab.json", R"({"a": "b"})");
  expect_failure<FormatError>(vocab, {"vocab.json", "a"});
  Folder line("clip-files");
  line.write("merges.txt", "#version: 0.2\na b\nabc\n");
  expect_failure<FormatError>(line, {"merges.txt", "line 3"});
  Folder unknown("clip-files");
  unknown.write("merges.txt", "#version: 0.2\na 日\n");
  expect_failure<FormatError>(unknown, {"merges.txt", "merge 0", "日"});
  Folder missing("clip-files");
  missing.remove("merges.txt");
  expect_failure<IoError>(missing, {"merges.txt"});
}

TEST(Malformed, Folders) {
  Folder empty;
  expect_failure<IoError>(empty, {empty.path().string(), "no tokenizer.json"});
  empty.write("tokenizer_config.json", R"({"tokenizer_class": "LlamaTokenizer"})");
  expect_failure<IoError>(empty, {"LlamaTokenizer"});
  EXPECT_THROW(Tokenizer::from_pretrained(empty.path() / "nothing"), IoError);
}

TEST(Malformed, LinesOfAFileOfTexts) {
  Folder folder("clip-files");
  folder.write("in.jsonl", "\"a\"\n{\"b\": 1}\n");
  try {
    tokenize_file(folder.path(), folder.path() / "in.jsonl", folder.path() / "out.jsonl");
    FAIL();
  } catch (const FormatError& e) {
    EXPECT_THAT(e.what(), HasSubstr("in.jsonl: line 2"));
  }
  EXPECT_FALSE(std::filesystem::exists(folder.path() / "out.jsonl"));
}

}  // namespace
}  // namespace ferry::text
