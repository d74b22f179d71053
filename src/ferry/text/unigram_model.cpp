#include "ferry/text/unigram_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "ferry/base/error.h"
#include "ferry/text/pattern.h"
#include "ferry/text/unicode.h"

namespace ferry::text {
namespace {

// sentencepiece's kUnkPenalty: an unknown character costs this much more than the worst token.
constexpr double kUnkPenalty = 10.0;

}  // namespace

UnigramModel::UnigramModel(ScoredTokens tokens, std::optional<uint32_t> unk_id, bool byte_fallback)
    : tokens_(std::move(tokens)), unk_id_(unk_id), byte_fallback_(byte_fallback) {
  if (unk_id_ && *unk_id_ >= tokens_.size()) {
    throw_error<FormatError>("unk_id is {}, but the vocabulary has {} tokens", *unk_id_,
                             tokens_.size());
  }
  double worst = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const auto& [token, score] = tokens_[i];
    if (!std::isfinite(score)) {
      throw_error<FormatError>("token {}: the score is {}, expected a finite number", i, score);
    }
    try {
      check_utf8(token, fmt::format("token {}", i));
    } catch (const ArgumentError& e) {
      throw FormatError(e.what());
    }
    vocabulary_.add(token, static_cast<uint32_t>(i));
    worst = std::min(worst, score);
  }
  unk_score_ = worst - kUnkPenalty;
  build_trie();
}

ScoredTokens scored_tokens_from_json(const JsonView& json) {
  if (!json.is_array()) json.fail("expected a list of [token, score]");
  ScoredTokens tokens;
  tokens.reserve(json.raw().size());
  for (size_t i = 0; i < json.raw().size(); ++i) {
    const nlohmann::json& entry = json.raw()[i];
    if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() || !entry[1].is_number()) {
      json.fail(fmt::format("entry {} is not [token, score]", i));
    }
    tokens.emplace_back(entry[0].get<std::string>(), entry[1].get<double>());
  }
  return tokens;
}

std::shared_ptr<const UnigramModel> UnigramModel::from_json(const JsonView& json) {
  ScoredTokens tokens = scored_tokens_from_json(json.at("vocab"));
  std::optional<uint32_t> unk_id;
  if (const auto unk = json.find("unk_id")) unk_id = unk->id();
  try {
    return std::make_shared<UnigramModel>(std::move(tokens), unk_id,
                                          json.boolean_or("byte_fallback", false));
  } catch (const FormatError& e) {
    json.fail(e.what());
  }
}

void UnigramModel::build_trie() {
  // Sorted tokens are ranges of equal prefixes; each range is a node, made breadth first.
  std::vector<uint32_t> order(tokens_.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    const int compared = tokens_[a].first.compare(tokens_[b].first);
    return compared != 0 ? compared < 0 : a < b;
  });
  struct Range {
    uint32_t begin, end, node;
    size_t depth;
  };
  nodes_.push_back({});
  std::vector<Range> ranges{{0, static_cast<uint32_t>(order.size()), 0, 0}};
  for (size_t r = 0; r < ranges.size(); ++r) {
    auto [begin, end, node, depth] = ranges[r];
    // The token that ends here; the last of equal ones wins.
    for (; begin < end && tokens_[order[begin]].first.size() == depth; ++begin) {
      if (depth > 0) nodes_[node].token = static_cast<int32_t>(order[begin]);
    }
    nodes_[node].first_edge = static_cast<uint32_t>(edges_.size());
    while (begin < end) {
      const auto label = static_cast<uint8_t>(tokens_[order[begin]].first[depth]);
      uint32_t stop = begin;
      while (stop < end && static_cast<uint8_t>(tokens_[order[stop]].first[depth]) == label) ++stop;
      const auto next = static_cast<uint32_t>(nodes_.size());
      nodes_.push_back({});
      edges_.push_back({label, next});
      ++nodes_[node].edge_count;
      ranges.push_back({begin, stop, next, depth + 1});
      begin = stop;
    }
  }
}

int64_t UnigramModel::child(uint32_t node, uint8_t label) const {
  const auto first = edges_.begin() + nodes_[node].first_edge;
  const auto last = first + nodes_[node].edge_count;
  const auto found = std::lower_bound(
      first, last, label, [](const Edge& edge, uint8_t wanted) { return edge.label < wanted; });
  return found == last || found->label != label ? -1 : static_cast<int64_t>(found->node);
}

const std::string* UnigramModel::token(uint32_t id) const {
  return id < tokens_.size() ? &tokens_[id].first : nullptr;
}

uint32_t UnigramModel::unk_id() const {
  if (!unk_id_)
    throw_error<ArgumentError>("a character is unknown, and the tokenizer has no unk_id");
  return *unk_id_;
}

void UnigramModel::append_unknown(std::string_view text, std::vector<uint32_t>& ids) const {
  // A run of unknown characters may spell a token after all: the crate looks it up as text.
  if (const auto id = vocabulary_.id(text)) {
    ids.push_back(*id);
    return;
  }
  if (byte_fallback_) {
    std::vector<uint32_t> bytes;
    for (const char byte : text) {
      const auto id = vocabulary_.id(fmt::format("<0x{:02X}>", static_cast<uint8_t>(byte)));
      if (!id) break;
      bytes.push_back(*id);
    }
    if (bytes.size() == text.size()) {
      ids.insert(ids.end(), bytes.begin(), bytes.end());
      return;
    }
  }
  ids.push_back(unk_id());
}

void UnigramModel::tokenize(std::string_view piece, std::vector<uint32_t>& ids) const {
  struct Best {
    double score = 0;
    int64_t begin = -1;
    uint32_t token = 0;
  };
  std::vector<Best> best(piece.size() + 1);  // of the paths that end at each byte
  const auto offer = [&](size_t end, double score, size_t begin, uint32_t token) {
    if (best[end].begin >= 0 && !(score > best[end].score)) return;
    best[end] = {score, static_cast<int64_t>(begin), token};
  };
  for (size_t begin = 0, next = 0; begin < piece.size(); begin = next) {
    next_code_point(piece, next);
    const double so_far = best[begin].score;
    bool has_single = false;
    uint32_t node = 0;
    for (size_t at = begin; at < piece.size();) {
      const int64_t to = child(node, static_cast<uint8_t>(piece[at]));
      if (to < 0) break;
      node = static_cast<uint32_t>(to);
      ++at;
      if (nodes_[node].token < 0) continue;
      const auto token = static_cast<uint32_t>(nodes_[node].token);
      offer(at, tokens_[token].second + so_far, begin, token);
      has_single = has_single || at == next;
    }
    if (!has_single) offer(next, unk_score_ + so_far, begin, unk_id());
  }

  std::vector<std::pair<Span, uint32_t>> path;
  for (size_t end = piece.size(); end > 0;) {
    const Best& step = best[end];
    const auto begin = static_cast<size_t>(step.begin);
    const bool unknown = unk_id_ && step.token == *unk_id_;
    if (unknown && !path.empty() && path.back().first.matched && path.back().first.begin == end) {
      path.back().first.begin = begin;  // unknown characters side by side are one token
    } else {
      path.push_back({{begin, end, unknown}, step.token});
    }
    end = begin;
  }
  for (auto entry = path.rbegin(); entry != path.rend(); ++entry) {
    if (entry->first.matched) {
      append_unknown(piece.substr(entry->first.begin, entry->first.end - entry->first.begin), ids);
    } else {
      ids.push_back(entry->second);
    }
  }
}

}  // namespace ferry::text
