"""Stand-ins for the small repositories of the hub that most of upstream's pipelines are built from:
the same architecture and sizes, random weights, a tokenizer trained on made-up text. Tests of
offloading compare a pipeline with itself; which words it knows is nothing to them.
"""

from __future__ import annotations

import sys
from pathlib import Path

PARITY = Path(__file__).resolve().parent.parent / "parity"

# Repository -> folder below the one that write() is given.
NAMES = {
    "hf-internal-testing/tiny-random-clip": "clip",
    "peft-internal-testing/tiny-clip-text-2": "clip",
    "hf-internal-testing/tiny-sd3-text_encoder": "clip",
    "hf-internal-testing/tiny-sd3-text_encoder-2": "clip",
    "hf-internal-testing/tiny-random-t5": "t5",
    "hf-internal-testing/tiny-random-T5Model": "t5",
}


def write(folder: Path) -> None:
    sys.path.insert(0, str(PARITY))
    import small_tokenizers
    import strings
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=37, num_hidden_layers=5,
        num_attention_heads=4, projection_dim=32, max_position_embeddings=77,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    CLIPTextModelWithProjection(clip).save_pretrained(folder / "clip")
    t5 = T5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5EncoderModel(t5).save_pretrained(folder / "t5")
    lines = strings.corpus(seed=0)
    small_tokenizers.write_clip_files(folder / "clip", lines, merges_wanted=400)
    small_tokenizers.write_t5_spiece(folder / "t5", lines, bytes_=False, compact=True)


def rewrite(tests: Path, folder: Path) -> int:
    """Names the stand-ins in the copied tests; gives how many names were replaced."""
    count = 0
    for path in sorted(tests.rglob("*.py")):
        text = before = path.read_text(encoding="utf-8")
        for name, stand_in in NAMES.items():
            count += text.count(f'"{name}"')
            text = text.replace(f'"{name}"', f'"{folder / stand_in}"')
        if text != before:
            path.write_text(text, encoding="utf-8")
    return count
