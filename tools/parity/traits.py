#!/usr/bin/env python
"""Prints the traits of the Python model classes as JSON and compares them with `ferry inspect --traits
CLASS` (the same names; a leading underscore, the order of lists, and null against empty do not count)."""

import argparse
import json
from pathlib import Path

import common
import configs

TRAITS = (
    "_keep_in_fp32_modules",
    "_no_split_modules",
    "_skip_layerwise_casting_patterns",
    "_repeated_blocks",
    "_tied_weights_keys",
    "_supports_gradient_checkpointing",
)


def python_traits(class_name):
    cls = common.find_class(class_name)
    found = {}
    for name in TRAITS:
        # transformers spells supports_gradient_checkpointing without the underscore
        value = getattr(cls, name, getattr(cls, name.lstrip("_"), None))
        found[name] = sorted(value) if isinstance(value, (set, frozenset, tuple)) else value
    return found


def normalized(value):
    if isinstance(value, (list, tuple)):
        return sorted(value) or None
    return value or None


def differences(class_name, theirs):
    """Lines that say which trait differs; `theirs` is ferry's JSON."""
    theirs = {name.lstrip("_"): value for name, value in theirs.items()}
    lines = []
    for name, expected in python_traits(class_name).items():
        actual = theirs.get(name.lstrip("_"))
        if isinstance(expected, dict) and isinstance(actual, list):
            expected = list(expected)
        if normalized(actual) != normalized(expected):
            lines.append(f"{class_name}.{name}: ferry {json.dumps(actual)}, expected {json.dumps(expected)}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="default: every class of configs.py")
    parser.add_argument("--ferry", type=Path, default=common.DEFAULT_FERRY)
    parser.add_argument("--print", dest="only_print", action="store_true", help="print Python's traits, compare nothing")
    a = parser.parse_args()
    classes = a.classes or configs.CLASSES
    if a.only_print:
        print(json.dumps({name: python_traits(name) for name in classes}, indent=2))
        return
    missed = False
    for name in classes:
        try:
            lines = differences(name, json.loads(common.run_ferry(a.ferry, "inspect", "--traits", name)))
        except (common.FerryError, json.JSONDecodeError) as problem:
            lines = [f"{name}: {problem}"]
        missed |= bool(lines)
        print("\n".join(f"MISS {line}" for line in lines) or f"ok   {name}")
    raise SystemExit(missed)


if __name__ == "__main__":
    main()
