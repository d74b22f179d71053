"""Writes components.json: what the stages of Hugging Face's tokenizers 0.23 make of a few texts.

Run with an environment that has `tokenizers`, in this folder. Deterministic.
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TEXTS = [
    "", " ", "Hello, World!", "  two  spaces  ", "tab\tnew\nline\r\nnel\x85vt\x0bend", "it's we'LL don't 'tis",
    "İstanbul ΣΑΣ ẞ Ǆ", "é e\u0301 q\u0307\u0323 A\u030a \u0301", "ﬁ ﬃ ㍿ ① ²½ Ⅷ １２３ ＡＢ", "日本語の文章、中文。", "각 \u1100\u1161\u11a8",
    "العَرَبِيَّة ٤٥٦", "क्षत्रिय", "👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️", "a\u200bb\u00a0c\u3000d\ufeffe\u2028f", "x\0y\x01\x7f\x9f\ufffd",
    "\u2581a \u2581\u2581b", "a-b--c_d...e?!", "1234567 3.14 a1b2", "𝐇𝐢 𐐀 \U00013460 \U0002ebf0 \U00010d40", "\u0897a \u1734 \u08ca",
    "Ａ\u0301 ｶﾞ", "<s>in</s> a <mask> b<mask>c", "aaaaaaaaaa", "low lower lowest newest widest",
]

NORMALIZERS = [
    normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD(), normalizers.Lowercase(),
    normalizers.Strip(), normalizers.Strip(left=True, right=False), normalizers.Strip(left=False, right=True),
    normalizers.StripAccents(), normalizers.Nmt(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"),
    normalizers.Replace(Regex(r"\s+"), " "), normalizers.Replace(Regex(r"\p{M}|\d"), ""), normalizers.BertNormalizer(),
    normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False),
    normalizers.ByteLevel(), normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
]

PRE_TOKENIZERS = [
    pre_tokenizers.Whitespace(), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(),
    pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Punctuation("merged_with_next"),
    pre_tokenizers.Punctuation("merged_with_previous"), pre_tokenizers.Punctuation("removed"),
    pre_tokenizers.Digits(True), pre_tokenizers.Digits(False), pre_tokenizers.BertPreTokenizer(),
    pre_tokenizers.Metaspace(), pre_tokenizers.Metaspace(prepend_scheme="never"),
    pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]),
    pre_tokenizers.CharDelimiterSplit("a"), pre_tokenizers.FixedLength(3), pre_tokenizers.ByteLevel(add_prefix_space=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), pre_tokenizers.Split("a", "removed"),
    pre_tokenizers.Split(Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
    pre_tokenizers.Split(Regex(r"[\p{Lu}\p{Lt}]+[\p{Ll}\p{M}]*|\w+"), "removed", invert=True),
    pre_tokenizers.Split(Regex(r"\W+"), "merged_with_previous"), pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), "isolated"),
    pre_tokenizers.Split(Regex(r"^.|.$"), "isolated"), pre_tokenizers.Split(Regex(r"x*"), "isolated"),
]

DECODERS = [
    decoders.ByteLevel(), decoders.Metaspace(), decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback(),
    decoders.WordPiece(), decoders.WordPiece(prefix="##", cleanup=False), decoders.BPEDecoder(), decoders.Fuse(),
    decoders.Strip(" ", 1, 0), decoders.Replace("▁", " "),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
]
TOKENS = [
    ["▁Hello", "▁wor", "ld</w>", "!"], ["<0xE2>", "<0x96>", "<0x81>", "a", "<0xFF>", "<0x41>"], ["Ġhi", "Ã", "©", "ł", "日"],
    ["un", "##aff", "##able", ".", "do", "n't"], [" x", "  y ", "z"], ["▁", "▁▁a"], ["it</w>", "'s</w>"],
]

CORPUS = ["low lower lowest", "new newer newest", "wide wider widest", "the quick brown fox", "Hello, World!"] * 4
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def bpe(pieces, **kwargs):
    vocab = {}
    for piece in pieces:
        vocab.setdefault(piece, len(vocab))
    return models.BPE(vocab=vocab, **kwargs)


def tokenizers():
    merges = [("l", "o"), ("lo", "w"), ("e", "r"), ("e", "s"), ("es", "t"), ("a", "a"), ("aa", "aa")]
    letters = list("abcdefghijklmnopqrstuvwxyz")
    merged = [a + b for a, b in merges]

    t = Tokenizer(bpe(["<unk>"] + letters + merged, merges=merges, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    yield "bpe", t
    t = Tokenizer(bpe(["<unk>"] + letters + merged, merges=merges, unk_token="<unk>", fuse_unk=True))
    yield "bpe fused unk", t
    t = Tokenizer(bpe(letters + merged, merges=merges))
    yield "bpe without unk", t
    t = Tokenizer(bpe(["<unk>", "▁"] + BYTES + letters + merged, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = DECODERS[-1]
    t.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", t.token_to_id("<s>")), ("</s>", t.token_to_id("</s>"))])
    yield "bpe byte fallback", t
    t = Tokenizer(bpe(letters + ["lowest", "lo", "w"] + merged, merges=merges, ignore_merges=True))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    yield "bpe ignore merges", t
    continued = letters + ["##" + c for c in letters] + ["lo", "low", "##er"]
    t = Tokenizer(bpe(continued, merges=[("l", "##o"), ("lo", "##w"), ("##e", "##r")], continuing_subword_prefix="##"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    yield "bpe prefix", t

    pieces = [("<unk>", 0.0), ("▁", -3.0), ("▁low", -4.0), ("low", -4.5), ("er", -4.0), ("est", -4.0), ("▁new", -4.0), ("▁Hello", -6.0)]
    pieces += [(c, -6.0 - i / 10) for i, c in enumerate(letters)]
    for name, byte_fallback in (("unigram", False), ("unigram byte fallback", True)):
        t = Tokenizer(models.Unigram(pieces + [(b, -20.0) for b in BYTES] * byte_fallback, unk_id=0, byte_fallback=byte_fallback))
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        t.decoder = decoders.Metaspace(prepend_scheme="first")
        t.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
        t.add_tokens([AddedToken("in", single_word=True), AddedToken("widest", normalized=True)])
        yield name, t

    t = Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", "low", "##er", "##est", "new", "hello", ",", "world", "!", "a", "##a"])}, unk_token="[UNK]", max_input_chars_per_word=8))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    t.decoder = decoders.WordPiece()
    t.add_special_tokens(["[CLS]", "[SEP]"])
    t.add_tokens([AddedToken("World", normalized=True)])
    yield "wordpiece", t

    t = Tokenizer(models.WordLevel(vocab={"[UNK]": 0, "low": 1, "lower": 2}, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.Sequence([processors.ByteLevel(), processors.RobertaProcessing(("low", 1), ("lower", 2))])
    yield "wordlevel", t


def main():
    out = {"texts": TEXTS, "normalizers": [], "pre_tokenizers": [], "decoders": [], "tokens": TOKENS, "tokenizers": []}
    probe = Tokenizer(models.BPE())
    for stage in NORMALIZERS:
        probe.normalizer = stage
        config = json.loads(probe.to_str())["normalizer"]
        out["normalizers"].append({"config": config, "expected": [stage.normalize_str(t) for t in TEXTS]})
    probe = Tokenizer(models.BPE())
    for stage in PRE_TOKENIZERS:
        probe.pre_tokenizer = stage
        config = json.loads(probe.to_str())["pre_tokenizer"]
        expected = [[piece for piece, _ in stage.pre_tokenize_str(t)] for t in TEXTS]
        out["pre_tokenizers"].append({"config": config, "expected": expected})
    probe = Tokenizer(models.BPE())
    for stage in DECODERS:
        probe.decoder = stage
        config = json.loads(probe.to_str())["decoder"]
        out["decoders"].append({"config": config, "expected": [stage.decode(t) for t in TOKENS]})
    for name, t in tokenizers():
        encoded = [t.encode(text).ids for text in TEXTS]
        out["tokenizers"].append({
            "name": name, "tokenizer": json.loads(t.to_str()), "ids": encoded,
            "decoded": [t.decode(ids, skip_special_tokens=False) if ids else "" for ids in encoded],
            "decoded_without_special": [t.decode(ids) if ids else "" for ids in encoded],
        })
    text = json.dumps(out, ensure_ascii=True, separators=(",", ":"))
    pathlib.Path(__file__).with_name("components.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
