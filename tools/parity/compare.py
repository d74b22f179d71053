#!/usr/bin/env python
"""Compares ferry with written references. As a program: one reference folder against `ferry forward`,
or two safetensors files with each other."""

import argparse
import json
import tempfile
from pathlib import Path

import common
import torch

MODEL_BOUND = 1e-5
SCHEDULE_BOUND = 1e-6
PICTURE_BOUND = 1  # of 255


def error(actual, expected):
    """Max absolute difference relative to the largest magnitude of `expected`; inf where shapes
    differ or anything is not finite."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.double(), expected.double()
    difference = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    found = difference / scale if scale else difference
    return found if found == found else float("inf")


def worst(actual, expected):
    """(error, name) of the worst tensor of `expected`; a missing name counts as inf."""
    errors = []
    for name, tensor in expected.items():
        errors.append((error(actual[name], tensor) if name in actual else float("inf"), name))
    found, name = max(errors)
    if name not in actual:
        name += f" (missing; ferry wrote {', '.join(sorted(actual)) or 'nothing'})"
    elif actual[name].shape != expected[name].shape:
        name += f" (shape {list(actual[name].shape)}, expected {list(expected[name].shape)})"
    return found, name


def forward(ferry, folder, extra=()):
    """Runs `ferry forward` on a reference folder; gives its named outputs."""
    folder = Path(folder)
    described = common.load_json(folder / "args.json")
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out.safetensors"
        method = [] if described["method"] == "forward" else ["--method", described["method"]]
        common.run_ferry(
            ferry, "forward", folder, "--inputs", folder / "inputs.safetensors", "--output", output,
            "--dtype", "fp32", "--threads", 1, *method, *common.flags(described["args"]), *extra,
        )  # fmt: skip
        return common.load_tensors(output)


def model(ferry, folder):
    """(error, name of the worst output) of `ferry forward` on a reference folder."""
    return worst(forward(ferry, folder), common.load_tensors(Path(folder) / "outputs.safetensors"))


def schedule(ferry, case, inputs, expected):
    """(error, name) of `ferry schedule` on one case of configs.schedules()."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **case["config"]}
        common.save_json(config, scratch / "scheduler_config.json")
        common.save_tensors(inputs, scratch / "in.safetensors")
        steps = [] if case["steps"] is None else ["--steps", case["steps"]]
        common.run_ferry(
            ferry, "schedule", scratch / "scheduler_config.json", "--inputs", scratch / "in.safetensors",
            "--output", scratch / "out.safetensors", *steps, *common.flags(case["args"]),
        )  # fmt: skip
        return worst(common.load_tensors(scratch / "out.safetensors"), expected)


def tokens(ferry, folder, texts, expected, max_length=None):
    """Indices of `texts` whose ids differ, with ferry's ids: [(index, ids)]."""
    with tempfile.TemporaryDirectory() as scratch:
        lines, ids = Path(scratch) / "lines.jsonl", Path(scratch) / "ids.jsonl"
        lines.write_text("".join(json.dumps(text) + "\n" for text in texts))
        limit = [] if max_length is None else ["--max-length", max_length]
        common.run_ferry(ferry, "tokenize", folder, "--input", lines, "--output", ids, *limit)
        found = [json.loads(line) for line in ids.read_text().splitlines()]
    if len(found) != len(texts):
        raise common.FerryError(f"ferry tokenize: {len(found)} lines for {len(texts)} strings")
    return [(i, f) for i, (f, e) in enumerate(zip(found, expected)) if f != e]


GENERATE_OPTIONS = {
    "negative_prompt": "--negative-prompt",
    "true_cfg_scale": "--true-cfg-scale",
    "height": "--height",
    "width": "--width",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "num_images_per_prompt": "--num-images",
    "max_sequence_length": "--max-sequence-length",
}


def generate(ferry, folder, call, seed):
    """The pictures of `ferry generate` as uint8 [n, height, width, 3]."""
    import numpy
    from PIL import Image

    prompts = call["prompt"] if isinstance(call["prompt"], list) else [call["prompt"]]
    options = [part for prompt in prompts for part in ("--prompt", prompt)]
    for name, option in GENERATE_OPTIONS.items():
        if name in call:
            options += [option, call[name]]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "x.png"
        common.run_ferry(
            ferry, "generate", "--model", folder, *options, "--seed", seed, "--dtype", "fp32", "--threads", 1, "--output", output
        )
        # several pictures are numbered: x-0.png, x_1.png, x2.png; the numbers give the order
        digits = lambda path: int("".join(c for c in path.stem if c.isdigit()) or 0)  # noqa: E731
        files = sorted(Path(scratch).glob("x*.png"), key=digits)
        if not files:
            raise common.FerryError("ferry generate: wrote no x*.png")
        return torch.from_numpy(numpy.stack([numpy.asarray(Image.open(f).convert("RGB")) for f in files]))


def pictures(actual, expected):
    """Largest difference in steps of 1/255 between uint8 pictures and float ones in 0..1."""
    # rounded as diffusers' VaeImageProcessor.numpy_to_pil does
    rounded = (expected.numpy() * 255).round().astype("uint8")
    if tuple(actual.shape) != rounded.shape:
        return float("inf")
    return int((actual.int() - torch.from_numpy(rounded).int()).abs().max())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", help="folder of reference.py, or a safetensors file (expected)")
    parser.add_argument("actual", nargs="?", help="safetensors file; without it `ferry forward` is run")
    parser.add_argument("--ferry", type=Path, default=common.DEFAULT_FERRY)
    parser.add_argument("--bound", type=float, default=MODEL_BOUND)
    a = parser.parse_args()
    if a.actual:
        expected, actual = common.load_tensors(a.reference), common.load_tensors(a.actual)
    else:
        expected = common.load_tensors(Path(a.reference) / "outputs.safetensors")
        try:
            actual = forward(a.ferry, a.reference)
        except common.FerryError as problem:
            common.die(problem)
    missed = False
    for name, tensor in expected.items():
        found, label = worst(actual, {name: tensor})
        missed |= found > a.bound
        print(f"{'MISS' if found > a.bound else 'ok':4} {found:9.2e} {label}")
    raise SystemExit(missed)


if __name__ == "__main__":
    main()
