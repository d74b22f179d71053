#!/usr/bin/env python
"""torchao's int8 linear layers beside ferry's, in turns: a turn is some rounds of bench_kernels, then as many
of torch's bf16, torchao's int8 weight-only and its int8 dynamic linear. Prints a table; JSON with --json."""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python_layers(rows, size_in, size_out):
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    def layer(config):
        linear = torch.nn.Linear(size_in, size_out, bias=False, dtype=torch.bfloat16)
        if config is not None:
            quantize_(linear, config)
        return linear

    x = torch.randn(rows, size_in).bfloat16()
    configs = {"bf16": None, "int8wo": Int8WeightOnlyConfig(set_inductor_config=False)}
    configs["int8da8w"] = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return {name: (layer(config), x) for name, config in configs.items()}


def time_python(layers, rounds, clock):
    import torch

    times = {}
    with torch.inference_mode():
        for turn in range(-1, rounds):
            for name, (linear, x) in layers.items():
                begin = clock()
                linear(x)
                if turn >= 0:
                    times.setdefault(f"python {name}", []).append(1e3 * (clock() - begin))
    return times


def time_ferry(args, rows, shape):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [args.bench, "--rows", str(rows), "--shapes", "x".join(map(str, shape)), "--rounds", str(args.rounds)]
        command += ["--threads", str(args.threads), "--schemes", args.schemes, "--json", str(out)]
        command += ["--cpu-time"] if args.cpu_time else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {f"ferry {entry['scheme']}": entry["ms"] for entry in json.loads(out.read_text())}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", default=str(ROOT / "build/release/bench/kernels/bench_kernels"))
    parser.add_argument("--rows", default="64,320,1280,4096")
    parser.add_argument("--shapes", default="3072x3072,3072x12288,12288x3072,15360x3072")
    parser.add_argument("--schemes", default="int8wo,int8da8w,int8g64,float8,int4,nf4,Q8_0,Q4_0,Q4_K,Q6_K,int8pack")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="the processes' time on the cores; with --threads 1")
    parser.add_argument("--json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import torch

    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    results = []
    for shape in [tuple(map(int, text.split("x"))) for text in args.shapes.split(",")]:
        for rows in map(int, args.rows.split(",")):
            layers = python_layers(rows, *shape)
            times = {}
            for _ in range(args.turns):
                for part in (time_ferry(args, rows, shape), time_python(layers, args.rounds, clock)):
                    for name, values in part.items():
                        times.setdefault(name, []).extend(values)
            print(f"{rows} rows, {shape[0]} -> {shape[1]}, {args.threads} threads", flush=True)
            for name, values in times.items():
                base = times["python bf16" if name.startswith("python") else "ferry bf16"]
                entry = {"name": name, "rows": rows, "in": shape[0], "out": shape[1], "threads": args.threads}
                entry |= {"clock": "cpu" if args.cpu_time else "wall", "ms": values}
                entry |= {"least_ms": min(values), "median_ms": statistics.median(values)}
                entry |= {"least_ratio": min(values) / min(base), "median_ratio": statistics.median(values) / statistics.median(base)}
                results.append(entry)
                print(f"  {name:<18} {entry['least_ms']:9.2f} ms least {entry['median_ms']:9.2f} median   ratio {entry['least_ratio']:6.3f} {entry['median_ratio']:6.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
