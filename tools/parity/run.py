#!/usr/bin/env python
"""Makes fresh references from a seed and compares ferry with them: every model class, the scheduler,
the tokenizers, a tiny Flux pipeline. Prints the worst case of each and exits 1 on a miss."""

import argparse
import shutil
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import common
import compare
import configs
import quantized
import reference
import schedules
import small_tokenizers
import strings
import tiny_pipeline

GROUPS = (*configs.CLASSES, "FlowMatchEulerDiscreteScheduler", "tokenizers", "FluxPipeline", "quantized")
HUB_FORMS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
NEEDS = {"FlowMatchEulerDiscreteScheduler": "schedule", "tokenizers": "tokenize", "FluxPipeline": "generate", "quantized": "quantize"}


@dataclass
class Result:
    """One row of the table: the worst error over the cases of a group, and what missed."""

    name: str
    bound: float
    cases: int = 0
    worst: float = 0.0
    where: str = ""
    misses: list = field(default_factory=list)

    def add(self, label, error, detail=""):
        self.cases += 1
        if error >= self.worst:
            self.worst, self.where = error, f"{label} {detail}".strip()
        if not error <= self.bound:
            self.misses.append(f"{label}: {error:.3g} {detail}")

    def fail(self, label, problem):
        self.cases += 1
        self.worst, self.where = float("inf"), label
        self.misses.append(f"{label}: {problem}")


def models(class_name, a, work):
    result = Result(class_name, compare.MODEL_BOUND)
    for i, case in enumerate(configs.draw(class_name, a.seed, a.count)):
        folder = work / f"{class_name}-{i}"
        label = f"{folder.name} {case['method']}"
        reference.write(
            class_name, case["config"], case["seed"], folder, case["method"], case["args"], case["options"],
            hub=class_name in HUB_FORMS and i % 2 == 1,
        )  # fmt: skip
        try:
            result.add(label, *compare.model(a.ferry, folder))
        except common.FerryError as problem:
            result.fail(label, problem)
    return [result]


def scheduler(a, work):
    result = Result("FlowMatchEulerDiscreteScheduler", compare.SCHEDULE_BOUND)
    for i, case in enumerate(configs.schedules(a.seed, max(36, a.count))):
        inputs = schedules.make_inputs(case, a.seed + i)
        expected = schedules.trajectory(case["config"], inputs, case["steps"], case["args"])
        label = f"set {i} {case['config']} steps={case['steps']} {case['args']} given={[k for k in ('sigmas', 'timesteps') if k in case]}"
        try:
            result.add(label, *compare.schedule(a.ferry, case, inputs, expected))
        except common.FerryError as problem:
            result.fail(label, problem)
    return [result]


def tokenizers(a, work):
    texts = strings.strings(a.seed, 1000)
    results = []
    for folder in small_tokenizers.train(work / "tokenizers", a.seed):
        for max_length in (None, 16, 77):
            limit = "" if max_length is None else f" max {max_length}"
            result = Result(folder.name + limit, 0)
            expected = small_tokenizers.ids(folder, texts, max_length)
            try:
                wrong = dict(compare.tokens(a.ferry, folder, texts, expected, max_length))
            except common.FerryError as problem:
                result.fail(folder.name, problem)
                results.append(result)
                continue
            result.cases, result.worst = len(texts), len(wrong)
            for i, ids in wrong.items():
                result.misses.append(f"{texts[i][:60]!r}: ferry {ids[:16]}, expected {expected[i][:16]}")
            results.append(result)
    return results


def pipeline(a, work):
    result = Result("FluxPipeline (of 255)", compare.PICTURE_BOUND)
    seeds = (a.seed * 2 + 1, a.seed * 2 + 2)  # with and without guidance embeddings
    cases = [(seed, name) for seed in seeds for name in tiny_pipeline.calls()][: a.count]
    for seed, name in cases:
        folder = work / f"pipeline-{seed}"
        if not folder.exists():
            pipe = tiny_pipeline.load(tiny_pipeline.write(folder, seed))
        label = f"{folder.name} {name}"
        call, call_seed = tiny_pipeline.calls()[name]
        expected = tiny_pipeline.generate(pipe, call, call_seed + a.seed)["image"]
        try:
            made = compare.generate(a.ferry, folder, call, call_seed + a.seed)
            shapes = "" if made.shape == expected.shape else f"pictures {list(made.shape)}, expected {list(expected.shape)}"
            result.add(label, compare.pictures(made, expected), shapes)
        except common.FerryError as problem:
            result.fail(label, problem)
    return [result]


def quantized_models(a, work):
    results = []
    for scheme, bound in quantized.SCHEMES.items():
        for way, function in (("to Python", quantized.to_python), ("from Python", quantized.from_python)):
            result = Result(f"{scheme} {way}", bound)
            for i, case in enumerate(configs.draw("FluxTransformer2DModel", a.seed, min(a.count, 3))):
                folder = work / f"FluxTransformer2DModel-quantized{i}"
                if not folder.exists():
                    reference.write("FluxTransformer2DModel", case["config"], case["seed"], folder, case["method"], case["args"])
                try:
                    result.add(folder.name, *function(a.ferry, folder, scheme, work))
                except common.FerryError as problem:
                    result.fail(folder.name, problem)
            results.append(result)
    return results


def run_group(name, a, work):
    if name == "quantized":
        return quantized_models(a, work)
    if name == "FlowMatchEulerDiscreteScheduler":
        return scheduler(a, work)
    if name == "tokenizers":
        return tokenizers(a, work)
    if name == "FluxPipeline":
        return pipeline(a, work)
    return models(name, a, work)


def report(results, verbose):
    print(f"{'':4} {'':34} {'cases':>5} {'bound':>8} {'worst':>9}  where")
    for r in results:
        status = "MISS" if r.misses else "ok"
        where = r.where if len(r.where) < 110 or verbose else r.where[:107] + "..."
        print(f"{status:4} {r.name:34} {r.cases:5} {r.bound:8.0e} {r.worst:9.2e}  {where}")
    for r in results:
        for miss in r.misses[: None if verbose else 5]:
            print(f"  {r.name}: {miss}")
        if len(r.misses) > 5 and not verbose:
            print(f"  {r.name}: and {len(r.misses) - 5} more (--verbose)")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--class", dest="groups", action="append", choices=GROUPS, help="only this one; repeatable")
    parser.add_argument("--count", type=int, default=10, help="configurations a model class, calls of the pipeline (default 10)")
    parser.add_argument("--ferry", type=Path, default=common.DEFAULT_FERRY)
    parser.add_argument("--keep", type=Path, help="keep the references in this folder")
    parser.add_argument("--verbose", action="store_true", help="all misses, not five a row")
    a = parser.parse_args()
    common.quiet()
    if not a.ferry.exists():
        common.die(f"no ferry binary at {a.ferry}; build it or name it with --ferry")
    present = common.subcommands(a.ferry)
    results, lacking = [], []
    work = a.keep or Path(tempfile.mkdtemp(prefix="ferry-parity-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        for name in a.groups or GROUPS:
            needed = NEEDS.get(name, "forward")
            if needed not in present:
                lacking.append(f"{name}: {a.ferry} has no `{needed}`")
                continue
            try:
                results += run_group(name, a, work)
            except Exception:
                traceback.print_exc()
                lacking.append(f"{name}: the Python side failed")
    finally:
        if not a.keep:
            shutil.rmtree(work, ignore_errors=True)
    report(results, a.verbose)
    for line in lacking:
        print(f"not compared: {line}")
    raise SystemExit(bool(lacking) or any(r.misses for r in results))


if __name__ == "__main__":
    main()
