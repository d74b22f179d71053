#!/usr/bin/env python
"""A complete tiny Flux pipeline with random weights and real small tokenizers, and its pictures."""

import argparse
import shutil
import tempfile
from pathlib import Path

import common
import reference
import small_tokenizers
import torch


def component_configs(seed, clip_vocabulary, clip_end, t5_vocabulary):
    """Odd seeds have guidance embeddings (as FLUX.1-dev) and dynamic shifting; even ones neither."""
    dev = seed % 2 == 1
    transformer = {
        "attention_head_dim": 8, "axes_dims_rope": [4, 2, 2], "guidance_embeds": dev, "in_channels": 16,
        "joint_attention_dim": 24, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 16,
    }  # fmt: skip
    vae = {
        "block_out_channels": [4, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "force_upcast": True,
        "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 32, "scaling_factor": 0.3611,
        "shift_factor": 0.1159, "up_block_types": ["UpDecoderBlock2D"] * 2, "use_post_quant_conv": False, "use_quant_conv": False,
    }  # fmt: skip
    clip = {
        "bos_token_id": clip_end - 1, "eos_token_id": clip_end, "hidden_size": 16, "intermediate_size": 32,
        "max_position_embeddings": 77, "num_attention_heads": 2, "num_hidden_layers": 1, "pad_token_id": 1,
        "projection_dim": 16, "vocab_size": clip_vocabulary,
    }  # fmt: skip
    t5 = {
        "d_ff": 32, "d_kv": 8, "d_model": 24, "feed_forward_proj": "gated-gelu", "num_heads": 2, "num_layers": 2,
        "vocab_size": t5_vocabulary,
    }  # fmt: skip
    scheduler = {"shift": 3.0 if dev else 1.0, "use_dynamic_shifting": dev, "base_shift": 0.5, "max_shift": 1.15}
    return transformer, vae, clip, t5, scheduler


def write(out, seed=1, tokenizers=None):
    """Writes the pipeline folder; `tokenizers` is a folder of small_tokenizers.train()."""
    import diffusers
    from transformers import AutoTokenizer  # noqa: F401  (fails early where transformers is broken)

    out = Path(out)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(tokenizers or scratch)
        if tokenizers is None:
            small_tokenizers.train(source, seed, compact=True)
        clip_tokenizer = small_tokenizers.load(source / "clip-files")
        t5_tokenizer = small_tokenizers.load(source / "t5-spiece")
        transformer, vae, clip, t5, scheduler = component_configs(
            seed, len(clip_tokenizer), clip_tokenizer.eos_token_id, len(t5_tokenizer)
        )
        pipe = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=reference.build("AutoencoderKL", vae, seed),
            text_encoder=reference.build("CLIPTextModel", clip, seed + 1),
            tokenizer=clip_tokenizer,
            text_encoder_2=reference.build("T5EncoderModel", t5, seed + 2),
            tokenizer_2=t5_tokenizer,
            transformer=reference.build("FluxTransformer2DModel", transformer, seed + 3),
        )
        shutil.rmtree(out, ignore_errors=True)
        pipe.save_pretrained(out)
    return out


def load(folder):
    import diffusers

    pipe = diffusers.FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, call, seed):
    """Named tensors for one call (arguments of FluxPipeline.__call__): `latents` [n, tokens, channels]
    as output_type="latent" gives them, and `image` [n, height, width, 3] float in 0..1."""
    run = lambda kind: pipe(**call, generator=torch.Generator().manual_seed(seed), output_type=kind).images  # noqa: E731
    return {"latents": run("latent"), "image": torch.from_numpy(run("np").copy())}


def calls():
    """The calls that are compared: name -> (arguments, seed)."""
    size = {"height": 32, "width": 48, "max_sequence_length": 32}
    prompt = "a large red circle on a white background"
    return {
        "plain": ({**size, "prompt": prompt, "num_inference_steps": 3, "guidance_scale": 3.5}, 7),
        "true_cfg": (
            {**size, "prompt": prompt, "negative_prompt": "a blue square, it's naïve", "true_cfg_scale": 2.5, "num_inference_steps": 3},
            8,
        ),
        "two_images": ({**size, "prompt": prompt, "num_images_per_prompt": 2, "num_inference_steps": 2}, 9),
        "two_prompts": (
            {**size, "prompt": [prompt, "two tiny green stars 👍🏽"], "num_images_per_prompt": 2, "num_inference_steps": 2},
            10,
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder of the pipeline")
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    common.quiet()
    pipe = load(write(a.out, a.seed))
    for name, (call, seed) in calls().items():
        made = generate(pipe, call, seed)
        common.save_tensors(made, Path(a.out) / f"expected_{name}.safetensors")
        common.save_json({**call, "seed": seed}, Path(a.out) / f"expected_{name}.json")
        print(name, {k: list(v.shape) for k, v in made.items()}, "mean", round(made["image"].mean().item(), 3))


if __name__ == "__main__":
    main()
