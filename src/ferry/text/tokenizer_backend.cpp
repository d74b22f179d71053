#include "ferry/text/tokenizer_backend.h"

#include <unordered_map>
#include <utility>

#include "ferry/base/error.h"

namespace ferry::text {
namespace {

// Words repeat; longer pieces rarely do.
constexpr size_t kLongestCachedPiece = 256;

std::string side_from_json(const JsonView& section) {
  const auto direction = section.find("direction");
  if (!direction) return "right";
  const std::string side = direction->string();
  if (side == "Right") return "right";
  if (side == "Left") return "left";
  direction->fail(fmt::format("got '{}', expected Left or Right", side));
}

// str.strip(), to which the four separators are blanks too.
std::string strip_as_python(std::string_view text) {
  const auto is_blank = [](char32_t c) { return is_whitespace(c) || (c >= 0x1C && c <= 0x1F); };
  size_t begin = 0;
  size_t end = text.size();
  for (size_t at = 0; at < text.size() && is_blank(next_code_point(text, at));) begin = at;
  for (size_t at = end; at > begin && is_blank(previous_code_point(text, at));) end = at;
  return std::string(text.substr(begin, end - begin));
}

}  // namespace

TokenizerBackend TokenizerBackend::from_json(const JsonView& json) {
  if (const auto version = json.find("version"); version && version->string() != "1.0") {
    version->fail(fmt::format("got '{}', expected '1.0'", version->string()));
  }
  TokenizerBackend out;
  out.model = TokenModel::from_json(json.at("model"));
  if (const auto part = json.find("normalizer")) out.normalizer = Normalizer::from_json(*part);
  if (const auto part = json.find("pre_tokenizer")) {
    out.pre_tokenizer = PreTokenizer::from_json(*part);
  }
  if (const auto part = json.find("post_processor")) {
    out.post_processor = PostProcessor::from_json(*part);
  }
  if (const auto part = json.find("decoder")) out.decoder = Decoder::from_json(*part);
  if (const auto part = json.find("padding")) {
    out.padding_side = side_from_json(*part);
    if (const auto token = part->find("pad_token")) out.pad_token = token->string();
  }
  if (const auto part = json.find("truncation")) out.truncation_side = side_from_json(*part);
  if (const auto part = json.find("added_tokens")) {
    std::vector<AddedToken> tokens;
    for (const JsonView& token : part->elements()) tokens.push_back(AddedToken::from_json(token));
    out.add_tokens(tokens);
  }
  return out;
}

void TokenizerBackend::add_tokens(std::span<const AddedToken> tokens) {
  added.add(tokens, *model, normalizer.get());
}

std::optional<uint32_t> TokenizerBackend::id(std::string_view token) const {
  const auto id = added.id(token);
  return id ? id : model->id(token);
}

std::vector<uint32_t> TokenizerBackend::tokenize(std::string_view text,
                                                 bool split_special_tokens) const {
  std::unordered_map<std::string, std::vector<uint32_t>> cache;
  std::vector<uint32_t> ids;
  for (const Piece& piece : pre_tokenize(
           pre_tokenizer.get(), added.extract(text, normalizer.get(), split_special_tokens))) {
    if (piece.added_token >= 0) {
      ids.push_back(static_cast<uint32_t>(piece.added_token));
    } else if (piece.text().size() > kLongestCachedPiece) {
      model->tokenize(piece.text(), ids);
    } else {
      const auto [entry, inserted] = cache.try_emplace(piece.text());
      if (inserted) model->tokenize(piece.text(), entry->second);
      ids.insert(ids.end(), entry->second.begin(), entry->second.end());
    }
  }
  return ids;
}

std::string TokenizerBackend::decode(const std::vector<uint32_t>& ids,
                                     bool skip_special_tokens) const {
  std::vector<std::string> tokens;
  for (const uint32_t id : ids) {
    const std::string* token = added.decoded(id);
    if (token == nullptr) token = model->token(id);
    if (token == nullptr || (skip_special_tokens && added.is_special(*token))) continue;
    tokens.push_back(*token);
  }
  const bool spaced = decoder == nullptr;
  if (decoder) tokens = decoder->decode(std::move(tokens));
  std::string out;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (spaced && i > 0) out += ' ';
    out += tokens[i];
  }
  if (!blank_in_decoded.empty()) {
    std::string spaced_out;
    for (const Span& span : Pattern::literal(blank_in_decoded)->find(out)) {
      spaced_out += span.matched ? " " : out.substr(span.begin, span.end - span.begin);
    }
    out = strip_as_python(spaced_out);
  }
  return out;
}

}  // namespace ferry::text
