// Byte-pair encoding.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ferry/text/token_model.h"

namespace ferry::text {

struct BpeOptions {
  std::optional<std::string> unk_token;
  std::string continuing_subword_prefix;
  std::string end_of_word_suffix;
  bool fuse_unk = false;
  bool byte_fallback = false;
  // A piece that is a token itself is not merged from its characters.
  bool ignore_merges = false;
};

// Merges with a priority queue: n log n in the length of a piece.
class BpeModel final : public TokenModel {
 public:
  using Merges = std::vector<std::pair<std::string, std::string>>;

  // Throws FormatError if a merge or its result is not in the vocabulary.
  BpeModel(Vocabulary vocabulary, const Merges& merges, BpeOptions options);
  static std::shared_ptr<const BpeModel> from_json(const JsonView& json);

  void tokenize(std::string_view piece, std::vector<uint32_t>& ids) const override;
  std::optional<uint32_t> id(std::string_view token) const override {
    return vocabulary_.id(token);
  }
  const std::string* token(uint32_t id) const override { return vocabulary_.token(id); }
  size_t vocabulary_size() const override { return vocabulary_.size(); }
  std::string_view end_of_word_suffix() const override { return options_.end_of_word_suffix; }
  bool allows_clean_up() const override { return false; }

 private:
  struct Merge {
    uint32_t rank;
    uint32_t id;
  };
  struct Symbol {
    uint32_t id;
    int32_t previous;
    int32_t next;
    bool alive;
  };
  const Merge* find_merge(uint32_t left, uint32_t right) const;
  std::vector<Symbol> characters(std::string_view piece) const;
  void merge_all(std::vector<Symbol>& symbols) const;
  uint32_t unk_id() const;

  Vocabulary vocabulary_;
  std::unordered_map<uint64_t, Merge> merges_;
  BpeOptions options_;
};

// The merges of a tokenizer.json: ["a b", ...] or [["a", "b"], ...].
BpeModel::Merges merges_from_json(const JsonView& json);
// The lines of a merges.txt. `name` stands for the file in messages.
BpeModel::Merges merges_from_text(std::string_view text, std::string_view name);

}  // namespace ferry::text
