#include "ferry/text/wordpiece_model.h"

#include <utility>

#include "ferry/base/error.h"
#include "ferry/text/unicode.h"

namespace ferry::text {

WordPieceModel::WordPieceModel(Vocabulary vocabulary, Options options)
    : vocabulary_(std::move(vocabulary)), options_(std::move(options)) {}

std::shared_ptr<const WordPieceModel> WordPieceModel::from_json(const JsonView& json,
                                                                std::string_view type) {
  Options options;
  options.unk_token = json.at("unk_token").string();
  if (type == "WordPiece") {
    options.continuing_subword_prefix = json.at("continuing_subword_prefix").string();
    options.max_input_chars_per_word = json.at("max_input_chars_per_word").id();
  }
  return std::make_shared<WordPieceModel>(Vocabulary::from_json(json.at("vocab")),
                                          std::move(options));
}

bool WordPieceModel::split(std::string_view word, std::vector<uint32_t>& ids) const {
  std::string part;
  for (size_t begin = 0; begin < word.size();) {
    size_t end = word.size();
    std::optional<uint32_t> id;
    while (begin < end) {
      part = begin > 0 ? *options_.continuing_subword_prefix : "";
      part.append(word, begin, end - begin);
      id = vocabulary_.id(part);
      if (id) break;
      previous_code_point(word, end);
    }
    if (!id) return false;
    ids.push_back(*id);
    begin = end;
  }
  return true;
}

void WordPieceModel::tokenize(std::string_view piece, std::vector<uint32_t>& ids) const {
  if (!options_.continuing_subword_prefix) {
    if (const auto id = vocabulary_.id(piece)) {
      ids.push_back(*id);
      return;
    }
  } else if (count_code_points(piece) <= options_.max_input_chars_per_word) {
    const size_t before = ids.size();
    if (split(piece, ids)) return;
    ids.resize(before);
  }
  const auto unk = vocabulary_.id(options_.unk_token);
  if (!unk) {
    throw_error<ArgumentError>("the tokenizer's unknown token '{}' is not in its vocabulary",
                               options_.unk_token);
  }
  ids.push_back(*unk);
}

}  // namespace ferry::text
