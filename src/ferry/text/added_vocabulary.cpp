#include "ferry/text/added_vocabulary.h"

#include <algorithm>
#include <utility>

#include "ferry/base/error.h"

namespace ferry::text {

AddedToken AddedToken::make_special(std::string content) {
  AddedToken token;
  token.content = std::move(content);
  token.normalized = false;
  token.special = true;
  return token;
}

AddedToken AddedToken::from_json(const JsonView& json) {
  AddedToken token;
  token.content = json.at("content").string();
  token.single_word = json.boolean_or("single_word", false);
  token.lstrip = json.boolean_or("lstrip", false);
  token.rstrip = json.boolean_or("rstrip", false);
  token.special = json.boolean_or("special", false);
  token.normalized = json.boolean_or("normalized", !token.special);
  return token;
}

void AddedVocabulary::Matcher::add(std::string_view content, uint32_t id) {
  uint32_t node = 0;
  for (const char byte : content) {
    const auto [child, inserted] = nodes[node].children.emplace(
        static_cast<uint8_t>(byte), static_cast<uint32_t>(nodes.size()));
    node = child->second;
    if (inserted) nodes.emplace_back();
  }
  if (node != 0) nodes[node].id = id;
}

size_t AddedVocabulary::Matcher::longest(std::string_view text, size_t begin, uint32_t& id) const {
  size_t end = begin;
  uint32_t node = 0;
  for (size_t at = begin; at < text.size(); ++at) {
    const auto child = nodes[node].children.find(static_cast<uint8_t>(text[at]));
    if (child == nodes[node].children.end()) break;
    node = child->second;
    if (nodes[node].id < 0) continue;
    id = static_cast<uint32_t>(nodes[node].id);
    end = at + 1;
  }
  return end;
}

void AddedVocabulary::add(std::span<const AddedToken> tokens, const TokenModel& model,
                          const Normalizer* normalizer) {
  for (const AddedToken& token : tokens) add_one(token, model, normalizer);
  rebuild_matchers();
}

void AddedVocabulary::add_one(const AddedToken& token, const TokenModel& model,
                              const Normalizer* normalizer) {
  if (token.content.empty()) return;
  if (const auto known = id(token.content); known && tokens_.at(*known) == token) return;
  auto new_id = id(token.content);
  if (!new_id) new_id = model.id(token.content);
  if (!new_id) {
    new_id = static_cast<uint32_t>(model.vocabulary_size());
    if (!tokens_.empty()) new_id = std::max(*new_id, tokens_.rbegin()->first + 1);
  }
  normalized_contents_.erase(*new_id);
  if (token.normalized && normalizer != nullptr) {
    Piece content(token.content);
    normalizer->normalize(content);
    if (content.text() != token.content) normalized_contents_[*new_id] = content.text();
  }
  ids_[token.content] = *new_id;
  tokens_[*new_id] = token;
}

void AddedVocabulary::rebuild_matchers() {
  raw_matcher_ = {};
  normalized_matcher_ = {};
  for (const auto& [id, token] : tokens_) {
    const auto normalized = normalized_contents_.find(id);
    (token.normalized ? normalized_matcher_ : raw_matcher_)
        .add(normalized == normalized_contents_.end() ? token.content : normalized->second, id);
  }
}

std::optional<uint32_t> AddedVocabulary::id(std::string_view content) const {
  const auto found = ids_.find(content);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

const std::string* AddedVocabulary::decoded(uint32_t id) const {
  const auto normalized = normalized_contents_.find(id);
  if (normalized != normalized_contents_.end()) return &normalized->second;
  const auto found = tokens_.find(id);
  return found == tokens_.end() ? nullptr : &found->second.content;
}

bool AddedVocabulary::is_special(std::string_view content) const {
  const auto known = id(content);
  return known && tokens_.at(*known).special;
}

std::vector<Piece> AddedVocabulary::cut(const Piece& piece, const Matcher& matcher,
                                        bool split_special) const {
  if (piece.empty()) return {};
  const std::string& text = piece.text();
  std::vector<Piece> out;
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    uint32_t id = 0;
    const size_t match_end = matcher.longest(text, at, id);
    if (match_end == at) {
      ++at;
      continue;
    }
    size_t begin = std::exchange(at, match_end);
    size_t end = match_end;
    const AddedToken& token = tokens_.at(id);
    if (split_special && token.special) continue;
    if (token.single_word) {
      size_t before = begin;
      size_t after = end;
      if ((begin > 0 && is_word(previous_code_point(text, before))) ||
          (end < text.size() && is_word(next_code_point(text, after)))) {
        continue;
      }
    }
    if (token.lstrip) {
      for (size_t to = begin; to > done && is_whitespace(previous_code_point(text, to));)
        begin = to;
    }
    if (token.rstrip) {
      for (size_t to = end; to < text.size() && is_whitespace(next_code_point(text, to));) end = to;
    }
    begin = std::max(begin, done);
    end = std::max(begin, end);
    if (done < begin) out.push_back(piece.slice(done, begin));
    out.push_back(piece.slice(begin, end));
    out.back().added_token = id;
    done = end;
  }
  if (done < text.size()) out.push_back(piece.slice(done, text.size()));
  return out;
}

std::vector<Piece> AddedVocabulary::extract(std::string_view text, const Normalizer* normalizer,
                                            bool split_special) const {
  std::vector<Piece> out;
  for (Piece& piece : cut(Piece(std::string(text)), raw_matcher_, split_special)) {
    if (piece.added_token >= 0) {
      out.push_back(std::move(piece));
      continue;
    }
    if (normalizer != nullptr) normalizer->normalize(piece);
    for (Piece& part : cut(piece, normalized_matcher_, split_special)) {
      out.push_back(std::move(part));
    }
  }
  return out;
}

}  // namespace ferry::text
