#!/usr/bin/env python
"""Random configurations drawn from a seed: models (class, config, method, args, options) and scheduler
option sets. The same seed gives the same list."""

import argparse
import json
import random

CLASSES = (
    "FluxTransformer2DModel",
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "T5EncoderModel",
)


def draw(class_name, seed, count=10):
    """`count` cases; each is a dict with class, config, method, args, options, seed."""
    rng = random.Random(f"{class_name}-{seed}")
    return [dict(DRAWERS[class_name](rng, i), **{"class": class_name, "seed": rng.randrange(2**31)}) for i in range(count)]


def case(config, options, method="forward", args=None):
    return {"config": config, "options": options, "method": method, "args": args or {}}


def even_split(rng, total, parts=3):
    """Even numbers, at least 2 each, that add up to `total`."""
    cuts = sorted(rng.sample(range(1, total // 2), parts - 1))
    edges = [0, *cuts, total // 2]
    return [2 * (b - a) for a, b in zip(edges, edges[1:])]


def flux(rng, i):
    head_dim = rng.choice([8, 16, 24, 32])
    layers = rng.choice([(1, 1), (2, 1), (1, 3), (2, 2), (0, 2), (2, 0)])
    config = {
        "attention_head_dim": head_dim,
        "axes_dims_rope": even_split(rng, head_dim),
        "guidance_embeds": i % 2 == 0,
        "in_channels": rng.choice([4, 16, 64]),
        "joint_attention_dim": rng.choice([24, 32, 40]),
        "num_attention_heads": rng.choice([1, 2, 3]),
        "num_layers": layers[0],
        "num_single_layers": layers[1],
        "out_channels": rng.choice([None, 8]),
        "patch_size": rng.choice([1, 1, 2]),
        "pooled_projection_dim": rng.choice([16, 32]),
    }
    options = {"batch": rng.choice([1, 2]), "height": rng.randint(1, 9), "width": rng.randint(1, 9), "text_tokens": rng.randint(1, 20)}
    return case(config, options)


def autoencoder_kl(rng, i):
    blocks = rng.choice([1, 2, 2, 3, 4])
    groups = rng.choice([1, 2, 4])
    channels = [groups * rng.choice([2, 3, 4]) for _ in range(blocks)]
    latent = rng.choice([2, 4, 16])
    config = {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "force_upcast": rng.choice([True, False]),
        "in_channels": rng.choice([1, 3]),
        "latent_channels": latent,
        "layers_per_block": rng.choice([1, 2]),
        "mid_block_add_attention": rng.choice([True, False, True]),
        "norm_num_groups": groups,
        "out_channels": rng.choice([1, 3]),
        "sample_size": 32,
        "scaling_factor": 0.3611,
        "shift_factor": rng.choice([0.1159, None]),
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "use_post_quant_conv": rng.choice([True, False]),
        "use_quant_conv": rng.choice([True, False]),
    }
    options = {"batch": rng.choice([1, 2]), "height": rng.randint(1, 6), "width": rng.randint(1, 6)}
    return case(config, options, method=("encode", "decode")[i % 2])


def clip_text(rng, i):
    heads = rng.choice([1, 2, 4])
    vocab = rng.choice([50, 100])
    config = {
        "bos_token_id": vocab - 2,
        "eos_token_id": (2, vocab - 1, rng.randrange(3, vocab - 1))[i % 3],
        "hidden_act": rng.choice(["quick_gelu", "gelu"]),
        "hidden_size": heads * rng.choice([8, 12]),
        "intermediate_size": rng.choice([32, 48]),
        "layer_norm_eps": rng.choice([1e-5, 1e-6]),
        "max_position_embeddings": rng.choice([32, 77]),
        "num_attention_heads": heads,
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "pad_token_id": 1,
        "projection_dim": rng.choice([16, 24]),
        "vocab_size": vocab,
    }
    options = {
        "batch": rng.choice([1, 2, 3]),
        "mask": rng.random() < 0.5,
        "position_ids": rng.random() < 0.2,
        "tokens": rng.choice([2, 12, config["max_position_embeddings"]]),
    }
    return case(config, options, args={"output_hidden_states": True} if rng.random() < 0.5 else {})


def t5_encoder(rng, i):
    config = {
        "d_ff": rng.choice([32, 64]),
        "d_kv": rng.choice([8, 12]),
        "d_model": rng.choice([24, 32]),
        "feed_forward_proj": ("gated-gelu", "relu", "gated-gelu", "gated-silu", "gelu")[i % 5],
        "layer_norm_epsilon": rng.choice([1e-6, 1e-5]),
        "num_heads": rng.choice([1, 2, 4]),
        "num_layers": rng.choice([1, 2, 3]),
        "relative_attention_max_distance": rng.choice([20, 64, 128]),
        "relative_attention_num_buckets": rng.choice([8, 16, 32]),
        "vocab_size": rng.choice([64, 100]),
    }
    options = {"batch": rng.choice([1, 2, 3]), "mask": rng.random() < 0.5, "tokens": rng.choice([1, 7, 40, 200])}
    return case(config, options, args={"output_hidden_states": True} if rng.random() < 0.3 else {})


DRAWERS = {
    "FluxTransformer2DModel": flux,
    "AutoencoderKL": autoencoder_kl,
    "CLIPTextModel": clip_text,
    "CLIPTextModelWithProjection": clip_text,
    "T5EncoderModel": t5_encoder,
}


def schedules(seed, count=36):
    """Option sets of FlowMatchEulerDiscreteScheduler: dicts with config, steps (or None), args and,
    where given to set_timesteps, sigmas and timesteps. The first 24 cover every combination of the
    kind of shift and the kind of sigmas; all draw the other options at random."""
    rng = random.Random(f"schedules-{seed}")
    shifts = ({}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"})
    kinds = (None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    combinations = [(s, k) for s in shifts for k in kinds]
    return [schedule(rng, i, *combinations[i % len(combinations)]) for i in range(count)]


def schedule(rng, i, shift, kind):
    config = dict(shift)
    if "shift" in config:
        config["shift"] = round(rng.uniform(0.5, 6.0), 3)
    if kind:
        config[kind] = True
    if rng.random() < 0.3:
        config["shift_terminal"] = rng.choice([0.02, 0.1])
    if rng.random() < 0.25:
        config["invert_sigmas"] = True
    if rng.random() < 0.3:
        config["stochastic_sampling"] = True
    if rng.random() < 0.2:
        config["num_train_timesteps"] = rng.choice([100, 500])
    train = config.get("num_train_timesteps", 1000)
    args = {}
    if config.get("use_dynamic_shifting"):
        args["mu"] = round(rng.uniform(0.3, 2.0), 4)
    steps = rng.choice([1, 2, 4, 9, 28, 50]) if not config.get("shift_terminal") else rng.choice([2, 4, 9, 28])
    found = {"config": config, "steps": steps, "args": args}
    given = rng.choice([None, None, "sigmas", "timesteps", "both", "flux"])
    if given == "flux":
        found.update(steps=None, sigmas=[1 - j * (1 - 1 / steps) / max(1, steps - 1) for j in range(steps)])
    elif given:
        values = sorted((round(rng.uniform(0.02, 0.98), 5) for _ in range(steps)), reverse=True)
        if given in ("sigmas", "both"):
            found["sigmas"] = values
        if given in ("timesteps", "both"):
            found["timesteps"] = [round(v * train, 3) for v in values]
        if rng.random() < 0.5:
            found["steps"] = None
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("class_name", metavar="CLASS", choices=(*CLASSES, "FlowMatchEulerDiscreteScheduler"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    a = parser.parse_args()
    scheduler = a.class_name not in CLASSES
    for found in schedules(a.seed, a.count) if scheduler else draw(a.class_name, a.seed, a.count):
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
