#include "ferry/text/bpe_model.h"

#include <queue>
#include <tuple>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/text/unicode.h"

namespace ferry::text {
namespace {

uint64_t pair_key(uint32_t left, uint32_t right) {
  return static_cast<uint64_t>(left) << 32 | right;
}

std::optional<std::pair<std::string, std::string>> split_merge(std::string_view line) {
  const size_t space = line.find(' ');
  if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos) {
    return std::nullopt;
  }
  return std::pair(std::string(line.substr(0, space)), std::string(line.substr(space + 1)));
}

}  // namespace

BpeModel::Merges merges_from_json(const JsonView& json) {
  if (!json.is_array()) json.fail("expected a list of merges");
  BpeModel::Merges merges;
  merges.reserve(json.raw().size());
  for (size_t i = 0; i < json.raw().size(); ++i) {
    const nlohmann::json& merge = json.raw()[i];
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
      continue;
    }
    if (merge.is_string()) {
      const auto& line = merge.get_ref<const std::string&>();
      if (line.starts_with("#version")) continue;
      if (auto pair = split_merge(line)) {
        merges.push_back(std::move(*pair));
        continue;
      }
    }
    json.fail(fmt::format("merge {} is not two tokens", i));
  }
  return merges;
}

BpeModel::Merges merges_from_text(std::string_view text, std::string_view name) {
  BpeModel::Merges merges;
  size_t number = 0;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    ++number;
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.starts_with("#version")) continue;
    auto pair = split_merge(line);
    if (!pair) {
      throw_error<FormatError>(
          "{}: line {}: got {} bytes, expected two tokens and one space between", name, number,
          line.size());
    }
    merges.push_back(std::move(*pair));
  }
  return merges;
}

BpeModel::BpeModel(Vocabulary vocabulary, const Merges& merges, BpeOptions options)
    : vocabulary_(std::move(vocabulary)), options_(std::move(options)) {
  const size_t prefix = options_.continuing_subword_prefix.size();
  const auto known = [&](std::string_view token, size_t rank) {
    const auto id = vocabulary_.id(token);
    if (!id) throw_error<FormatError>("merge {}: '{}' is not in the vocabulary", rank, token);
    return *id;
  };
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    const uint32_t left_id = known(left, rank);
    const uint32_t right_id = known(right, rank);
    if (right.size() < prefix) {
      throw_error<FormatError>("merge {}: '{}' lacks the prefix '{}'", rank, right,
                               options_.continuing_subword_prefix);
    }
    const uint32_t merged_id = known(left + right.substr(prefix), rank);
    merges_[pair_key(left_id, right_id)] = {static_cast<uint32_t>(rank), merged_id};
  }
}

std::shared_ptr<const BpeModel> BpeModel::from_json(const JsonView& json) {
  if (const auto dropout = json.find("dropout"); dropout && dropout->number() != 0) {
    dropout->fail("merges dropped at random are for training; ferry refuses them");
  }
  BpeOptions options;
  if (const auto unk = json.find("unk_token")) options.unk_token = unk->string();
  options.continuing_subword_prefix = json.string_or("continuing_subword_prefix", "");
  options.end_of_word_suffix = json.string_or("end_of_word_suffix", "");
  options.fuse_unk = json.boolean_or("fuse_unk", false);
  options.byte_fallback = json.boolean_or("byte_fallback", false);
  options.ignore_merges = json.boolean_or("ignore_merges", false);
  const JsonView merges = json.at("merges");
  try {
    return std::make_shared<BpeModel>(Vocabulary::from_json(json.at("vocab")),
                                      merges_from_json(merges), std::move(options));
  } catch (const FormatError& e) {
    if (std::string_view(e.what()).starts_with("merge ")) merges.fail(e.what());
    throw;
  }
}

const BpeModel::Merge* BpeModel::find_merge(uint32_t left, uint32_t right) const {
  const auto found = merges_.find(pair_key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

uint32_t BpeModel::unk_id() const {
  const auto id = vocabulary_.id(*options_.unk_token);
  if (!id) {
    throw_error<ArgumentError>("the tokenizer's unknown token '{}' is not in its vocabulary",
                               *options_.unk_token);
  }
  return *id;
}

std::vector<BpeModel::Symbol> BpeModel::characters(std::string_view piece) const {
  std::vector<Symbol> symbols;
  symbols.reserve(piece.size());
  const auto add = [&](uint32_t id) {
    const auto index = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, index - 1, index + 1, true});
  };
  bool unknown = false;  // one is pending, so that the next one can be fused with it
  const auto add_unknown = [&] {
    if (std::exchange(unknown, false)) add(unk_id());
  };
  std::string character;
  for (size_t at = 0; at < piece.size();) {
    const size_t begin = at;
    next_code_point(piece, at);
    const bool is_first = begin == 0;
    const bool is_last = at == piece.size();
    character = is_first ? "" : options_.continuing_subword_prefix;
    character.append(piece, begin, at - begin);
    if (is_last) character += options_.end_of_word_suffix;
    if (const auto id = vocabulary_.id(character)) {
      add_unknown();
      add(*id);
      continue;
    }
    if (options_.byte_fallback) {
      std::vector<uint32_t> bytes;
      for (const char byte : character) {
        const auto id = vocabulary_.id(fmt::format("<0x{:02X}>", static_cast<uint8_t>(byte)));
        if (!id) break;
        bytes.push_back(*id);
      }
      if (bytes.size() == character.size()) {
        for (const uint32_t id : bytes) add(id);
        continue;
      }
    }
    if (!options_.unk_token) continue;
    if (!options_.fuse_unk) add_unknown();
    unknown = true;
  }
  add_unknown();
  if (!symbols.empty()) symbols.back().next = -1;
  return symbols;
}

void BpeModel::merge_all(std::vector<Symbol>& symbols) const {
  // Lowest rank first, leftmost among equals; entries whose pair has changed since are skipped.
  using Entry = std::tuple<uint32_t, int32_t, uint32_t>;  // rank, position, merged id
  std::vector<Entry> initial;
  const auto entry_at = [&](int32_t left, int32_t right) -> std::optional<Entry> {
    const Merge* merge = find_merge(symbols[left].id, symbols[right].id);
    if (merge == nullptr) return std::nullopt;
    return Entry(merge->rank, left, merge->id);
  };
  for (int32_t i = 0; i + 1 < static_cast<int32_t>(symbols.size()); ++i) {
    if (const auto entry = entry_at(i, i + 1)) initial.push_back(*entry);
  }
  std::priority_queue queue(std::greater<>(), std::move(initial));
  while (!queue.empty()) {
    const auto [rank, position, merged] = queue.top();
    queue.pop();
    Symbol& left = symbols[position];
    if (!left.alive || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    const Merge* merge = find_merge(left.id, right.id);
    if (merge == nullptr || merge->id != merged) continue;
    left.id = merged;
    left.next = right.next;
    right.alive = false;
    if (left.next >= 0) symbols[left.next].previous = position;
    if (left.previous >= 0) {
      if (const auto entry = entry_at(left.previous, position)) queue.push(*entry);
    }
    if (left.next >= 0) {
      if (const auto entry = entry_at(position, left.next)) queue.push(*entry);
    }
  }
}

void BpeModel::tokenize(std::string_view piece, std::vector<uint32_t>& ids) const {
  if (piece.empty()) return;
  if (options_.ignore_merges) {
    if (const auto id = vocabulary_.id(piece)) {
      ids.push_back(*id);
      return;
    }
  }
  std::vector<Symbol> symbols = characters(piece);
  merge_all(symbols);
  for (const Symbol& symbol : symbols) {
    if (symbol.alive) ids.push_back(symbol.id);
  }
}

}  // namespace ferry::text
