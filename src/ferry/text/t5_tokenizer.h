// T5's tokenizer: sentencepiece's unigram model.
#pragma once

#include <string_view>

#include "ferry/text/sentencepiece_model.h"
#include "ferry/text/tokenizer_backend.h"
#include "ferry/text/unigram_model.h"

namespace ferry::text {

// The vocabulary of a `spiece.model` with `extra_ids` sentinels behind it, <extra_id_0> last, as
// transformers converts it.
ScoredTokens t5_vocabulary(const SentencePieceModel& model, uint32_t extra_ids);

// What transformers' T5Tokenizer (5.x) builds around a vocabulary, whichever file that came from:
// the character map (may be empty), split at blanks, each word marked with U+2581. The unknown
// token is the third. The post-processor is not set. Throws FormatError.
TokenizerBackend make_t5_backend(ScoredTokens vocabulary, std::string_view charsmap);

}  // namespace ferry::text
