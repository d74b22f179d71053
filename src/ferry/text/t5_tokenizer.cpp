#include "ferry/text/t5_tokenizer.h"

#include <fmt/format.h>

#include <utility>

namespace ferry::text {
namespace {

constexpr char32_t kWordMark = 0x2581;
constexpr uint32_t kUnkId = 2;

}  // namespace

ScoredTokens t5_vocabulary(const SentencePieceModel& model, uint32_t extra_ids) {
  ScoredTokens tokens;
  tokens.reserve(model.pieces.size() + extra_ids);
  for (const auto& entry : model.pieces) tokens.emplace_back(entry.piece, entry.score);
  for (uint32_t i = extra_ids; i-- > 0;) tokens.emplace_back(fmt::format("<extra_id_{}>", i), 0.0);
  return tokens;
}

TokenizerBackend make_t5_backend(ScoredTokens vocabulary, std::string_view charsmap) {
  TokenizerBackend out;
  out.model = std::make_shared<UnigramModel>(std::move(vocabulary), kUnkId, false);
  if (!charsmap.empty()) out.normalizer = Normalizer::precompiled(charsmap);
  out.pre_tokenizer =
      PreTokenizer::sequence({PreTokenizer::whitespace_split(),
                              PreTokenizer::metaspace(kWordMark, PrependScheme::always, true)});
  out.decoder = Decoder::metaspace(kWordMark, PrependScheme::always);
  return out;
}

}  // namespace ferry::text
