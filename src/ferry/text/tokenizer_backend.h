// The stages of a tokenizer, put together: what Hugging Face's `tokenizers.Tokenizer` is.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/text/added_vocabulary.h"
#include "ferry/text/decoder.h"
#include "ferry/text/json_view.h"
#include "ferry/text/normalizer.h"
#include "ferry/text/post_processor.h"
#include "ferry/text/pre_tokenizer.h"
#include "ferry/text/token_model.h"

namespace ferry::text {

// A plain aggregate: built by from_json, make_clip_backend or make_t5_backend, then only read,
// which several threads may do. Normalizer, pre-tokenizer and decoder may be null.
struct TokenizerBackend {
  std::shared_ptr<const Normalizer> normalizer;
  std::shared_ptr<const PreTokenizer> pre_tokenizer;
  std::shared_ptr<const TokenModel> model;
  std::shared_ptr<const Decoder> decoder;
  PostProcessor post_processor;
  AddedVocabulary added;
  // What the file's "padding" and "truncation" say; defaults for the tokenizer's options.
  std::optional<std::string> pad_token;
  std::string padding_side = "right";
  std::string truncation_side = "right";
  // Text that decode() turns into a blank; CLIP's end of word.
  std::string blank_in_decoded;

  // Reads a whole tokenizer.json. Throws FormatError, naming the key.
  static TokenizerBackend from_json(const JsonView& json);

  void add_tokens(std::span<const AddedToken> tokens);
  std::optional<uint32_t> id(std::string_view token) const;
  // The ids of a text, without what the post-processor adds. REQUIRES: valid UTF-8.
  std::vector<uint32_t> tokenize(std::string_view text, bool split_special_tokens) const;
  // Ids that have no token are skipped.
  std::string decode(const std::vector<uint32_t>& ids, bool skip_special_tokens) const;
};

}  // namespace ferry::text
