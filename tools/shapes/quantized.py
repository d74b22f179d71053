"""What quantizing the shapes model costs: the same prompts and seeds in each scheme, judged by check.py.

    python quantized.py --ferry build/release/apps/ferry/ferry --prompts 200 --seed 11 [--out FILE.md]

Schemes of `ferry quantize` are quantized on the fly; GGUF types go through `ferry convert` to a file that
--transformer names. Prints a table: percent right, size of the transformer, peak memory, time of a step
against the plain one (bfloat16), and the signal-to-noise ratio of the weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import check

MODEL = Path(__file__).resolve().parents[2] / "models/shapes"
SCHEMES = ["bf16", "int8wo", "int8da8w", "fp8wo", "int4wo:32", "nf4", "Q8_0", "Q4_0"]
BATCH = 50


def run(ferry, *arguments):
    done = subprocess.run([str(ferry), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"ferry {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")


def prepare(ferry, scheme, work):
    """Arguments of generate for a scheme, bytes of the transformer's weights, and their SQNR in dB."""
    if scheme == "bf16":
        plain = MODEL / "transformer"
        return [], sum(f.stat().st_size for f in plain.glob("*.safetensors")), None
    name, _, group = scheme.partition(":")
    stats = work / f"{name}.json"
    if name[0] == "Q":
        file = work / f"{name}.gguf"
        run(ferry, "convert", MODEL / "transformer", "--gguf-type", name, "--out", file, "--quiet")
        return ["--transformer", file], file.stat().st_size, None
    out = work / name
    grouped = ["--group-size", group] if group else []
    run(ferry, "quantize", MODEL / "transformer", "--scheme", name, *grouped, "--out", out,
        "--stats", stats, "--quiet")  # fmt: skip
    layers = json.loads(stats.read_text())["layers"]
    sqnr = np.average([layer["sqnr_db"] for layer in layers], weights=[layer["bytes_before"] for layer in layers])
    return ["--quantize", scheme], sum(f.stat().st_size for f in out.glob("*.safetensors")), sqnr


def pictures(ferry, prompts, seed, extra, work):
    """Pictures of the prompts, and the statistics of the runs."""
    found, stats = [], []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        texts = [part for p in batch for part in ("--prompt", p["prompt"])]
        run(ferry, "generate", "-m", MODEL, *texts, "--negative-prompt", "", "--true-cfg-scale", 2, "--steps", 8,
            "--width", 64, "--height", 64, "--max-sequence-length", 24, "--seed", seed + start, "--dtype", "bf16",
            "--output", work / "p.png", "--stats", work / "stats.json", "--quiet", *extra)  # fmt: skip
        written = json.loads((work / "stats.json").read_text())
        stats.append(written)
        found += [check.load_picture(file) for file in written["files"]]
    return found, stats


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ferry", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args()
    prompts = check.make_prompts(args.prompts, args.seed, 1)
    rows = ["| scheme | background | colour | place | shape | transformer | peak memory | step | weights' SQNR |",
            "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    plain_step = None
    for scheme in args.schemes:
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            extra, size, sqnr = prepare(args.ferry, scheme, work)
            found, stats = pictures(args.ferry, prompts, args.seed, extra, work)
        right = check.report([check.judge(picture, p["scene"]) for picture, p in zip(found, prompts)])["one"]
        step = min(s["stage_seconds"]["denoise"] for s in stats)
        plain_step = plain_step or step
        peak = max(s["peak_rss_bytes"] for s in stats) / 2**20
        rows.append(
            f"| {scheme} | {right['background']} | {right['colour']} | {right['place']} | {right['shape']} | "
            f"{size / 1e6:.2f} MB | {peak:.0f} MiB | {step / plain_step:.2f} | {'' if sqnr is None else f'{sqnr:.1f} dB'} |"
        )
        print(rows[-1], file=sys.stderr, flush=True)
    table = "\n".join(rows) + "\n"
    print(table)
    if args.out:
        args.out.write_text(table)


if __name__ == "__main__":
    main()
