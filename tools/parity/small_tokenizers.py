#!/usr/bin/env python
"""Trains small real tokenizers on made-up text, in the forms found in pipeline folders:
clip-files (vocab.json + merges.txt), clip-json (tokenizer.json alone), t5-spiece and t5-spiece-bytes
(spiece.model alone, without and with byte_fallback), t5-json and t5-json-bytes (tokenizer.json alone)."""

import argparse
import collections
import io
import unicodedata
from pathlib import Path

import common
import strings

CLIP_CONFIG = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "model_max_length": 77,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": "<|endoftext|>",
}
T5_CONFIG = {
    "eos_token": "</s>",
    "extra_ids": 100,
    "model_max_length": 512,
    "pad_token": "<pad>",
    "tokenizer_class": "T5Tokenizer",
    "unk_token": "<unk>",
}
NAMES = ("clip-files", "clip-json", "t5-spiece", "t5-spiece-bytes", "t5-json", "t5-json-bytes")


def byte_pair_merges(words, wanted):
    """The `wanted` most frequent merges; ties go to the first in order (the trainer of `tokenizers`
    breaks them by hash order, so that a seed would not give the same files again)."""
    words = [(list(word[:-1]) + [word[-1] + "</w>"], count) for word, count in sorted(words.items())]
    merges = []
    for _ in range(wanted):
        pairs = collections.Counter()
        for parts, count in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def clip_vocabulary(lines, merges_wanted=700):
    """Vocabulary in OpenAI's order (bytes, bytes with </w>, merges, specials) and the merges."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    like = CLIPTokenizer().backend_tokenizer  # for its normalizer and pre-tokenizer
    words = collections.Counter()
    for line in lines:
        words.update(w for w, _ in like.pre_tokenizer.pre_tokenize_str(like.normalizer.normalize_str(line)))
    merges = byte_pair_merges(words, merges_wanted)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + [left + right for left, right in merges]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    return {token: i for i, token in enumerate(tokens)}, merges


def write_clip_files(folder, lines, merges_wanted=700):
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = clip_vocabulary(lines, merges_wanted)
    common.save_json(vocabulary, folder / "vocab.json")
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(text)
    common.save_json(CLIP_CONFIG, folder / "tokenizer_config.json")
    specials = {k: v for k, v in CLIP_CONFIG.items() if k.endswith("_token")}
    common.save_json(specials, folder / "special_tokens_map.json")


def small_rules(path):
    """A normalization rule table of a few thousand characters; nmt_nfkc's own takes 240 KB."""
    ranges = ((0xA0, 0x250), (0x1100, 0x1113), (0x1E00, 0x1EFF), (0x2000, 0x2070), (0x2070, 0x20A0), (0x2100, 0x2190))
    ranges += ((0x2460, 0x2474), (0x3000, 0x3001), (0xFB00, 0xFB07), (0xFF01, 0xFFA0))
    rules = {}
    for low, high in ranges:
        for code in range(low, high):
            target = unicodedata.normalize("NFKC", chr(code))
            if target != chr(code):
                rules[(code,)] = [ord(c) for c in target]
            parts = unicodedata.normalize("NFD", chr(code))
            if code < 0x250 and len(parts) > 1:
                rules[tuple(map(ord, parts))] = [ord(c) for c in unicodedata.normalize("NFKC", chr(code))]
    for code in (9, 10, 13, 0x85, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF, 0xFFFD):
        rules[(code,)] = [0x20]
    for code in (*range(1, 9), 11, *range(14, 32), 127, 0x8F, 0x9F):
        rules[(code,)] = []
    spell = lambda codes: " ".join(f"{c:X}" for c in codes)  # noqa: E731
    path.write_text("".join(f"{spell(k)}\t{spell(v)}\n" for k, v in sorted(rules.items())))


def write_t5_spiece(folder, lines, bytes_, vocabulary=900, compact=False):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    folder.mkdir(parents=True, exist_ok=True)
    rules = folder / "rules.tsv"
    if compact:
        small_rules(rules)
    normalization = {"normalization_rule_tsv": str(rules)} if compact else {"normalization_rule_name": "nmt_nfkc"}
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line.replace("\n", " ").replace("\r", " ") for line in lines), model_writer=written,
        model_type="unigram", vocab_size=vocabulary + 256 * bytes_, hard_vocab_limit=False, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, byte_fallback=bytes_, character_coverage=0.9995, num_threads=1, minloglevel=2,
        **normalization,
    )  # fmt: skip
    rules.unlink(missing_ok=True)
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    model.normalizer_spec.ClearField("normalization_rule_tsv")  # a path of this machine
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    common.save_json(T5_CONFIG, folder / "tokenizer_config.json")


def load(folder):
    """The Hugging Face tokenizer of a folder, by the class that its tokenizer_config.json names."""
    import transformers

    name = common.load_json(Path(folder) / "tokenizer_config.json")["tokenizer_class"]
    return getattr(transformers, name).from_pretrained(folder)


def train(out, seed=0, compact=False, merges=700, vocabulary=900):
    """Writes the folders NAMES under `out`."""
    out = Path(out)
    lines = strings.corpus(seed)
    write_clip_files(out / "clip-files", lines, merges)
    write_t5_spiece(out / "t5-spiece", lines, False, vocabulary, compact)
    write_t5_spiece(out / "t5-spiece-bytes", lines, True, vocabulary, compact)
    for source, target in (("clip-files", "clip-json"), ("t5-spiece", "t5-json"), ("t5-spiece-bytes", "t5-json-bytes")):
        tokenizer = load(out / source)
        if target == "t5-json-bytes":
            # A saved tokenizer.json keeps the last call's truncation and padding; later calls ignore both.
            tokenizer(["a large red circle"], truncation=True, max_length=3, padding="max_length")
        tokenizer.save_pretrained(out / target)
    return [out / name for name in NAMES]


def ids(folder, texts, max_length=None):
    tokenizer = load(folder)
    if max_length is None:
        return [tokenizer(text).input_ids for text in texts]
    return [tokenizer(text, truncation=True, max_length=max_length).input_ids for text in texts]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compact", action="store_true", help="T5: a small normalization table instead of nmt_nfkc")
    a = parser.parse_args()
    common.quiet()
    for folder in train(a.out, a.seed, a.compact):
        print(folder, "vocabulary", len(load(folder)))


if __name__ == "__main__":
    main()
