#!/usr/bin/env python
"""Runs diffusers' own tests of group offloading on ferry's engine, on the fake accelerator or
the CPU.

    python tools/upstream/run.py CHECKOUT [--engine ferry|diffusers] [--device fake|cpu] [--all]

CHECKOUT is a checkout of huggingface/diffusers, or a git directory of it (--ref). Only its tests/
are taken, into a temporary folder; the library under test is the diffusers that is installed.
Nothing is fetched: a test that would download is skipped with that reason. Prints the totals and
the reason of every skip and failure, grouped. Exits with 1 if a test failed or a file could not be
imported, 2 if nothing ran.

Needs the packages of tools/parity/requirements.txt, and on PYTHONPATH build/release/tests/python
(ferry_fake) for --device fake, build/release/python (ferry) for --engine ferry; without PYTHONPATH
the folders of build/release are taken.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hub
import selection

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# tests/testing_utils.py reads it: what its backend_* functions call for a device that it has never
# heard of.
DEVICE_SPEC = '''import torch

DEVICE_NAME = "fake"
MANUAL_SEED_FN = torch.fake.manual_seed
EMPTY_CACHE_FN = torch.fake.empty_cache
DEVICE_COUNT_FN = torch.fake.device_count
SUPPORTS_TRAINING = True
RESET_PEAK_MEMORY_STATS_FN = torch.fake.reset_peak_memory_stats
RESET_MAX_MEMORY_ALLOCATED_FN = torch.fake.reset_max_memory_allocated
MAX_MEMORY_ALLOCATED_FN = torch.fake.max_memory_allocated
'''


@dataclass
class Outcome:
    id: str
    outcome: str  # passed, failed, skipped, not collected
    reason: str
    seconds: float


@dataclass
class Run:
    """One group of test files."""

    name: str
    files: list[str]
    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    def count(self, *outcomes: str) -> int:
        return sum(each.outcome in outcomes for each in self.outcomes)


# ---- the copy of the tests ----


def copy_tests(checkout: Path, ref: str, into: Path) -> str:
    """Copies tests/ of `checkout` below `into`; gives the version that the checkout says it is."""
    init = "src/diffusers/__init__.py"
    if (checkout / "tests").is_dir():
        shutil.copytree(
            checkout / "tests", into / "tests", ignore=shutil.ignore_patterns("__pycache__")
        )
        text = (checkout / init).read_text(encoding="utf-8") if (checkout / init).is_file() else ""
    else:
        git = ["git", "--git-dir", str(checkout)]
        archive = subprocess.run([*git, "archive", ref, "tests"], stdout=subprocess.PIPE)
        if archive.returncode:
            sys.exit(f"{checkout}: has no tests/, and is no git directory with {ref}")
        subprocess.run(["tar", "x", "-C", str(into)], input=archive.stdout, check=True)
        shown = subprocess.run([*git, "show", f"{ref}:{init}"], capture_output=True, text=True)
        text = shown.stdout
    version = re.search(r'^__version__ = "(.*)"', text, re.M)
    return version[1] if version else "unknown"


# ---- running ----


def environment(a: argparse.Namespace, work: Path, results: Path) -> dict[str, str]:
    paths = [str(HERE), str(work)]
    given = os.environ.get("PYTHONPATH")
    built = [str(a.build / "tests/python"), str(a.build / "python")]
    paths += [given] if given else built
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "DIFFUSERS_TEST_DEVICE": a.device,
        "FERRY_UPSTREAM_DEVICE": a.device,
        "FERRY_UPSTREAM_ENGINE": a.engine,
        "FERRY_UPSTREAM_RESULTS": str(results),
        "FERRY_UPSTREAM_FAKE": json.dumps(a.fake),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The models are tiny, and each stream's thread of the fake accelerator has its own pool.
        "OMP_NUM_THREADS": "1",
    }
    if a.device == "fake":
        (work / "ferry_fake_spec.py").write_text(DEVICE_SPEC, encoding="utf-8")
        env["DIFFUSERS_TEST_DEVICE_SPEC"] = "ferry_fake_spec.py"  # a path, and imported by its name
    return env


def read_results(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def wait(process: subprocess.Popen[bytes], results: Path, quiet_s: float) -> str:
    """Until the process ends, or writes no result for `quiet_s`; gives why it was ended, or ""."""
    size, changed = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = results.stat().st_size if results.is_file() else 0
        if now != size:
            size, changed = now, time.monotonic()
        elif time.monotonic() - changed > quiet_s:
            process.kill()
            process.wait()
            return f"did not end within {quiet_s:.0f} s"
    return ""


def run_group(run: Run, a: argparse.Namespace, work: Path) -> None:
    results, log = work / f"{run.name}.jsonl", work / f"{run.name}.log"
    keyword = selection.KEYWORD + (f" and ({a.filter})" if a.filter else "")
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-q"]
    command += ["--tb=short", "--no-header", "--continue-on-collection-errors", "-k", keyword]
    command += ["-x"] if a.exitfirst else []
    begin = time.monotonic()
    env = environment(a, work, results)
    while True:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*command, *run.files], cwd=work, env=env, stdout=output, stderr=subprocess.STDOUT
            )
            why = wait(process, results, a.test_timeout)
        if process.returncode in (0, 1, 2, 5):  # passed, failed, interrupted, nothing selected
            break
        entries = read_results(results)
        ended = {entry["id"] for entry in entries if entry["kind"] == "result"}
        begun = [e["id"] for e in entries if e["kind"] == "start" and e["id"] not in ended]
        if not begun:
            print(log.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr)
            sys.exit(f"{run.name}: pytest ended with {process.returncode} before any test")
        reason = why or f"the process ended with {process.returncode}"
        entry = {"kind": "result", "id": begun[-1], "outcome": "failed", "reason": reason}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "seconds": 0.0}) + "\n")
        if a.exitfirst:
            break
    run.seconds = time.monotonic() - begin
    for entry in read_results(results):
        if entry["kind"] == "result":
            known = {key: entry[key] for key in ("id", "outcome", "reason", "seconds")}
            run.outcomes.append(Outcome(**known))


# ---- the report ----


def same_reason(reason: str) -> str:
    """Reasons that differ in numbers and addresses only are one."""
    return re.sub(r"0x[0-9a-f]+|\d+\.\d+(e[+-]\d+)?", "#", reason)


def print_group(title: str, outcomes: list[Outcome]) -> None:
    by_reason: dict[str, list[Outcome]] = defaultdict(list)
    for each in outcomes:
        by_reason[same_reason(each.reason)].append(each)
    if by_reason:
        print(f"\n{title}")
    for reason, those in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        print(f"  {len(those):4}  {reason}")
        for each in those:
            print(f"          {each.id}")


def report(runs: list[Run]) -> None:
    kinds = ("passed", "failed", "skipped", "not collected")
    print("\n" + f"{'group':10}" + "".join(f"{kind:>15}" for kind in kinds) + f"{'s':>8}")
    for run in runs:
        counts = "".join(f"{run.count(kind):15}" for kind in kinds)
        print(f"{run.name:10}{counts}{run.seconds:8.0f}")
    outcomes = [each for run in runs for each in run.outcomes]
    print_group("skipped", [each for each in outcomes if each.outcome == "skipped"])
    print_group("not collected", [each for each in outcomes if each.outcome == "not collected"])
    print_group("failed", [each for each in outcomes if each.outcome == "failed"])
    totals = {kind: sum(run.count(kind) for run in runs) for kind in kinds}
    print("\n" + ", ".join(f"{count} {kind}" for kind, count in totals.items()))


def fake_options(text: str) -> dict[str, float]:
    return {name: float(value) for name, _, value in (one.partition("=") for one in text.split(","))}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="of huggingface/diffusers, or its git directory")
    parser.add_argument("--ref", default="HEAD", help="of a git directory (default HEAD)")
    parser.add_argument("--engine", choices=("ferry", "diffusers"), default="ferry")
    parser.add_argument("--device", choices=("fake", "cpu"), default="fake")
    parser.add_argument("--groups", default=",".join(selection.ALL), help="default: all four")
    parser.add_argument("--all", action="store_true", help="every model, LoRA and pipeline file")
    parser.add_argument("--filter", default="", metavar="EXPRESSION", help="pytest -k, in addition")
    parser.add_argument("--models", type=int, metavar="N", help="only the first N model files")
    parser.add_argument("-x", dest="exitfirst", action="store_true", help="stop at a failure")
    parser.add_argument("--test-timeout", type=float, default=300, metavar="S", help="a test's end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument(
        "--fake", type=fake_options, default={}, metavar="NAME=N,...",
        help="options of the fake accelerator: copy_delay_ms=3 shows missing waits",
    )  # fmt: skip
    parser.add_argument("--build", type=Path, default=ROOT / "build/release", metavar="DIR")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder (logs)")
    a = parser.parse_args()
    unknown = set(a.groups.split(",")) - set(selection.ALL)
    if unknown:
        parser.error(f"--groups: {', '.join(sorted(unknown))}; there are {', '.join(selection.ALL)}")
    return a


def main() -> int:
    a = arguments()
    work = Path(tempfile.mkdtemp(prefix="ferry-upstream-"))
    try:
        tests_version = copy_tests(a.checkout, a.ref, work)
        library = importlib.metadata.version("diffusers")
        print(f"tests of diffusers {tests_version}, library {library}; {a.engine} on {a.device}")
        rewrites = selection.rewrite(work / "tests", a.device)
        if {"lora", "pipelines"} & set(a.groups.split(",")):
            hub.write(work / "hub")
            rewrites["a small model of the hub is a stand-in"] = hub.rewrite(
                work / "tests", work / "hub"
            )
        for what, count in rewrites.items():
            if count:
                print(f"rewritten {count:3} times: {what}")
        runs = []
        for name in a.groups.split(","):
            files = selection.files(work, (selection.ALL if a.all else selection.DEFAULT)[name])
            if name == "models" and a.models is not None:
                files = files[: a.models]
            if not files:
                continue
            large = {file: selection.LARGE[file] for file in files if file in selection.LARGE}
            run = Run(name, [file for file in files if file not in large])
            run.outcomes += [Outcome(file, "skipped", why, 0.0) for file, why in large.items()]
            runs.append(run)
            run_group(run, a, work)
            print(f"{name}: {len(files)} files, {run.seconds:.0f} s", flush=True)
            if a.exitfirst and run.count("failed"):
                break
        report(runs)
        if a.json:
            content = {
                "tests": tests_version, "library": library, "engine": a.engine,
                "device": a.device, "fake": a.fake, "rewrites": rewrites,
                "groups": [{"name": run.name, "seconds": round(run.seconds, 1),
                            "tests": [vars(each) for each in run.outcomes]} for run in runs],
            }  # fmt: skip
            a.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    finally:
        if a.keep:
            print(f"kept {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    if not any(run.outcomes for run in runs):
        return 2
    return 1 if any(run.count("failed", "not collected") for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
