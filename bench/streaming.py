"""One forward of a component on a device, streamed in several ways and resident, beside Python diffusers.

  streaming.py --device cuda --model DIR --inputs F.safetensors --json OUT.json [--rounds 2] [--repeat 6]

ferry: resident; with 25, 50 and 75% of the weights' bytes as weights memory, the others in host memory or on
disk with cold pages. Python (left out, and said, where diffusers is not installed): resident, model offload,
and group offloading at block and leaf level with streams, record_stream and low_cpu_mem_usage. Rounds
alternate between the modes; a mode's figure is the median over rounds of the median of its forwards after the
first two. Exits with 1 if a streamed output of ferry is not bit for bit its resident one.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--ferry", required=True)
parser.add_argument("--python", default=sys.executable)
parser.add_argument("--device", default="cuda")
parser.add_argument("--model", required=True)
parser.add_argument("--inputs", required=True)
parser.add_argument("--json", required=True)
parser.add_argument("--work", default=".")
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--repeat", type=int, default=6)
args = parser.parse_args()

weights = sum(os.path.getsize(os.path.join(args.model, f)) for f in os.listdir(args.model) if f.endswith(".safetensors"))
MODES = {"ferry resident": []}
for part in (25, 50, 75):
    memory = ["--weights-memory", str(weights * part // 100)]
    MODES[f"ferry {part}% from host"] = [*memory, "--host-memory", str(weights + (1 << 30))]
    MODES[f"ferry {part}% from disk"] = [*memory, "--cold"]
PEERS = {
    "python resident": ["resident"],
    "python model offload": ["model"],
    "python block, stream": ["block", "--stream"],
    "python block, stream, record": ["block", "--stream", "--record-stream"],
    "python block, stream, low mem": ["block", "--stream", "--low-cpu-mem"],
    "python leaf, stream": ["leaf", "--stream"],
    "python leaf, stream, record": ["leaf", "--stream", "--record-stream"],
    "python block to disk": ["group_disk", "--cold"],
}


def output_of(mode):
    return os.path.join(args.work, mode.replace(" ", "_").replace("%", "").replace(",", "") + ".safetensors")


def run(mode):
    if mode in PEERS:
        command = [args.python, os.path.join(HERE, "end_to_end/peers.py"), PEERS[mode][0], args.model, args.inputs,
                   "--device", args.device, "--repeat", str(args.repeat), "--output", output_of(mode), *PEERS[mode][1:]]
        done = subprocess.run(command, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-400:]}
    stats = os.path.join(args.work, "stats.tmp")
    command = [args.ferry, "forward", args.model, "--inputs", args.inputs, "--output", output_of(mode), "--device", args.device,
               "--repeat", str(args.repeat), "--stats", stats, "--quiet", *MODES[mode]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-400:]}
    with open(stats) as handle:
        figures = json.load(handle)
    os.remove(stats)
    return figures


def main():
    modes = list(MODES)
    has_diffusers = subprocess.run([args.python, "-c", "import diffusers"], capture_output=True).returncode == 0
    if has_diffusers and args.device != "cpu":
        modes += list(PEERS)
    else:
        print("Python diffusers is not installed here, or has no streams on this device: its modes are left out")
    runs = {mode: [] for mode in modes}
    for _ in range(args.rounds):
        for mode in modes:
            runs[mode].append(run(mode))
    failed = False
    result = {}
    with open(output_of("ferry resident"), "rb") as handle:
        expected = handle.read()
    for mode, done in runs.items():
        good = [r for r in done if "error" not in r]
        if not good:
            result[mode] = done[0]
            failed |= mode in MODES
            print(f"{mode:30} {done[0]['error']}")
            continue
        result[mode] = {
            "median_s": statistics.median(statistics.median(r["forward_seconds"][2:]) for r in good),
            "min_s": min(min(r["forward_seconds"][2:]) for r in good),
            "first_s": good[0]["forward_seconds"][0],
            "peak_device_bytes": max(r.get("peak_device_bytes", 0) for r in good),
            "peak_rss_bytes": max(r["peak_rss_bytes"] for r in good),
            "offload": good[-1].get("offload"),
        }
        if mode in MODES:
            with open(output_of(mode), "rb") as handle:
                result[mode]["equals_resident"] = handle.read() == expected
            failed |= not result[mode]["equals_resident"]
        figures = result[mode]
        print(f"{mode:30} median {figures['median_s']:.3f} s  min {figures['min_s']:.3f} s  first {figures['first_s']:.3f} s  "
              f"device {figures['peak_device_bytes'] >> 20} MiB  host {figures['peak_rss_bytes'] >> 20} MiB"
              f"{'' if figures.get('equals_resident', True) else '  NOT EQUAL TO RESIDENT'}")
    with open(args.json, "w") as handle:
        json.dump({"weights_bytes": weights, "rounds": args.rounds, "modes": result}, handle, indent=1)
    sys.exit(failed)


if __name__ == "__main__":
    main()
