"""The two tokenizers and text encoders of the shapes pipeline.

Every word of a caption is one token in both. Each tokenizer folder holds the old form (vocab.json
and merges.txt; spiece.model) and the new one (tokenizer.json), so that either kind of reader works.
"""

import json
import os
from collections import Counter

import torch

import draw

CLIP_LENGTH = 77
T5_LENGTH = 24  # max_sequence_length: training pads to it, so generation should too
WIDTH = 128


# --- CLIP: byte-level BPE -------------------------------------------------------------------------


def train_bpe(words):
    """Merges until every word is one token: returns the list of (left, right)."""
    split = [[*w[:-1], w[-1] + "</w>"] for w in words]
    merges = []
    while True:
        pairs = Counter(pair for word in split for pair in zip(word, word[1:]))
        if not pairs:
            return merges
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((left, right))
        for word in split:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1


def save_clip_tokenizer(folder):
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    merges = train_bpe(draw.vocabulary() + [",", "."])
    tokens = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)
    tokenizer.save_pretrained(folder)
    with open(os.path.join(folder, "vocab.json"), "w", encoding="utf-8") as f:
        json.dump(vocab, f, ensure_ascii=False)
    with open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    with open(os.path.join(folder, "special_tokens_map.json"), "w") as f:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        json.dump({n: getattr(tokenizer, n) for n in names}, f, indent=2)


# --- T5: sentencepiece unigram --------------------------------------------------------------------


def save_t5_tokenizer(folder, captions):
    import io

    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from transformers import T5Tokenizer

    os.makedirs(folder, exist_ok=True)
    buffer = io.BytesIO()
    # nmt_nfkc_cf folds case, so "A Red Circle" reads like "a red circle".
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=buffer, model_type="unigram",
        vocab_size=90, hard_vocab_limit=False, character_coverage=1.0, num_threads=1,
        normalization_rule_name="nmt_nfkc_cf", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", minloglevel=2,
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789,.!?'-",
    )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())
    # Unigram training splits some words; a piece with a good score for each of them settles it.
    known = {p.piece: p for p in model.pieces}
    for word in draw.vocabulary():
        piece = known.get("▁" + word) or model.pieces.add(piece="▁" + word)
        piece.score = max(piece.score or -3.0, -3.0)
    with open(os.path.join(folder, "spiece.model"), "wb") as f:
        f.write(model.SerializeToString())
    tokenizer = T5Tokenizer(
        vocab=[(p.piece, p.score) for p in model.pieces],
        _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap,
        extra_ids=0, additional_special_tokens=[], model_max_length=T5_LENGTH,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    with open(os.path.join(folder, "special_tokens_map.json"), "w") as f:
        names = ("eos_token", "unk_token", "pad_token")
        json.dump({n: getattr(tokenizer, n) for n in names}, f, indent=2)


def load_tokenizers(folder):
    from transformers import CLIPTokenizer, T5Tokenizer

    return (CLIPTokenizer.from_pretrained(os.path.join(folder, "tokenizer")),
            T5Tokenizer.from_pretrained(os.path.join(folder, "tokenizer_2")))  # fmt: skip


def check_tokenizers(folder, captions):
    """Every word one token, and old and new forms agree."""
    import sentencepiece

    clip, t5 = load_tokenizers(folder)
    processor = sentencepiece.SentencePieceProcessor(
        model_file=os.path.join(folder, "tokenizer_2", "spiece.model"))  # fmt: skip
    for text in captions:
        words = len(text.replace(",", " ,").replace(".", " .").split())
        words_t5 = words
        if len(clip(text).input_ids) != words + 2 or len(t5(text).input_ids) > words_t5 + 2:
            raise ValueError(f"{text!r}: {clip.tokenize(text)} {t5.tokenize(text)}")
        if t5(text).input_ids != processor.encode(text) + [1]:
            raise ValueError(f"spiece.model and tokenizer.json differ on {text!r}")
    return len(clip), len(t5)


class CaptionTokens:
    """Token ids of many captions, each distinct caption tokenized once."""

    def __init__(self, folder):
        self.clip, self.t5 = load_tokenizers(folder)
        self.known = {}

    def __call__(self, captions):
        """CLIP ids [n, longest] (what follows the end token cannot matter) and T5 ids [n, 24]."""
        new = [c for c in dict.fromkeys(captions) if c not in self.known]
        if new:
            for text, a, b in zip(new, self.clip(new).input_ids, self.t5(new).input_ids):
                self.known[text] = (a, b + [0] * (T5_LENGTH - len(b)))
        pairs = [self.known[c] for c in captions]
        longest = max(len(a) for a, _ in pairs)
        pad = self.clip.pad_token_id
        clip_ids = torch.tensor([a + [pad] * (longest - len(a)) for a, _ in pairs])
        return clip_ids, torch.tensor([b for _, b in pairs])


# --- Encoders -------------------------------------------------------------------------------------


def make_encoders(folder):
    """CLIPTextModel and T5EncoderModel for the tokenizers in `folder`, with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_tokenizer, t5_tokenizer = load_tokenizers(folder)
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(clip_tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CLIP_LENGTH,
        projection_dim=WIDTH, bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id, pad_token_id=clip_tokenizer.pad_token_id,
    ))  # fmt: skip
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(t5_tokenizer), d_model=WIDTH, d_kv=32, num_heads=4, d_ff=2 * WIDTH,
        num_layers=3, dropout_rate=0.0, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False,
    ))  # fmt: skip
    return clip, t5
