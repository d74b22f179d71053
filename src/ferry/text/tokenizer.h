// Tokenizers: text to the ids that a text encoder takes, as transformers' tokenizers give them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ferry::text {

enum class Padding { none, longest, max_length };

// The arguments of a transformers tokenizer's __call__.
struct EncodeOptions {
  // In tokens, special ones included. Unset: model_max_length.
  std::optional<int64_t> max_length = std::nullopt;
  // To the longest of the batch, or to max_length.
  Padding padding = Padding::none;
  // Cut what is longer than max_length; special tokens are kept.
  bool truncation = false;
  bool add_special_tokens = true;
};

struct Encoding {
  std::vector<int64_t> ids;
  std::vector<int64_t> attention_mask;  // 0 where padded, as long as ids
};

// Special tokens that have a name, as written in the text; nothing where the tokenizer has none.
struct SpecialTokens {
  std::optional<std::string> bos, eos, unk, sep, pad, cls, mask;
};

struct SentencePieceModel;
struct TokenizerBackend;

// Immutable and thread-safe. Encodes 100,000 characters in well under a second: no stage is
// quadratic, none recurses over the text.
class Tokenizer {
 public:
  // What transformers reports for a tokenizer whose folder does not state its longest input.
  static constexpr int64_t kNoMaxLength = INT64_MAX;

  // Reads a tokenizer's folder as transformers 5 does: `tokenizer_config.json`,
  // `special_tokens_map.json` and `added_tokens.json` where they are, and then
  // - CLIPTokenizer: vocab.json + merges.txt, or the vocabulary of tokenizer.json;
  // - T5Tokenizer: spiece.model, or the vocabulary of tokenizer.json;
  // - any other class: tokenizer.json as it stands.
  // `class_name` (from model_index.json; "...Fast" is the same) overrules the folder's
  // "tokenizer_class"; with neither, the files present decide. Throws IoError for a missing file,
  // FormatError for a bad one.
  static std::shared_ptr<const Tokenizer> from_pretrained(const std::filesystem::path& dir,
                                                          std::string_view class_name = {});
  // T5's tokenizer of pieces that another file holds (a GGUF file's tokenizer.ggml), with the
  // sentinels <extra_id_N> among them or not. `where` names that file in errors. Throws
  // FormatError.
  static std::shared_ptr<const Tokenizer> from_sentencepiece(SentencePieceModel model,
                                                             const std::string& where);
  ~Tokenizer();

  // Throws ArgumentError for text that is not UTF-8, a max_length that the special tokens alone
  // exceed, or padding without a pad token.
  Encoding encode(std::string_view text, const EncodeOptions& options = {}) const;
  std::vector<Encoding> encode(std::span<const std::string> texts,
                               const EncodeOptions& options = {}) const;
  std::string decode(std::span<const int64_t> ids, bool skip_special_tokens = false) const;

  // The class that transformers would use: "CLIPTokenizer", "T5Tokenizer", ….
  const std::string& class_name() const { return class_name_; }
  int64_t model_max_length() const { return model_max_length_; }
  // Tokens, added ones included: one more than the highest id.
  int64_t size() const;
  const SpecialTokens& special_tokens() const { return special_tokens_; }
  std::optional<int64_t> token_to_id(std::string_view token) const;
  std::optional<std::string> id_to_token(int64_t id) const;
  // The id of a named special token, e.g. id_of(special_tokens().pad).
  std::optional<int64_t> id_of(const std::optional<std::string>& token) const;

  // Copies the files that this tokenizer was read from into `dir`. Throws IoError, and
  // ArgumentError for one that was made from another file's pieces.
  void save_pretrained(const std::filesystem::path& dir) const;

 private:
  friend class TokenizerLoader;
  Tokenizer();
  void pad(std::vector<Encoding>& batch, const EncodeOptions& options) const;

  std::unique_ptr<TokenizerBackend> backend_;
  std::string class_name_;
  std::filesystem::path dir_;
  SpecialTokens special_tokens_;
  int64_t model_max_length_ = kNoMaxLength;
  bool pad_left_ = false;
  bool truncate_left_ = false;
  bool split_special_tokens_ = false;
  bool clean_up_tokenization_spaces_ = false;
};

}  // namespace ferry::text
