// WordPiece (BERT) and WordLevel (whole words).
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/text/token_model.h"

namespace ferry::text {

class WordPieceModel final : public TokenModel {
 public:
  struct Options {
    std::string unk_token;
    // Nothing: WordLevel, which does not split words.
    std::optional<std::string> continuing_subword_prefix;
    size_t max_input_chars_per_word = 100;
  };
  WordPieceModel(Vocabulary vocabulary, Options options);
  // `type`: "WordPiece" or "WordLevel".
  static std::shared_ptr<const WordPieceModel> from_json(const JsonView& json,
                                                         std::string_view type);

  void tokenize(std::string_view piece, std::vector<uint32_t>& ids) const override;
  std::optional<uint32_t> id(std::string_view token) const override {
    return vocabulary_.id(token);
  }
  const std::string* token(uint32_t id) const override { return vocabulary_.token(id); }
  size_t vocabulary_size() const override { return vocabulary_.size(); }

 private:
  // Appends the parts of a word, each the longest that fits; false if some part is unknown.
  bool split(std::string_view word, std::vector<uint32_t>& ids) const;

  Vocabulary vocabulary_;
  Options options_;
};

}  // namespace ferry::text
