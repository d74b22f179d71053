#include "ferry/text/token_model.h"

#include <utility>

#include "ferry/base/error.h"
#include "ferry/text/bpe_model.h"
#include "ferry/text/unigram_model.h"
#include "ferry/text/wordpiece_model.h"

namespace ferry::text {
namespace {

// Files from before the "type" key are told apart by their other keys, as the Rust crate does.
std::string model_type(const JsonView& json) {
  if (const auto type = json.find("type")) return type->string();
  if (json.find("merges")) return "BPE";
  if (json.at("vocab").is_array()) return "Unigram";
  return json.find("max_input_chars_per_word") ? "WordPiece" : "WordLevel";
}

}  // namespace

void Vocabulary::add(std::string token, uint32_t id) {
  const auto [entry, inserted] = ids_.insert_or_assign(std::move(token), id);
  tokens_[id] = &entry->first;
}

std::optional<uint32_t> Vocabulary::id(std::string_view token) const {
  const auto found = ids_.find(token);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

const std::string* Vocabulary::token(uint32_t id) const {
  const auto found = tokens_.find(id);
  return found == tokens_.end() ? nullptr : found->second;
}

Vocabulary Vocabulary::from_json(const JsonView& json) {
  if (!json.is_object()) json.fail("expected an object of tokens and ids");
  Vocabulary vocabulary;
  vocabulary.ids_.reserve(json.raw().size());
  vocabulary.tokens_.reserve(json.raw().size());
  for (const auto& [token, id] : json.raw().items()) {
    const bool fits = id.is_number_unsigned() && id.get<uint64_t>() <= INT32_MAX;
    vocabulary.add(token, fits ? id.get<uint32_t>() : json.at(token).id());
  }
  return vocabulary;
}

std::shared_ptr<const TokenModel> TokenModel::from_json(const JsonView& json) {
  const std::string type = model_type(json);
  if (type == "BPE") return BpeModel::from_json(json);
  if (type == "Unigram") return UnigramModel::from_json(json);
  if (type == "WordPiece" || type == "WordLevel") return WordPieceModel::from_json(json, type);
  json.at("type").fail(fmt::format("'{}' is not a model that ferry knows", type));
}

}  // namespace ferry::text
