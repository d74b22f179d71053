#!/usr/bin/env python
"""A stand-in for the ferry binary, in Python: forward, schedule, tokenize, generate and inspect
--traits with ferry's options. It checks the comparing tools themselves: with it everything has to
agree (`run.py --ferry tools/parity/python_ferry.py`), and with FERRY_PERTURB=<submodule path> in the
environment that submodule's output is off by one part in a thousand and has to be found.
`selftest.sh` does both."""

import argparse
import json
import os
from pathlib import Path

import common
import find_difference
import reference
import schedules
import small_tokenizers
import tiny_pipeline
import torch
import traits


def arguments(items):
    return {k: json.loads(v) for k, _, v in (item.partition("=") for item in items)}


def nudge(module, _, output):
    if torch.is_tensor(output):
        return output * 1.001
    return (output[0] * 1.001, *output[1:])


def forward(a):
    name = common.load_json(Path(a.folder) / "args.json")["class"]
    model = common.find_class(name).from_pretrained(a.folder, torch_dtype=torch.float32).eval()
    path = os.environ.get("FERRY_PERTURB")
    if path in dict(model.named_modules()):
        model.get_submodule(path).register_forward_hook(nudge)
    inputs, args = common.load_tensors(a.inputs), arguments(a.arg)
    tensors = {}
    if a.dump:
        tensors = {names[0]: value for _, names, value in find_difference.recorded(model, inputs, a.method, args)}
    common.save_tensors({**tensors, **reference.evaluate(model, inputs, a.method, args)}, a.output)


def schedule(a):
    config = {k: v for k, v in common.load_json(a.config).items() if not k.startswith("_")}
    made = schedules.trajectory(config, common.load_tensors(a.inputs), a.steps, arguments(a.arg))
    if os.environ.get("FERRY_PERTURB"):
        made["trajectory"] = made["trajectory"] * 1.00001
    common.save_tensors(made, a.output)


def tokenize(a):
    texts = [json.loads(line) for line in Path(a.input).read_text().splitlines()]
    ids = small_tokenizers.ids(a.folder, texts, a.max_length)
    if os.environ.get("FERRY_PERTURB"):
        ids[7] = [*ids[7], 0]
    Path(a.output).write_text("".join(json.dumps(item) + "\n" for item in ids))


def generate(a):
    from PIL import Image

    call = {"prompt": a.prompt if len(a.prompt) > 1 else a.prompt[0]}
    names = ("negative_prompt", "true_cfg_scale", "height", "width", "guidance_scale", "max_sequence_length")
    call.update({name: getattr(a, name) for name in names if getattr(a, name) is not None})
    call.update(num_inference_steps=a.steps, num_images_per_prompt=a.num_images)
    image = tiny_pipeline.generate(tiny_pipeline.load(a.model), call, a.seed)["image"]
    if os.environ.get("FERRY_PERTURB"):
        image = image * 0.98
    for i, picture in enumerate((image.numpy() * 255).round().astype("uint8")):
        Image.fromarray(picture).save(Path(a.output).with_stem(f"{Path(a.output).stem}-{i}"))


def inspect(a):
    print(json.dumps(traits.python_traits(a.traits)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(function, positional=(), options=()):
        made = commands.add_parser(function.__name__, help=f"as ferry {function.__name__}")
        for name in positional:
            made.add_argument(name)
        for name in options:
            made.add_argument(f"--{name}")
        made.set_defaults(function=function)
        return made

    p = command(forward, ["folder"], ["inputs", "output", "dtype", "threads", "dump"])
    p.add_argument("--method", default="forward")
    p.add_argument("--arg", action="append", default=[])
    p = command(schedule, ["config"], ["inputs", "output"])
    p.add_argument("--steps", type=int)
    p.add_argument("--arg", action="append", default=[])
    p = command(tokenize, ["folder"], ["input", "output"])
    p.add_argument("--max-length", type=int)
    p = command(generate, [], ["model", "negative-prompt", "dtype", "threads", "output"])
    p.add_argument("--prompt", action="append")
    for name in ("true-cfg-scale", "guidance-scale"):
        p.add_argument(f"--{name}", type=float)
    for name in ("height", "width", "steps", "seed", "max-sequence-length"):
        p.add_argument(f"--{name}", type=int)
    p.add_argument("--num-images", type=int, default=1)
    command(inspect, [], ["traits"])
    a = parser.parse_args()
    common.quiet()
    a.function(a)


if __name__ == "__main__":
    main()
