#!/usr/bin/env python
"""Finds the first submodule whose output differs: runs Python with hooks on every submodule and
`ferry forward --dump '.*'`, and compares in the order in which the submodules end.

Give a folder of reference.py, or a class of configs.py with --seed and --index as run.py draws it.
Dumped tensors are named by submodule path; `path.N` is the N-th of several tensors, and `path#k` the
k-th call beyond the first. (Not called bisect.py: that name would hide Python's own module.)"""

import argparse
import tempfile
from pathlib import Path

import common
import compare
import configs
import reference
import torch


def tensors_of(output):
    """The tensors of a module's output by position; None for what is no tensor."""
    if torch.is_tensor(output):
        return [output]
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [v if torch.is_tensor(v) else None for v in output] if isinstance(output, (tuple, list)) else []


def recorded(model, inputs, method, args):
    """[(class name, spellings of the name, tensor)] for each output of each submodule, in order."""
    found, calls = [], {}

    def hook(path):
        def record(module, _, output):
            k = calls[path] = calls.get(path, -1) + 1
            call = f"#{k}" if k else ""
            several = tensors_of(output)
            alone = sum(v is not None for v in several) == 1
            for i, value in enumerate(several):
                if value is None:
                    continue
                names = [f"{path}{call}.{i}", f"{path}.{i}{call}"]
                if alone or i == 0:
                    names.insert(0, f"{path}{call}")
                found.append((type(module).__name__, names, value.detach().clone()))

        return record

    handles = [m.register_forward_hook(hook(path)) for path, m in model.named_modules() if path]
    outputs = reference.evaluate(model, inputs, method, args)
    for handle in handles:
        handle.remove()
    return found + [("output", [name], value) for name, value in outputs.items()]


def compare_in_order(found, actual, bound, show_all):
    """Prints what differs; gives True where nothing does."""
    unmatched, compared, first = [], 0, True
    for kind, names, expected in found:
        name = next((n for n in names if n in actual), None)
        if name is None:
            unmatched.append(names[0])
            continue
        compared += 1
        error = compare.error(actual[name], expected)
        if error > bound and first:
            first = False
            print(f"first difference: {name} ({kind}): {error:.2e} of the output's max {expected.abs().max():.3g}")
            print(f"  Python {list(expected.shape)}: {expected.flatten()[:6].tolist()}")
            print(f"  ferry  {list(actual[name].shape)}: {actual[name].flatten()[:6].tolist()}")
        elif show_all or error > bound:
            print(f"{'MISS' if error > bound else 'ok':4} {error:9.2e} {name} ({kind})")
    if first:
        print(f"no difference above {bound:g} in {compared} outputs")
    if unmatched:
        print(f"{len(unmatched)} Python outputs without a tensor of that name from ferry: {', '.join(unmatched[:8])} ...")
    return first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", metavar="DIR|CLASS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, default=0, help="which configuration of the class (default 0)")
    parser.add_argument("--ferry", type=Path, default=common.DEFAULT_FERRY)
    parser.add_argument("--bound", type=float, default=compare.MODEL_BOUND)
    parser.add_argument("--all", action="store_true", help="print every submodule")
    a = parser.parse_args()
    common.quiet()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(a.what)
        if not folder.is_dir():
            folder = Path(scratch)
            case = configs.draw(a.what, a.seed, a.index + 1)[a.index]
            reference.write(a.what, case["config"], case["seed"], folder, case["method"], case["args"], case["options"])
        described = common.load_json(folder / "args.json")
        model = common.find_class(described["class"]).from_pretrained(folder, torch_dtype=torch.float32).eval()
        inputs = common.load_tensors(folder / "inputs.safetensors")
        found = recorded(model, inputs, described["method"], described["args"])
        try:
            actual = compare.forward(a.ferry, folder, ("--dump", ".*"))
        except common.FerryError as problem:
            common.die(problem)
    raise SystemExit(not compare_in_order(found, actual, a.bound, a.all))


if __name__ == "__main__":
    main()
