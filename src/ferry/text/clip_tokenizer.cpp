#include "ferry/text/clip_tokenizer.h"

#include <utility>

namespace ferry::text {
namespace {

constexpr std::string_view kWords =
    R"(<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)";

}  // namespace

TokenizerBackend make_clip_backend(Vocabulary vocabulary, const BpeModel::Merges& merges,
                                   std::string unk_token) {
  BpeOptions options;
  options.unk_token = std::move(unk_token);
  options.end_of_word_suffix = "</w>";
  TokenizerBackend out;
  out.blank_in_decoded = options.end_of_word_suffix;
  out.model = std::make_shared<BpeModel>(std::move(vocabulary), merges, std::move(options));
  out.normalizer = Normalizer::sequence({Normalizer::unicode(NormalForm::nfc),
                                         Normalizer::replace(Pattern::regex(R"(\s+)"), " "),
                                         Normalizer::lowercase()});
  out.pre_tokenizer = PreTokenizer::sequence(
      {PreTokenizer::split_at(Pattern::regex(kWords), SplitBehavior::removed, true),
       PreTokenizer::byte_level(false, true)});
  out.decoder = Decoder::byte_level();
  return out;
}

}  // namespace ferry::text
