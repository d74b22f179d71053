"""flux-2gb with random weights: ferry against Python diffusers, alternating in one run.

  run.py --ferry build/release/apps/ferry/ferry [--rounds 3] [--threads 1] [--tokens 256+64] ...

Each round runs every mode once as a process of its own; a mode's figure is the median over the
rounds of the median of its forwards after the first. Prints a table with ratios and peak memory, and
whether the outputs are equal; --json FILE keeps the figures.

--memory-limit 1229MiB runs each process in a memory cgroup of that size (v1 or v2, as root); one that
the kernel kills is reported as killed. Python then loads by mapping, since the whole model would not fit.
--disk-rate 1300MB/s holds the disk to that rate for every process alike (as root; cgroup v1 blkio or v2 io):
what streaming gains depends on how long reading takes beside computing, and disks differ.

A mode ferry_512 streams under 512 MiB; _io500 behind it reads at most 500 MB/s, and _packs from a lossless
pack, which `ferry pack` has to have made of --model:

  run.py --model DIR --threads 2 --tokens 256+64 --repeat 9 --modes ferry_512_io500 ferry_512_io500_packs

py_ferry is Python's model on ferry's engine (the Python package of the same build) under 512 MiB.

A scheme of `ferry quantize` at the end has the weights quantized (once, into the pack cache): ferry_int8wo
resident, ferry_256_io500_int8wo streamed; the difference of the latter is to the former.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--ferry", default=os.path.join(ROOT, "build/release/apps/ferry/ferry"))
parser.add_argument("--python", default=os.path.join(ROOT, "tools/parity/.venv/bin/python"))
parser.add_argument("--limit", default=os.path.join(ROOT, "build/release/bench/end_to_end/bench_limit"))
parser.add_argument("--model", help="a flux-2gb folder; made and removed if not given")
parser.add_argument("--tokens", nargs="*", default=["256+64", "1024+256"], help="image+text tokens")
parser.add_argument("--threads", type=int, nargs="*", default=[1])
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--repeat", type=int, default=4)
parser.add_argument("--modes", nargs="*", default=["ferry", "py_resident", "ferry_512", "py_hook", "py_group", "limit"])
parser.add_argument("--memory-limit", help="bytes, or with MiB or GiB")
parser.add_argument("--disk-rate", help="bytes a second, or with MB/s")
parser.add_argument("--json")
args = parser.parse_args()


def make_inputs(path, image, text):
    script = f"""
import torch
from safetensors.torch import save_file
torch.manual_seed(0)
side = int({image} ** 0.5)
ids = torch.zeros(side, side, 3)
ids[..., 1] += torch.arange(side)[:, None]
ids[..., 2] += torch.arange(side)[None, :]
save_file(dict(hidden_states=torch.randn(1, {image}, 64), encoder_hidden_states=torch.randn(1, {text}, 4096),
               pooled_projections=torch.randn(1, 768), timestep=torch.full((1,), 0.5),
               img_ids=ids.reshape(-1, 3).contiguous(), txt_ids=torch.zeros({text}, 3)), {path!r})
"""
    subprocess.run([args.python, "-c", script], check=True)


class Limits:
    """A cgroup for the processes that are run with it: so much memory, so fast a disk below `folder`."""

    def __init__(self, memory, disk_rate, folder):
        self.memory_is_limited = bool(memory)
        self.folders = []
        old = os.path.isdir("/sys/fs/cgroup/memory")
        if memory:
            units = {"MiB": 1 << 20, "GiB": 1 << 30}
            size = int(float(memory[:-3]) * units[memory[-3:]]) if memory[-3:] in units else int(memory)
            self.make("memory" if old else "")
            self.write("memory.limit_in_bytes" if old else "memory.max", size)
            swap = "memory.swappiness" if old else "memory.swap.max"
            if os.path.exists(os.path.join(self.folders[-1], swap)):
                self.write(swap, 0)
        if disk_rate:
            rate = int(float(disk_rate[:-4]) * 1e6) if disk_rate.endswith("MB/s") else int(disk_rate)
            device = os.stat(folder).st_dev
            disk = f"{os.major(device)}:{os.minor(device)}"
            self.make("blkio" if old else "")
            if old:
                self.write("blkio.throttle.read_bps_device", f"{disk} {rate}")
            else:
                self.write("io.max", f"{disk} rbps={rate}")

    def make(self, controller):
        folder = os.path.join("/sys/fs/cgroup", controller, f"ferry-bench-{os.getpid()}")
        if folder not in self.folders:
            os.mkdir(folder)
            self.folders.append(folder)

    def write(self, name, value):
        with open(os.path.join(self.folders[-1], name), "w") as handle:
            handle.write(str(value))

    def run(self, command, env):
        if self.folders:
            enter = "".join(f"echo $$ > {folder}/cgroup.procs && " for folder in self.folders)
            command = ["sh", "-c", enter + 'exec "$@"', "sh", *command]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    def remove(self):
        for folder in self.folders:
            os.rmdir(folder)


def steady(run):
    """Forwards after the first, and after those in which the engine tries what is fastest."""
    seconds = run["forward_seconds"]
    return seconds[1:] if len(seconds) < 8 else seconds[5:]


def failure(done):
    return {"error": "killed, out of memory" if done.returncode == -9 else done.stderr[-500:]}


def run_mode(mode, model, inputs, threads, work, limits):
    out = os.path.join(work, mode + ".safetensors")
    env = dict(os.environ, OMP_NUM_THREADS=str(threads))
    if mode.startswith("py_"):
        command = [args.python, os.path.join(HERE, "peers.py"),
                   {"py_resident": "resident", "py_hook": "hook", "py_group": "group_disk",
                    "py_disk_offload": "disk_offload", "py_ferry": "ferry"}[mode], model, inputs,
                   "--output", out, "--threads", str(threads), "--repeat", str(args.repeat)]
        if mode != "py_resident":
            command.append("--cold")
        if limits.memory_is_limited or mode == "py_ferry":
            command.append("--mmap")
        if mode == "py_ferry":
            package = os.path.join(os.path.dirname(os.path.abspath(args.ferry)), "..", "..", "python")
            env["PYTHONPATH"] = os.path.normpath(package)
        done = limits.run(command, env)
        if done.returncode:
            return failure(done)
        return json.loads(done.stdout.strip().splitlines()[-1])
    if mode == "limit":
        done = limits.run([args.limit, model, inputs, "512MiB", str(threads), "5", "3"], env)
        return json.loads(done.stdout) if done.returncode == 0 else failure(done)
    stats = os.path.join(work, "stats.json")
    command = [args.ferry, "forward", model, "--inputs", inputs, "--output", out, "--threads", str(threads),
               "--repeat", str(args.repeat), "--stats", stats]
    for option in mode.split("_")[1:]:
        if option.isdigit():
            command += ["--weights-memory", option + "MiB", "--cold"]
        elif option == "packs":
            command += ["--use-packs"]
        elif option.startswith("io"):
            command += ["--io-limit", option[2:] + "MB/s"]
        else:
            command += ["--quantize", option]
    done = limits.run(command, env)
    if done.returncode:
        return failure(done)
    with open(stats) as handle:
        return json.load(handle)


def main():
    work = tempfile.mkdtemp(prefix="ferry-bench.", dir=os.environ.get("TMPDIR", "/tmp"))
    model = args.model or os.path.join(work, "flux-2gb")
    results = []
    limits = Limits(args.memory_limit, args.disk_rate, args.model or work)
    try:
        if not args.model:
            subprocess.run([args.ferry, "random", "FluxTransformer2DModel", "--config", "flux-2gb", "--dtype", "bf16",
                            "--seed", "1", "--out", model], check=True)
        for tokens in args.tokens:
            image, text = map(int, tokens.split("+"))
            inputs = os.path.join(work, f"inputs-{tokens}.safetensors")
            make_inputs(inputs, image, text)
            for threads in args.threads:
                figures = {mode: [] for mode in args.modes}
                for index in range(args.rounds):
                    for mode in args.modes:
                        if mode == "limit" and index > 0:
                            continue
                        figures[mode].append(run_mode(mode, model, inputs, threads, work, limits))
                        print(f"  round {index + 1} {tokens} t{threads} {mode}: {json.dumps(figures[mode][-1])[:300]}",
                              file=sys.stderr)
                row = {"tokens": tokens, "threads": threads, "modes": {}}
                for mode, runs in figures.items():
                    good = [r for r in runs if "error" not in r]
                    if mode == "limit" or not good:
                        row["modes"][mode] = runs[0] if runs else {}
                        continue
                    row["modes"][mode] = {
                        "median_s": statistics.median(statistics.median(steady(r)) for r in good),
                        "min_s": min(min(steady(r)) for r in good),
                        "first_s": statistics.median(r["forward_seconds"][0] for r in good),
                        "peak_rss_mib": max(r["peak_rss_bytes"] for r in good) >> 20,
                    }
                equal = {}
                for mode in args.modes:
                    path = os.path.join(work, mode + ".safetensors")
                    # A quantized model streamed equals itself resident, not the plain one.
                    resident = "ferry_" + mode.rsplit("_", 1)[-1]
                    base = os.path.join(work, (resident if resident in args.modes and mode != resident else "ferry") + ".safetensors")
                    if mode not in ("ferry", "limit") and os.path.exists(path) and os.path.exists(base):
                        code = ("import sys, torch; from safetensors.torch import load_file as l; a, b = (l(p)['sample'].float() "
                                "for p in sys.argv[1:]); print(float((a - b).abs().max() / b.abs().max()))")
                        done = subprocess.run([args.python, "-c", code, base, path],
                                              capture_output=True, text=True)
                        equal[mode] = float(done.stdout or "nan")
                row["difference_to_ferry_resident"] = equal
                results.append(row)
                print_row(row)
    finally:
        subprocess.run(["rm", "-rf", work])
        limits.remove()
    if args.json:
        with open(args.json, "w") as handle:
            json.dump(results, handle, indent=1)


def print_row(row):
    print(f"\n{row['tokens']} tokens, {row['threads']} thread(s)")
    modes = row["modes"]
    for mode, figure in modes.items():
        if "median_s" in figure:
            print(f"  {mode:12} median {figure['median_s']:.3f} s  min {figure['min_s']:.3f} s  first {figure['first_s']:.3f} s"
                  f"  peak {figure['peak_rss_mib']} MiB  difference {row['difference_to_ferry_resident'].get(mode, 0):.1e}")
        else:
            print(f"  {mode:12} {json.dumps(figure)[:400]}")
    for ours, theirs in (("ferry", "py_resident"), ("ferry_512", "py_hook"), ("ferry_512", "py_group"),
                         ("ferry_512_io500", "ferry_512_io500_packs"), ("ferry_512", "ferry_512_packs"),
                         ("ferry_512_io500_int8wo", "ferry_512_io500"), ("ferry_256_io500_int8wo", "ferry_512_io500"),
                         ("ferry_int8wo", "ferry"), ("ferry_int8da8w", "ferry")):
        if "median_s" in modes.get(ours, {}) and "median_s" in modes.get(theirs, {}):
            print(f"  {theirs} / {ours} = {modes[theirs]['median_s'] / modes[ours]['median_s']:.2f}")


if __name__ == "__main__":
    main()
