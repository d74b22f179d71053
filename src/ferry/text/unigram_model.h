// The unigram language model of sentencepiece: the split of a text with the best sum of scores.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ferry/text/token_model.h"

namespace ferry::text {

using ScoredTokens = std::vector<std::pair<std::string, double>>;

// The [["token", score], ...] of a tokenizer.json. Throws FormatError.
ScoredTokens scored_tokens_from_json(const JsonView& json);

// Time is linear in the length of a piece (times the longest token).
class UnigramModel final : public TokenModel {
 public:
  // A token's id is its position. `unk_id`: the token of what no other token covers. Throws
  // FormatError if it is outside the vocabulary or a token is not valid UTF-8.
  UnigramModel(ScoredTokens tokens, std::optional<uint32_t> unk_id, bool byte_fallback);
  static std::shared_ptr<const UnigramModel> from_json(const JsonView& json);

  void tokenize(std::string_view piece, std::vector<uint32_t>& ids) const override;
  std::optional<uint32_t> id(std::string_view token) const override {
    return vocabulary_.id(token);
  }
  const std::string* token(uint32_t id) const override;
  size_t vocabulary_size() const override { return tokens_.size(); }

 private:
  // A byte trie in arrays; the edges of a node are sorted and adjacent.
  struct Node {
    uint32_t first_edge = 0;
    uint16_t edge_count = 0;
    int32_t token = -1;
  };
  struct Edge {
    uint8_t label;
    uint32_t node;
  };
  void build_trie();
  // The node behind `node` along `label`, or -1.
  int64_t child(uint32_t node, uint8_t label) const;
  uint32_t unk_id() const;
  void append_unknown(std::string_view text, std::vector<uint32_t>& ids) const;

  ScoredTokens tokens_;
  Vocabulary vocabulary_;
  std::vector<Node> nodes_;
  std::vector<Edge> edges_;
  std::optional<uint32_t> unk_id_;
  bool byte_fallback_;
  double unk_score_ = 0;
};

}  // namespace ferry::text
