"""Pictures of coloured shapes, drawn with signed distance functions, and captions for them.

A scene is plain data, so that it can be stored as JSON and judged later:

    {"background": "white",
     "shapes": [{"shape": "circle", "colour": "red", "size": "large", "place": "top left"}],
     "relation": None}

With two shapes the size and the place of each follow from the relation ("left of", "right of",
"above", "below", or "and", which reads as "left of"). What a caption leaves out has a default:
medium size, the centre, a white background. So "a red circle" has one meaning.

One scene in ten, chosen by a hash of its content, is held out: training never sees it, and
check.py asks for nothing else.

    python draw.py --output sheet.png     # a contact sheet with the captions on standard output
"""

import argparse
import random
import zlib

import numpy as np

IMAGE_SIZE = 64  # pixels; x and y run from -1 to 1 across the picture, y downwards
PIXEL = 2.0 / IMAGE_SIZE

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")

COLOURS = {  # sRGB, 0 to 255
    "red": (220, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (245, 215, 40),
    "green": (40, 160, 70),
    "cyan": (50, 205, 215),
    "blue": (40, 80, 220),
    "purple": (130, 50, 180),
    "pink": (245, 130, 185),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "gray": (150, 150, 150),
    "beige": (235, 215, 175),
    "navy": (25, 35, 90),
}
# Shapes that could not be told from their background.
INVISIBLE = {("white", "white"), ("white", "beige"), ("black", "black"), ("black", "navy")}

SIZES = {"small": 0.27, "medium": 0.38, "large": 0.50}  # radius; half the picture is 1
PLACES = {
    "top left": (-0.45, -0.45), "top": (0.0, -0.45), "top right": (0.45, -0.45),
    "left": (-0.45, 0.0), "center": (0.0, 0.0), "right": (0.45, 0.0),
    "bottom left": (-0.45, 0.45), "bottom": (0.0, 0.45), "bottom right": (0.45, 0.45),
}  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below", "and")
PAIR_OFFSET = 0.45  # distance of each of two shapes from the centre
PAIR_RADIUS = 0.36
PLACE_JITTER = 0.04
SIZE_JITTER = 0.04

_SYNONYMS = {
    "small": ("small", "small", "little"),
    "large": ("large", "large", "big"),
    "gray": ("gray", "gray", "grey"),
}
_PLACE_PHRASES = {
    "top left": ("in the top left",), "top": ("at the top",), "top right": ("in the top right",),
    "left": ("on the left",), "center": ("in the center", "in the middle", ""),
    "right": ("on the right",), "bottom left": ("in the bottom left",),
    "bottom": ("at the bottom",), "bottom right": ("in the bottom right",),
}  # fmt: skip
_RELATION_PHRASES = {
    "left of": ("to the left of", "left of"), "right of": ("to the right of", "right of"),
    "above": ("above",), "below": ("below", "under"), "and": ("and",),
}  # fmt: skip


# --- Signed distances: x, y relative to the centre, r the radius; negative inside -----------------


def _circle(x, y, r):
    return np.hypot(x, y) - 0.92 * r


def _square(x, y, r):
    return np.maximum(np.abs(x), np.abs(y)) - 0.82 * r


def _diamond(x, y, r):
    return (np.abs(x) + np.abs(y) - 1.08 * r) * np.float32(0.70710678)


def _ring(x, y, r):
    return np.abs(np.hypot(x, y) - 0.72 * r) - 0.26 * r


def _cross(x, y, r):
    x, y = np.abs(x), np.abs(y)
    arm, half = 0.98 * r, 0.32 * r
    return np.minimum(np.maximum(x - arm, y - half), np.maximum(x - half, y - arm))


def _triangle(x, y, r):
    # Three half planes of an equilateral triangle that points up; moved to sit in the middle.
    y = y - 0.2 * r
    inner = 0.58 * r
    return np.maximum(y - inner, 0.8660254 * np.abs(x) - 0.5 * y - inner)


def _star(x, y, r):
    # After Inigo Quilez' sdStar5, with y upwards.
    r = 1.05 * r
    k1 = (0.809016994375, -0.587785252292)
    x, y = np.abs(x), -y
    d = 2.0 * np.maximum(k1[0] * x + k1[1] * y, 0.0)
    x, y = x - d * k1[0], y - d * k1[1]
    d = 2.0 * np.maximum(-k1[0] * x + k1[1] * y, 0.0)
    x, y = x + d * k1[0], y - d * k1[1]
    x, y = np.abs(x), y - r
    inner = 0.45
    bx, by = inner * 0.587785252292, inner * 0.809016994375 - 1.0
    h = np.clip((x * bx + y * by) / (bx * bx + by * by), 0.0, r)
    return np.hypot(x - bx * h, y - by * h) * np.sign(y * bx - x * by)


def _heart(x, y, r):
    # After Inigo Quilez' sdHeart, scaled to the radius.
    s = 1.7 * r
    x, y = np.abs(x) / s, 0.56 - y / s
    upper = np.hypot(x - 0.25, y - 0.75) - 0.35355339
    m = 0.5 * np.maximum(x + y, 0.0)
    lower = np.sqrt(np.minimum(x**2 + (y - 1.0) ** 2, (x - m) ** 2 + (y - m) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1.0, upper, lower) * s


_DISTANCE = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star,
    "ring": _ring, "cross": _cross, "heart": _heart, "diamond": _diamond,
}  # fmt: skip

_AXIS = ((np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) * PIXEL - 1.0).astype(np.float32)
_Y, _X = np.meshgrid(_AXIS, _AXIS, indexing="ij")


def distance(shape, cx, cy, radius):
    """Signed distance of every pixel to the shape: [64, 64] float32."""
    return _DISTANCE[shape](_X - np.float32(cx), _Y - np.float32(cy), np.float32(radius))


def coverage(shape, cx, cy, radius):
    """How much of each pixel the shape covers: [64, 64] float32 in 0 to 1."""
    return np.clip(0.5 - distance(shape, cx, cy, radius) / PIXEL, 0.0, 1.0).astype(np.float32)


# --- Scenes ---------------------------------------------------------------------------------------


def held_out(scene):
    """True for the tenth of all scenes that training must not see."""
    parts = [scene["background"], scene["relation"] or ""]
    for s in scene["shapes"]:
        parts += [s["shape"], s["colour"], s["size"], s["place"]]
    return zlib.crc32("|".join(parts).encode()) % 10 == 0


def pair_places(relation):
    """The places of the first and the second of two shapes."""
    if relation in ("left of", "and"):
        return "left", "right"
    return {"right of": ("right", "left"), "above": ("top", "bottom"), "below": ("bottom", "top")}[
        relation
    ]


def random_scene(rng, count=None, fresh=False, two_fraction=0.3):
    """Draws a scene with `rng` (random.Random). fresh: only held-out scenes; else only others."""
    if count is None:
        count = 2 if rng.random() < two_fraction else 1
    while True:
        background = rng.choice(list(BACKGROUNDS))
        colours = [c for c in COLOURS if (c, background) not in INVISIBLE]
        rng.shuffle(colours)
        if count == 1:
            relation, sizes, places = None, [rng.choice(list(SIZES))], [rng.choice(list(PLACES))]
        else:
            relation = rng.choice(RELATIONS)
            sizes, places = ["medium", "medium"], pair_places(relation)
        scene = {
            "background": background,
            "shapes": [
                {"shape": rng.choice(SHAPES), "colour": c, "size": s, "place": p}
                for c, s, p in zip(colours, sizes, places)
            ],
            "relation": relation,
        }
        if held_out(scene) == fresh:
            return scene


def _with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(scene, rng):
    """One of several captions that mean the scene; `rng` chooses."""
    background = rng.choice(_SYNONYMS.get(scene["background"], (scene["background"],)))
    first = scene["shapes"][0]
    if scene["relation"] is None:
        size = rng.choice(_SYNONYMS.get(first["size"], ("medium", "", "")))
        noun = _with_article(f"{size} {first['colour']} {first['shape']}".strip())
        subject = f"{noun} {rng.choice(_PLACE_PHRASES[first['place']])}".strip()
    else:
        second = scene["shapes"][1]
        subject = " ".join((
            _with_article(f"{first['colour']} {first['shape']}"),
            rng.choice(_RELATION_PHRASES[scene["relation"]]),
            _with_article(f"{second['colour']} {second['shape']}"),
        ))  # fmt: skip
    if background == "white" and rng.random() < 0.3:
        text = subject
    elif rng.random() < 0.12:
        text = f"on {_with_article(background)} background, {subject}"
    else:
        text = f"{subject} on {_with_article(background)} background"
    return text + "." if rng.random() < 0.1 else text


def vocabulary():
    """Every word that a caption can hold."""
    words = {"a", "an", "on", "background", "and"}
    words.update(SHAPES, COLOURS, BACKGROUNDS, SIZES, PLACES)
    for phrases in (_SYNONYMS, _PLACE_PHRASES, _RELATION_PHRASES):
        for options in phrases.values():
            words.update(options)
    return sorted({w for phrase in words for w in phrase.split()})


def draw(scene, rng=None):
    """Draws a scene. rng jitters place and size a little; None draws it exactly.

    Returns the picture, [64, 64, 3] float32 in 0 to 1, and for training the nearness to an edge,
    [64, 64] float32: 1 on an outline, 0 away from it.
    """
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    picture[:] = np.array(BACKGROUNDS[scene["background"]], np.float32) / 255.0
    edge = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    pair = scene["relation"] is not None
    for s in scene["shapes"]:
        cx, cy = PLACES[s["place"]]
        radius = PAIR_RADIUS if pair else SIZES[s["size"]]
        if rng is not None:
            cx += rng.uniform(-PLACE_JITTER, PLACE_JITTER)
            cy += rng.uniform(-PLACE_JITTER, PLACE_JITTER)
            radius *= 1.0 + rng.uniform(-SIZE_JITTER, SIZE_JITTER)
        d = distance(s["shape"], cx, cy, radius)
        alpha = np.clip(0.5 - d / PIXEL, 0.0, 1.0)[..., None]
        colour = np.array(COLOURS[s["colour"]], np.float32) / 255.0
        picture += alpha * (colour - picture)
        np.maximum(edge, np.abs(d) < 2.5 * PIXEL, out=edge)
    return picture, edge


def main():
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows, columns = 6, 8
    sheet = np.zeros((rows * IMAGE_SIZE, columns * IMAGE_SIZE, 3), np.float32)
    for i in range(rows * columns):
        scene = random_scene(rng, count=1 if i < 32 else 2)
        y, x = i // columns * IMAGE_SIZE, i % columns * IMAGE_SIZE
        sheet[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] = draw(scene, rng)[0]
        print(caption(scene, rng))
    Image.fromarray((sheet * 255 + 0.5).astype(np.uint8)).save(args.output)


if __name__ == "__main__":
    main()
