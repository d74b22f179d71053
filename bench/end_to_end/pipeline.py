"""A whole Flux pipeline of 12 GB under one budget, and true CFG in lockstep: peaks, bytes, and the same picture.

  pipeline.py --ferry build/release/apps/ferry/ferry [--model DIR] [--memory 2GiB] [--threads 2] [--json FILE]

Makes a pipeline folder with random weights of true shapes (flux-2gb, t5-xxl, clip-l, flux-vae; tokenizers and
scheduler of models/shapes; 12 GB in $TMPDIR, removed afterwards unless --model names where it goes), draws from
it resident and under --memory, with and without true CFG, and checks: latents and pictures are equal bit for
bit, peak resident memory is at most the budget + max(5%, 16 MiB), and a step with two predictions in lockstep
reads half of what two steps with one read. (Within 10%: activations of two leave less room for weights, and each
run plans again with its own measured times.) Exits with 1 if not.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--ferry", default=os.path.join(ROOT, "build/release/apps/ferry/ferry"))
parser.add_argument("--model", help="a folder made by an earlier run, or to be made and kept")
parser.add_argument("--memory", default="2GiB")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--size", type=int, default=256, help="pixels")
parser.add_argument("--json")
args = parser.parse_args()

COMPONENTS = {"text_encoder": ("CLIPTextModel", "clip-l"), "text_encoder_2": ("T5EncoderModel", "t5-xxl"),
              "transformer": ("FluxTransformer2DModel", "flux-2gb"), "vae": ("AutoencoderKL", "flux-vae")}


def make(folder):
    shapes = os.path.join(ROOT, "models/shapes")
    os.makedirs(folder, exist_ok=True)
    for part in ("scheduler", "tokenizer", "tokenizer_2"):
        shutil.copytree(os.path.join(shapes, part), os.path.join(folder, part), dirs_exist_ok=True)
    for seed, (name, (class_name, preset)) in enumerate(COMPONENTS.items()):
        subprocess.run([args.ferry, "random", class_name, "--config", preset, "--dtype", "bf16", "--seed", str(seed),
                        "--out", os.path.join(folder, name), "--quiet"], check=True)
    shutil.copy(os.path.join(shapes, "model_index.json"), folder)


def draw(model, work, name, memory, steps, cfg, kind):
    output = os.path.join(work, f"{name}.{'png' if kind == 'image' else 'safetensors'}")
    stats = os.path.join(work, "stats.json")
    command = [args.ferry, "generate", "--model", model, "--prompt", "a large red circle on a white background",
               "--seed", "7", "--steps", str(steps), "--width", str(args.size), "--height", str(args.size),
               "--max-sequence-length", "64", "--threads", str(args.threads), "--memory", memory,
               "--output-type", kind, "--output", output, "--stats", stats, "--quiet"]
    if cfg:
        command += ["--true-cfg-scale", "3", "--negative-prompt", "a small blue square"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    with open(stats) as handle:
        figures = json.load(handle)
    with open(output, "rb") as handle:
        content = handle.read()
    print(f"{name:24} {figures['total_seconds']:7.1f} s  read {figures['bytes_read'] / 1e9:6.2f} GB  "
          f"peak {figures['peak_rss_bytes'] >> 20} MiB")
    return content, figures


def bytes_of(text):
    units = {"MiB": 1 << 20, "GiB": 1 << 30}
    return int(float(text[:-3]) * units[text[-3:]])


def main():
    work = tempfile.mkdtemp(prefix="ferry-pipeline.", dir=os.environ.get("TMPDIR", "/tmp"))
    model = args.model or os.path.join(work, "pipeline")
    checks = {}
    try:
        if not os.path.exists(os.path.join(model, "model_index.json")):
            make(model)
        runs = {}
        for name, memory, steps, cfg, kind in (
            ("resident", "18GiB", 2, False, "latent"), ("streamed", args.memory, 2, False, "latent"),
            ("resident, picture", "18GiB", 2, False, "image"), ("streamed, picture", args.memory, 2, False, "image"),
            ("resident, cfg", "18GiB", 2, True, "latent"), ("streamed, cfg", args.memory, 2, True, "latent"),
            # Steps after those in which the engine settles on a plan.
            ("streamed, 4 steps", args.memory, 4, False, "latent"), ("streamed, 6 steps", args.memory, 6, False, "latent"),
            ("streamed, cfg, 4 steps", args.memory, 4, True, "latent"), ("streamed, cfg, 6 steps", args.memory, 6, True, "latent"),
        ):
            runs[name] = draw(model, work, name, memory, steps, cfg, kind)
        checks["latents equal"] = runs["resident"][0] == runs["streamed"][0]
        checks["latents equal with cfg"] = runs["resident, cfg"][0] == runs["streamed, cfg"][0]
        checks["pictures equal"] = pixels(runs["resident, picture"][0]) == pixels(runs["streamed, picture"][0])
        budget = bytes_of(args.memory)
        allowed = budget + max(budget // 20, 16 << 20)
        peak = max(figures["peak_rss_bytes"] for name, (_, figures) in runs.items() if name.startswith("streamed"))
        checks[f"peak {peak >> 20} MiB within {allowed >> 20} MiB"] = peak <= allowed
        one = runs["streamed, 6 steps"][1]["bytes_read"] - runs["streamed, 4 steps"][1]["bytes_read"]
        both = runs["streamed, cfg, 6 steps"][1]["bytes_read"] - runs["streamed, cfg, 4 steps"][1]["bytes_read"]
        checks[f"a step of two predictions reads {both / 2e9:.2f} GB, two steps of one {one / 1e9:.2f} GB"] = both <= 0.55 * 2 * one
    finally:
        shutil.rmtree(work)
    for name, good in checks.items():
        print(f"{'yes' if good else 'NO':4} {name}")
    if args.json:
        with open(args.json, "w") as handle:
            json.dump({"checks": checks, "runs": {name: figures for name, (_, figures) in runs.items()}}, handle, indent=1)
    sys.exit(not all(checks.values()))


def pixels(png):
    """The image data of a PNG, without the text chunks, which name files and memory."""
    at, data = 8, b""
    while at < len(png):
        size, kind = int.from_bytes(png[at:at + 4], "big"), png[at + 4:at + 8]
        if kind == b"IDAT":
            data += png[at + 8:at + 8 + size]
        at += 12 + size
    return data


if __name__ == "__main__":
    main()
