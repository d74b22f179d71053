"""Judges pictures of shapes: does a picture show what its prompt asks for?

    python check.py --self-test                                # the judge against drawn pictures
    python check.py --prompts 200 --seed 7 > prompts.jsonl     # fresh prompts, half one, half two
    python check.py --pictures DIR --prompts prompts.jsonl     # judges DIR/ID.png
    python check.py --pipeline models/shapes --prompts 200 --seed 7   # generates with diffusers

Each line of a prompt file is {"id", "prompt", "scene"}; the pictures are named by the id ("003.png")
and are 64 x 64, or a multiple of it. Only scenes that training never saw are asked for.

One shape is right in background, colour, place, shape, and size. Two shapes are right in
background; colours (both, in any order); arrangement (the colours on the right sides); shapes
(both shapes, each on its side). "all" is everything but size, which few people would measure.
"""

import argparse
import json
import os
import random
import sys
from collections import Counter

import numpy as np

import draw

SIZE = draw.IMAGE_SIZE
# Soft overlap with the best template, below which a blob is no shape at all.
LEAST_OVERLAP = 0.75


def _nearest(colour, palette):
    names = list(palette)
    distances = [np.abs(np.array(palette[n], np.float32) / 255.0 - colour).sum() for n in names]
    return names[int(np.argmin(distances))]


def _read_one(picture, background, window):
    """Reads the one shape inside the boolean window: a dict, or None where there is none."""
    difference = np.abs(picture - background).sum(-1) * window
    if difference.max() < 0.12:
        return None
    # The colour is that of the inside: the pixels that differ from the background most.
    core = difference >= 0.85 * np.partition(difference.ravel(), -12)[-12]
    colour_value = np.median(picture[core], axis=0)
    direction = colour_value - background
    # How far each pixel is on the way from the background to the colour.
    alpha = np.clip((picture - background) @ direction / (direction @ direction + 1e-6), 0, 1)
    alpha = alpha * window
    alpha[alpha < 0.1] = 0.0
    if alpha.sum() < 12:
        return None
    best = (-1.0, None, None)
    for shape in draw.SHAPES:
        score, fitted = _fit(shape, alpha)
        if score > best[0]:
            best = (score, shape, fitted)
    overlap, shape, (cx, cy, radius) = best
    return {
        "colour": _nearest(colour_value, draw.COLOURS),
        "shape": shape if overlap >= LEAST_OVERLAP else "unclear",
        "overlap": overlap, "x": cx, "y": cy, "radius": radius,
    }  # fmt: skip


_UNIT = {}  # per shape: area and centroid of the shape of radius 0.5 in the centre


def _unit(shape):
    if shape not in _UNIT:
        c = draw.coverage(shape, 0.0, 0.0, 0.5)
        _UNIT[shape] = (c.sum() / 0.25, (c * draw._X).sum() / c.sum() / 0.5,
                        (c * draw._Y).sum() / c.sum() / 0.5)  # fmt: skip
    return _UNIT[shape]


def _overlap(shape, cx, cy, radius, alpha):
    c = draw.coverage(shape, cx, cy, radius)
    return float(np.minimum(c, alpha).sum() / np.maximum(c, alpha).sum())


def _fit(shape, alpha):
    """Best soft overlap of a template with alpha; starts from equal area and centroid."""
    area, ux, uy = _unit(shape)
    mass = alpha.sum()
    radius = float(np.sqrt(mass / area))
    cx = float((alpha * draw._X).sum() / mass - ux * radius)
    cy = float((alpha * draw._Y).sum() / mass - uy * radius)
    best = (_overlap(shape, cx, cy, radius, alpha), (cx, cy, radius))
    for step in (draw.PIXEL, draw.PIXEL / 2):
        cx, cy, radius = best[1]
        for dx in (-step, 0.0, step):
            for dy in (-step, 0.0, step):
                for dr in (-step / 2, 0.0, step / 2):
                    at = (cx + dx, cy + dy, radius + dr)
                    best = max(best, (_overlap(shape, *at, alpha), at))
    return best


def _background(picture):
    """The background's colour: the median of the picture's rim."""
    rim = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3),
                          picture[2:-2, :2].reshape(-1, 3), picture[2:-2, -2:].reshape(-1, 3)])  # fmt: skip
    return np.median(rim, axis=0)


def read(picture, count):
    """What a [64, 64, 3] picture in 0 to 1 shows, told how many shapes to look for.

    Returns {"background", "shapes": [...], "relation"}; with two shapes they are in the order left
    to right or top to bottom, and the relation is "left of" or "above".
    """
    background = _background(picture)
    result = {"background": _nearest(background, draw.BACKGROUNDS), "relation": None}
    everywhere = np.ones((SIZE, SIZE), bool)
    if count == 1:
        found = [_read_one(picture, background, everywhere)]
    else:
        # Two shapes leave a gap down the middle or across it: cut where there is less paint.
        paint = np.abs(picture - background).sum(-1)
        middle = slice(SIZE // 2 - 3, SIZE // 2 + 3)
        if paint[:, middle].sum() <= paint[middle].sum():
            result["relation"], first = "left of", draw._X < 0
        else:
            result["relation"], first = "above", draw._Y < 0
        found = [_read_one(picture, background, w) for w in (first, ~first)]
    for s in found:
        if s and count == 1:
            s["place"] = min(
                draw.PLACES,
                key=lambda p: (draw.PLACES[p][0] - s["x"]) ** 2 + (draw.PLACES[p][1] - s["y"]) ** 2,
            )
            s["size"] = min(draw.SIZES, key=lambda n: abs(np.log(draw.SIZES[n] / s["radius"])))
    result["shapes"] = found
    return result


def judge(picture, scene):
    """{aspect: right or wrong} of a picture for a scene."""
    wanted, pair = scene["shapes"], scene["relation"] is not None
    seen = read(picture, 2 if pair else 1)
    verdict = {"background": seen["background"] == scene["background"]}
    shapes = [s or {} for s in seen["shapes"]]
    if not pair:
        for aspect in ("colour", "place", "shape", "size"):
            verdict[aspect] = shapes[0].get(aspect) == wanted[0][aspect]
        aspects = ("background", "colour", "place", "shape")
    else:
        if scene["relation"] in ("right of", "below"):
            wanted = wanted[::-1]
        axis = "left of" if scene["relation"] in ("left of", "right of", "and") else "above"
        got = [s.get("colour") for s in shapes]
        colours = [s["colour"] for s in wanted]
        verdict["colours"] = Counter(got) == Counter(colours)
        verdict["arrangement"] = seen["relation"] == axis and got == colours
        verdict["shapes"] = all(s.get("shape") == w["shape"] for s, w in zip(shapes, wanted))
        aspects = ("background", "arrangement", "shapes")
    verdict["all"] = all(verdict[a] for a in aspects)
    return verdict


def make_prompts(count, seed, kind):
    """Fresh prompts: scenes that are held out from training. kind: 1, 2, or 0 for half and half."""
    rng, prompts = random.Random(1000003 + seed), []
    for i in range(count):
        scene = draw.random_scene(rng, count=kind or 1 + i % 2, fresh=True)
        prompts.append({"id": f"{i:03d}", "prompt": draw.caption(scene, rng), "scene": scene})
    return prompts


def report(verdicts):
    """Percentages by number of shapes: {"one": {...}, "two": {...}}."""
    result = {}
    for name, key in (("one", "colour"), ("two", "colours")):
        group = [v for v in verdicts if key in v]
        if group:
            result[name] = {a: round(100.0 * np.mean([v[a] for v in group]), 1) for a in group[0]}
            result[name]["count"] = len(group)
    return result


def load_picture(path):
    from PIL import Image

    image = Image.open(path).convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255.0


def generate(folder, prompts, args):
    """Pictures for the prompts by diffusers' FluxPipeline in float32, [64, 64, 3] each."""
    import torch
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), 20):
        batch = prompts[start : start + 20]
        images = pipeline(
            [p["prompt"] for p in batch], negative_prompt=[""] * len(batch),
            true_cfg_scale=args.true_cfg_scale, num_inference_steps=args.steps,
            height=SIZE, width=SIZE, max_sequence_length=24, output_type="np",
            generator=[torch.Generator().manual_seed(args.seed + int(p["id"])) for p in batch],
        ).images  # fmt: skip
        yield from images


def self_test(count, seed):
    """The judge on pictures drawn right, and on the same pictures asked for something else."""
    rng = random.Random(seed)
    right, fooled = [], []
    for i in range(count):
        scene = draw.random_scene(rng, count=1 + i % 2, fresh=i % 4 < 2)
        other = draw.random_scene(rng, count=1 + i % 2)
        picture = draw.draw(scene, rng)[0]
        right.append(judge(picture, scene))
        same = [(s["colour"], s["shape"]) for s in other["shapes"]] == [
            (s["colour"], s["shape"]) for s in scene["shapes"]
        ]
        if not same:
            fooled.append(judge(picture, other)["all"])
    share = float(np.mean([v["all"] for v in right]))
    print(json.dumps({"right": report(right), "all": share, "fooled": float(np.mean(fooled))}))
    return share >= 0.99 and np.mean(fooled) <= 0.01


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--prompts", help="how many to make, or a file of them")
    parser.add_argument("--shapes", type=int, choices=(0, 1, 2), default=0,
                        help="shapes in a made prompt; 0 takes turns")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", help="folder of pictures to judge")
    parser.add_argument("--pipeline", help="diffusers folder to generate with")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--true-cfg-scale", type=float, default=2.0)
    parser.add_argument("--save", help="folder for the generated pictures")
    parser.add_argument("--verbose", action="store_true", help="print what is wrong")
    args = parser.parse_args()
    if args.self_test:
        sys.exit(0 if self_test(1000, args.seed) else 1)
    if not args.prompts:
        parser.error("--prompts is needed: a number or a file")
    if args.prompts.isdigit():
        prompts = make_prompts(int(args.prompts), args.seed, args.shapes)
    else:
        with open(args.prompts) as f:
            prompts = [json.loads(line) for line in f if line.strip()]
    if args.pipeline:
        pictures = generate(args.pipeline, prompts, args)
    elif args.pictures:
        pictures = (load_picture(os.path.join(args.pictures, p["id"] + ".png")) for p in prompts)
    else:
        for p in prompts:
            print(json.dumps(p))
        return
    verdicts = []
    for p, picture in zip(prompts, pictures):
        verdicts.append(judge(picture, p["scene"]))
        if args.verbose and not verdicts[-1]["all"]:
            wrong = [a for a, ok in verdicts[-1].items() if not ok and a != "all"]
            print(f"{p['id']} {p['prompt']!r}: {', '.join(wrong)}", file=sys.stderr)
        if args.save:
            from PIL import Image

            os.makedirs(args.save, exist_ok=True)
            pixels = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
            Image.fromarray(pixels).save(os.path.join(args.save, p["id"] + ".png"))
    print(json.dumps(report(verdicts)))


if __name__ == "__main__":
    main()
