"""Does a weights budget hold? Twenty budgets, three models, two resolutions, on the CPU.

  budgets.py --ferry build/release/apps/ferry/ferry [--models flux t5 vae] [--budgets 20] [--threads 2] [--json FILE]

For each: peak RSS - (peak RSS of the resident run - bytes of the weights) is at most the budget and the larger of
5% of it and 16 MiB; the output equals the resident one bit for bit; and a budget below the least is refused with
a message that names the least, which then works. Budgets go from that least to all weights in equal ratios. Each
run is a process of its own with three forwards. Exits with 1 where one does not hold. Writes 3 GB to TMPDIR.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
MIB = 1 << 20

T5_LARGE = {
    "d_ff": 2816, "d_kv": 64, "d_model": 1024, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-06,
    "model_type": "t5", "num_heads": 16, "num_layers": 24, "pad_token_id": 0, "vocab_size": 32128,
}
FLUX = """
image, text = map(int, size.split("+"))
side = int(image ** 0.5)
ids = torch.zeros(side, side, 3)
ids[..., 1] += torch.arange(side)[:, None]
ids[..., 2] += torch.arange(side)[None, :]
tensors = dict(hidden_states=torch.randn(1, image, 64), encoder_hidden_states=torch.randn(1, text, 4096),
               pooled_projections=torch.randn(1, 768), timestep=torch.full((1,), 0.5),
               img_ids=ids.reshape(-1, 3).contiguous(), txt_ids=torch.zeros(text, 3))
"""
# name: class, config, sizes, how inputs are made, further options of `ferry forward`
MODELS = {
    "flux": ("FluxTransformer2DModel", "flux-2gb", ["256+64", "1024+256"], FLUX, []),
    "t5": ("T5EncoderModel", T5_LARGE, ["128", "512"], "tensors = dict(input_ids=torch.randint(32128, (1, int(size))))", []),
    "vae": ("AutoencoderKL", "flux-vae", ["32", "64"], "tensors = dict(z=torch.randn(1, 16, int(size), int(size)))",
            ["--method", "decode"]),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--ferry", default=os.path.join(ROOT, "build/release/apps/ferry/ferry"))
parser.add_argument("--python", default=os.path.join(ROOT, "tools/parity/.venv/bin/python"))
parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
parser.add_argument("--budgets", type=int, default=20)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json")
args = parser.parse_args()


def make_model(name, folder):
    cls, config, _, _, _ = MODELS[name]
    if isinstance(config, dict):
        path = folder + ".json"
        with open(path, "w") as handle:
            json.dump({"_class_name": cls, **config}, handle)
        config = path
    subprocess.run([args.ferry, "random", cls, "--config", config, "--dtype", "bf16", "--seed", "1", "--out", folder,
                    "--quiet"], check=True)


def make_inputs(name, size, path):
    script = f"import torch\nfrom safetensors.torch import save_file\ntorch.manual_seed(0)\nsize = {size!r}\n"
    script += MODELS[name][3] + f"\nsave_file(tensors, {path!r})"
    subprocess.run([args.python, "-c", script], check=True)


def forward(name, folder, inputs, output, budget=None, repeat=3):
    """Its figures, and what it says where it fails."""
    stats = os.path.join(os.path.dirname(folder), "stats.json")
    command = [args.ferry, "forward", folder, "--inputs", inputs, "--output", output, "--threads", str(args.threads), "--repeat", str(repeat),
               "--stats", stats, "--quiet", *MODELS[name][4]]
    if budget is not None:
        command += ["--weights-memory", str(budget)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr.strip()
    with open(stats) as handle:
        return json.load(handle), ""


def bytes_of(text):
    units = {"KiB": 1 << 10, "MiB": MIB, "GiB": 1 << 30, "B": 1}
    number, unit = text.split()
    return int(float(number) * units[unit]) + 1


def same(a, b):
    with open(a, "rb") as one, open(b, "rb") as other:
        return one.read() == other.read()


def main():
    work = tempfile.mkdtemp(prefix="ferry-budgets.", dir=os.environ.get("TMPDIR", "/tmp"))
    rows, wrong = [], 0
    try:
        for name in args.models:
            folder = os.path.join(work, name)
            make_model(name, folder)
            for size in MODELS[name][2]:
                inputs = os.path.join(work, f"{name}-{size}.safetensors")
                expected, got = os.path.join(work, "expected"), os.path.join(work, "got")
                make_inputs(name, size, inputs)
                resident, error = forward(name, folder, inputs, expected)
                if not resident:
                    sys.exit(error)
                weights = resident["weight_bytes"]
                base = resident["peak_rss_bytes"] - weights
                refused, message = forward(name, folder, inputs, got, budget=MIB)
                stated = re.search(r"at least ([\d.]+ \w+)", message)
                if refused or not stated:
                    sys.exit(f"{name}: a budget of 1 MiB: {message or 'it ran'}")
                least = bytes_of(stated.group(1))
                steps = max(args.budgets - 1, 1)
                for i in range(args.budgets):
                    budget = int(least * (weights / least) ** (i / steps))
                    run, error = forward(name, folder, inputs, got, budget=budget)
                    if not run:
                        wrong += 1
                        print(f"{name} {size} {budget / MIB:.0f} MiB: {error}")
                        continue
                    held = run["peak_rss_bytes"] - base
                    allowed = budget + max(budget // 20, 16 * MIB)
                    row = {"model": name, "size": size, "budget": budget, "held": held, "over": held - budget,
                           "engine": run["offload"]["peak_weights_bytes"], "equal": same(expected, got),
                           "holds": held <= allowed and run["offload"]["peak_weights_bytes"] <= budget}
                    wrong += not (row["holds"] and row["equal"])
                    rows.append(row)
                    print(f"{name:5} {size:9} budget {budget / MIB:7.1f} MiB  held {held / MIB:7.1f}  of it weights "
                          f"{row['engine'] / MIB:7.1f}  {'' if row['holds'] else 'OVER'}{'' if row['equal'] else 'DIFFERS'}",
                          flush=True)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    worst = max(rows, key=lambda row: row["over"] - max(row["budget"] // 20, 16 * MIB))
    print(f"{len(rows)} budgets, {wrong} wrong; closest to the bound: {worst['model']} {worst['size']} in "
          f"{worst['budget'] / MIB:.0f} MiB, {worst['over'] / MIB:+.1f} MiB")
    if args.json:
        with open(args.json, "w") as handle:
            json.dump({"what": __doc__.splitlines()[0], "threads": args.threads, "rows": rows}, handle, indent=1)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
