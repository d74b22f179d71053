// CLIP's tokenizer: byte-level BPE over lowercased words.
#pragma once

#include "ferry/text/bpe_model.h"
#include "ferry/text/tokenizer_backend.h"

namespace ferry::text {

// What transformers' CLIPTokenizer (5.x) builds around a vocabulary, whichever file that came from:
// NFC, blanks collapsed, lowercase, its split at words, GPT-2's bytes, `</w>` at the end of words.
// `unk_token` stands for what the vocabulary lacks. The post-processor is not set: its ids are
// known only when the special tokens have been added. Throws FormatError.
TokenizerBackend make_clip_backend(Vocabulary vocabulary, const BpeModel::Merges& merges,
                                   std::string unk_token);

}  // namespace ferry::text
