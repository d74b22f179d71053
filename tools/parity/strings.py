#!/usr/bin/env python
"""Test strings for tokenizers, drawn from a seed: prompts, emoji, CJK, combining marks, right-to-left,
control characters, very long input, special tokens in the text, spaces, contractions, digits."""

import argparse
import json
import random

WORDS = """a an the large small tiny red green blue yellow circle square triangle star picture photo painting of
on in under over with white black background cat dog astronaut riding horse mountain river sunrise portrait
cinematic lighting highly detailed 4k oil watercolour he she it isn't don't we're they've I'm you'll I'd
John's running unbelievable antidisestablishmentarianism x-ray C++ e.g. U.S.A. naïve café coöperate ñandú Straße
Ångström Œuvre ﬁne ﬂow İstanbul ΟΔΥΣΣΕΥΣ""".split()
CJK = "漢字仮名交じり文日本語中文简体繁體한국어말ひらがなカタカナｶﾀｶﾅ、。「」！？＃１２３ＡＢＣ　々〆〇𠮷𩸽"
RTL = "שלום עולם مرحبا بالعالم ١٢٣ ؟، לְעוֹלָם مُحَمَّد"
OTHER = "Привет мир Ελληνικά हिन्दी नमस्ते ภาษาไทย தமிழ் Việt Nam ქართული አማርኛ Ⅳ ½ ² ﬀ ﷺ ㎏ ™ № … ‰ µ Ω K Å"
EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️", "☃", "🧑🏿‍🚀", "1️⃣", "©", "🫠", "\U000e0067"]
MARKS = ["é", "e\u0301", "a\u0308\u0304", "o\u0327\u0302", "\u0301", "Z͑ͫ̓ͪ̂ͫ", "ṩ", "s\u0307\u0323", "\u1100\u1161\u11a8", "각", "\u0958", "ﬃ", "ǆ"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\u0085", "\u1680", "\ufeff", "\u202f"]
CONTROLS = [chr(c) for c in (0, 1, 7, 8, 11, 12, 14, 27, 31, 127, 128, 159, 0x200C, 0x200D, 0x200E, 0x202E, 0x2060, 0xAD, 0xFFFD, 0xFFFE, 0xE000)]
PUNCTUATION = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["...", "--", "?!", "''", "'S", "'LL", "`s", "’s", "“", "”", "—", "▁", "</w>", "Ġ"]
SPECIALS = ["<|startoftext|>", "<|endoftext|>", "</s>", "<pad>", "<unk>", "<s>", "<extra_id_0>", "<extra_id_99>", "<|STARTOFTEXT|>", "<0x41>", "< /s>", "<extra_id_100>"]


def digits(rng):
    return rng.choice(["7", "42", "2026", "3.14", "1,000,000", "1e-5", "٣٤", "x2", "50%", "12:30", "００７", "②"])


def word(rng):
    found = rng.choice(WORDS)
    return rng.choice([found, found, found, found.upper(), found.title()])


def run_of(rng, alphabet, longest=8):
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, longest)))


def code_point(rng):
    """Any scalar value, assigned or not."""
    while True:
        value = rng.choice([rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0x10000), rng.randrange(0x110000)])
        if not 0xD800 <= value <= 0xDFFF:
            return chr(value)


PIECES = (
    word,
    word,
    digits,
    lambda rng: run_of(rng, CJK),
    lambda rng: run_of(rng, RTL, 12),
    lambda rng: run_of(rng, OTHER, 12),
    lambda rng: rng.choice(EMOJI),
    lambda rng: rng.choice(MARKS) + rng.choice(["", "x"]),
    lambda rng: rng.choice(CONTROLS),
    lambda rng: rng.choice(PUNCTUATION),
    lambda rng: rng.choice(SPECIALS),
    code_point,
)


def mixed(rng):
    text = rng.choice(["", "", *SPACES])
    for _ in range(rng.randint(1, 14)):
        text += rng.choice(PIECES)(rng) + rng.choice(["", " ", " ", " ", rng.choice(SPACES)])
    return text


def prompt(rng):
    return " ".join(word(rng) for _ in range(rng.randint(1, 20))) + rng.choice(["", ".", "!", " ", "\n"])


FIXED = [
    "", " ", "  ", "\n", "\t \n", "a", "A", " a", "a ", "  a  b  ", "a\u0301", "\u0301", "\u200d", "\x00", "'", "''s", "it's 'llama'",
    "don't DON'T don’t", "100000", "a1b2c3", "...", "。。。", "▁", "▁a", " ▁ a", "<|endoftext|>", "x<|endoftext|>y", " <|startoftext|> ",
    "</s>", "a</s>b", "a </s> b", "<extra_id_5>z", "<unk>", "<pad>x", "a  </s>  b", "\ufeffa", "ﬁ", "İ", "ß", "ẞ", "Σς ΣΑΣ", "\u1e9b\u0323", "½", "🏳️‍🌈", "\U0010ffff",
]  # fmt: skip


def strings(seed, count=1000):
    """The fixed edge cases, then random strings, with very long ones among them."""
    rng = random.Random(f"strings-{seed}")
    found = FIXED[:count]
    while len(found) < count:
        kind = rng.random()
        if kind < 0.25:
            found.append(prompt(rng))
        elif kind < 0.97:
            found.append(mixed(rng))
        elif kind < 0.985:
            found.append("".join(mixed(rng) for _ in range(60)))
        else:
            found.append(rng.choice([run_of(rng, "ab", 2) * 400, "a" * 2000, word(rng) * 200, rng.choice(CJK) * 700]))
    return found


def corpus(seed=0, lines=4000):
    """Text to train the small tokenizers on."""
    rng = random.Random(f"corpus-{seed}")
    plain = [prompt(rng) for _ in range(lines)]
    return plain + [mixed(rng).replace("\x00", "") for _ in range(lines // 8)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    a = parser.parse_args()
    for text in strings(a.seed, a.count):
        print(json.dumps(text))


if __name__ == "__main__":
    main()
