#!/usr/bin/env python
"""Writes what diffusers' layerwise casting (float8_e4m3fn storage, float32 compute) gives for the models
of tests/fixtures/models: tests/fixtures/layerwise_casting/<fixture>.safetensors.

Usage: tools/parity/layerwise_casting.py [OUT]"""

import json
import sys
from pathlib import Path

import common
import torch
from reference import evaluate
from safetensors.torch import load_file, save_file

FIXTURES = ["FluxTransformer2DModel-0", "AutoencoderKL-0", "CLIPTextModel-0", "T5EncoderModel-0"]


def main():
    from diffusers.hooks import apply_layerwise_casting
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    common.quiet()
    models = common.ROOT / "tests/fixtures/models"
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else common.ROOT / "tests/fixtures/layerwise_casting"
    out.mkdir(parents=True, exist_ok=True)
    for name in FIXTURES:
        cls = common.find_class(name.rsplit("-", 1)[0])
        model = cls.from_pretrained(models / name, torch_dtype=torch.float32).eval()
        patterns = DEFAULT_SKIP_MODULES_PATTERN
        for declared in ("_keep_in_fp32_modules", "_skip_layerwise_casting_patterns"):
            patterns += tuple(getattr(model, declared, None) or ())
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, patterns)
        arguments = json.loads((models / name / "args.json").read_text())
        outputs = evaluate(model, load_file(models / name / "inputs.safetensors"),
                           arguments.get("method", "forward"), arguments.get("args"))
        save_file({key: value.clone().contiguous() for key, value in outputs.items()}, out / f"{name}.safetensors")
        print(name, {key: tuple(value.shape) for key, value in outputs.items()})


if __name__ == "__main__":
    main()
