// The model of a tokenizer: pieces of text to ids.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ferry/text/json_view.h"

namespace ferry::text {

// Tokens and their ids; looks up string_views without copying. Several ids may share no token; if a
// token is given twice, the later id wins.
class Vocabulary {
 public:
  void add(std::string token, uint32_t id);
  std::optional<uint32_t> id(std::string_view token) const;
  // The token of an id, or nullptr.
  const std::string* token(uint32_t id) const;
  size_t size() const { return ids_.size(); }

  // A {"token": id} object. Throws FormatError.
  static Vocabulary from_json(const JsonView& json);

 private:
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };
  std::unordered_map<std::string, uint32_t, Hash, std::equal_to<>> ids_;
  std::unordered_map<uint32_t, const std::string*> tokens_;  // into ids_, whose nodes stay put
};

// Immutable and thread-safe. Ported from the models of the Rust crate `tokenizers` (0.23).
class TokenModel {
 public:
  virtual ~TokenModel() = default;
  // Appends the ids of one piece. Throws ArgumentError where the model has no token for it.
  virtual void tokenize(std::string_view piece, std::vector<uint32_t>& ids) const = 0;
  virtual std::optional<uint32_t> id(std::string_view token) const = 0;
  virtual const std::string* token(uint32_t id) const = 0;
  virtual size_t vocabulary_size() const = 0;
  // Removed from decoded text by CLIP's tokenizer; empty for other models.
  virtual std::string_view end_of_word_suffix() const { return {}; }
  // Whether decode() may tidy up blanks before punctuation; not for BPE.
  virtual bool allows_clean_up() const { return true; }

  // Reads a "model" section of tokenizer.json: BPE, Unigram, WordPiece or WordLevel. Throws
  // FormatError for another type.
  static std::shared_ptr<const TokenModel> from_json(const JsonView& json);
};

}  // namespace ferry::text
