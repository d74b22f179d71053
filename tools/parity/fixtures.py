#!/usr/bin/env python
"""Writes the committed fixtures of the C++ tests (tests/fixtures): tiny models with inputs and outputs,
scheduler trajectories, small tokenizers with strings and ids, a tiny Flux pipeline with its pictures."""

import argparse
import json
import shutil
from pathlib import Path

import common
import reference
import schedules
import small_tokenizers
import strings
import tiny_pipeline

SEED = 20
FLUX = {"attention_head_dim": 8, "axes_dims_rope": [4, 2, 2], "joint_attention_dim": 24, "num_attention_heads": 2, "pooled_projection_dim": 16}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    "sample_size": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
CLIP = {"bos_token_id": 98, "hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "projection_dim": 16, "vocab_size": 100}
T5 = {"d_ff": 48, "d_kv": 8, "d_model": 24, "num_heads": 3, "num_layers": 2, "vocab_size": 100}
QUANT = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}

# class, config, method, args, options: one folder <class>-<k> each
MODELS = [
    ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": True, "in_channels": 16, "num_layers": 1, "num_single_layers": 2}, "forward", {}, {"batch": 2, "height": 3, "width": 4, "text_tokens": 5}),
    ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": False, "in_channels": 16, "out_channels": 8, "num_layers": 2, "num_single_layers": 1}, "forward", {}, {"batch": 1, "height": 4, "width": 4, "text_tokens": 7}),
    ("AutoencoderKL", {**VAE, **QUANT, "block_out_channels": [4, 8]}, "encode", {}, {"batch": 2, "height": 5, "width": 4}),
    ("AutoencoderKL", {**VAE, **QUANT, "block_out_channels": [4, 8]}, "decode", {}, {"batch": 2, "height": 5, "width": 4}),
    ("AutoencoderKL", {**VAE, **PLAIN, "block_out_channels": [8, 4], "in_channels": 1}, "encode", {}, {"height": 6, "width": 3}),
    ("AutoencoderKL", {**VAE, **PLAIN, "block_out_channels": [8, 4], "in_channels": 1}, "decode", {}, {"height": 6, "width": 3}),
    ("CLIPTextModel", {**CLIP, "eos_token_id": 99, "hidden_act": "quick_gelu", "max_position_embeddings": 77}, "forward", {"output_hidden_states": True}, {"tokens": 12}),
    ("CLIPTextModel", {**CLIP, "eos_token_id": 2, "hidden_act": "gelu", "max_position_embeddings": 16}, "forward", {}, {"tokens": 16, "mask": True}),
    ("CLIPTextModelWithProjection", {**CLIP, "eos_token_id": 50, "hidden_act": "gelu"}, "forward", {}, {"tokens": 12, "mask": True}),
    ("CLIPTextModelWithProjection", {**CLIP, "eos_token_id": 2, "hidden_act": "quick_gelu"}, "forward", {"output_hidden_states": True}, {"tokens": 9, "batch": 3}),
    ("T5EncoderModel", {**T5, "feed_forward_proj": "gated-gelu"}, "forward", {"output_hidden_states": True}, {"tokens": 40}),
    ("T5EncoderModel", {**T5, "feed_forward_proj": "relu", "relative_attention_max_distance": 20, "relative_attention_num_buckets": 8}, "forward", {}, {"tokens": 30, "mask": True, "batch": 3}),
]  # fmt: skip

SCHEDULES = [
    {"config": {}, "steps": 5, "args": {}},
    {"config": {"shift": 3.0, "shift_terminal": 0.1}, "steps": 6, "args": {}},
    {"config": {"use_dynamic_shifting": True}, "steps": None, "args": {"mu": 1.15}, "sigmas": [1.0, 0.75, 0.5, 0.25]},
    {"config": {"use_dynamic_shifting": True, "time_shift_type": "linear", "stochastic_sampling": True}, "steps": 4, "args": {"mu": 0.8}},
    {"config": {"use_karras_sigmas": True, "invert_sigmas": True, "shift": 2.0}, "steps": 7, "args": {}},
    {"config": {"use_exponential_sigmas": True}, "steps": 4, "args": {}, "timesteps": [900.0, 650.0, 300.0, 50.0]},
    {"config": {"use_beta_sigmas": True, "shift": 1.5}, "steps": 8, "args": {}},
]  # fmt: skip


def write_models(out):
    counts = {}
    for class_name, config, method, args, options in MODELS:
        k = counts[class_name] = counts.get(class_name, -1) + 1
        # an encode and a decode of the same autoencoder share their weights
        seed = SEED + (k // 2 if class_name == "AutoencoderKL" else k)
        folder = out / f"{class_name}-{k}"
        hub = k == 1 and class_name.startswith(("CLIP", "T5"))
        reference.write(class_name, config, seed, folder, method, args, options, bf16=True, hub=hub)


def write_schedules(out):
    out.mkdir(parents=True)
    for k, case in enumerate(SCHEDULES):
        named = schedules.make_inputs(case, SEED + k)
        expected = schedules.trajectory(case["config"], named, case["steps"], case["args"])
        tensors = {f"input.{n}": t for n, t in named.items()} | {f"expected.{n}": t for n, t in expected.items()}
        common.save_tensors(tensors, out / f"flow_match_euler-{k}.safetensors")
        common.save_json({k: case[k] for k in ("config", "steps", "args")}, out / f"flow_match_euler-{k}.json")


def write_tokenizers(out):
    texts = strings.strings(SEED, 200)
    # the runs of thousands of characters make most of the bytes; a few are enough here
    texts = [t for t in texts if len(t) < 500] + [t for t in texts if 500 <= len(t) < 1200][:2]
    lines = lambda items: "".join(json.dumps(item) + "\n" for item in items)  # noqa: E731
    for folder in small_tokenizers.train(out, SEED, compact=True, merges=400, vocabulary=700):
        (folder / "strings.jsonl").write_text(lines(texts))
        (folder / "ids.jsonl").write_text(lines(small_tokenizers.ids(folder, texts)))
        (folder / "ids_max16.jsonl").write_text(lines(small_tokenizers.ids(folder, texts, 16)))


def write_pipeline(out, tokenizers):
    pipe = tiny_pipeline.load(tiny_pipeline.write(out, seed=SEED + 1, tokenizers=tokenizers))
    for name, (call, seed) in tiny_pipeline.calls().items():
        stem = "expected" if name == "plain" else f"expected_{name}"
        common.save_tensors(tiny_pipeline.generate(pipe, call, seed), out / f"{stem}.safetensors")
        common.save_json({**call, "seed": seed}, out / f"{stem}.json")


README = """# Fixtures

Written by `tools/parity/fixtures.py` with seed {seed}, diffusers {diffusers}, transformers {transformers},
torch {torch} (CPU, float32, one thread). Do not edit; `tools/parity/.venv/bin/python tools/parity/fixtures.py`
writes them again.

- `models/<Class>-<k>/`: `config.json` and weights as `save_pretrained` writes them; `inputs.safetensors`
  (forward argument names), `outputs.safetensors` (names of the output class; a tuple's members are
  `hidden_states.N`), `outputs_bf16.safetensors` (the same in bfloat16), `args.json` (`method`: forward, encode or decode; `args`: arguments that are no
  tensors). `CLIPTextModel-1`, `CLIPTextModelWithProjection-1` and `T5EncoderModel-1` have the weights' keys
  of older, published folders (`text_model.` before CLIPTextModel's, position_ids, T5's embedding twice).
  `AutoencoderKL-0` and `-1`, and `-2` and `-3`, are encode and decode of the same weights.
- `schedulers/flow_match_euler-<k>.json`: `config`, `steps` (null: not given), `args` of `set_timesteps`.
  The safetensors of that name: `input.model_outputs` [n, ...], `input.sample`, where used
  `input.noise` [n, ...] (what `randn` would give in each step), `input.sigmas`, `input.timesteps`;
  `expected.timesteps`, `expected.sigmas`, `expected.init_noise_sigma`, `expected.trajectory` [n + 1, ...].
- `tokenizers/<name>/`: `clip-files` (vocab.json + merges.txt), `clip-json` (tokenizer.json alone),
  `t5-spiece`, `t5-spiece-bytes` (spiece.model alone; trained without and with byte_fallback), `t5-json`,
  `t5-json-bytes` (tokenizer.json alone). `strings.jsonl`: a JSON string a line; `ids.jsonl`: Hugging
  Face's `tokenizer(text).input_ids`; `ids_max16.jsonl`: with `truncation=True, max_length=16`.
  The tokenizer.json of `t5-json-bytes` holds the truncation and padding of an earlier call, as such
  files do; `tokenizer(text)` ignores both.
  The T5 ones are normalized by a small table instead of nmt_nfkc, to be small.
  Hugging Face runs a `spiece.model` through its own unigram with `byte_fallback` off, WhitespaceSplit
  and Metaspace, and finds special tokens in the text first: sentencepiece alone gives other ids for
  about a third of these strings.
- `pipelines/flux-tiny/`: a whole FluxPipeline as `save_pretrained` writes it, and for each call
  `expected*.json` (arguments of `FluxPipeline.__call__`; `seed` of `torch.Generator()`) and
  `expected*.safetensors` (`latents` packed [n, tokens, channels], `image` [n, height, width, 3] in 0..1).
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=common.ROOT / "tests/fixtures")
    a = parser.parse_args()
    common.quiet()
    for part in ("models", "schedulers", "tokenizers", "pipelines"):
        shutil.rmtree(a.out / part, ignore_errors=True)
    write_models(a.out / "models")
    write_schedules(a.out / "schedulers")
    write_tokenizers(a.out / "tokenizers")
    write_pipeline(a.out / "pipelines/flux-tiny", a.out / "tokenizers")
    (a.out / "README.md").write_text(README.format(seed=SEED, **common.versions()))
    total = sum(f.stat().st_size for f in a.out.rglob("*") if f.is_file())
    print(f"{a.out}: {total / 1e6:.2f} MB")
    for f in a.out.rglob("*"):
        if f.is_file() and f.stat().st_size > 150_000:
            print(f"large: {f} {f.stat().st_size}")


if __name__ == "__main__":
    main()
