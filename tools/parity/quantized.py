"""Quantized weights both ways: a folder that `ferry quantize` wrote in Python diffusers with torchao, and
one that Python quantized and saved in ferry."""

from pathlib import Path

import common
import compare
import torch
from reference import evaluate

# Scheme of `ferry quantize` -> bound of the outputs. Weights are equal bit for bit; what differs is
# the order of sums, and where activations are quantized too, a value on the border between two steps.
SCHEMES = {"int8wo": 1e-5, "int8da8w": 2e-2, "fp8wo": 1e-5}


def config_of(scheme):
    from torchao import quantization as q

    return {
        "int8wo": lambda: q.Int8WeightOnlyConfig(version=2),
        "int8da8w": lambda: q.Int8DynamicActivationInt8WeightConfig(version=2),
        "fp8wo": lambda: q.Float8WeightOnlyConfig(),
    }[scheme]()


def python_outputs(folder, quantization=None, save=None):
    """Outputs of the model in `folder` (config.json, weights, args.json and inputs beside it) by
    diffusers; quantized as it is loaded, and saved to `save`, where asked for."""
    from diffusers import TorchAoConfig

    source = Path(folder)
    described = common.load_json(source / "args.json")
    cls = common.find_class(described["class"]) if "class" in described else common.find_class(source.name.split("-")[0])
    options = {"quantization_config": TorchAoConfig(quantization)} if quantization is not None else {}
    model = cls.from_pretrained(source, torch_dtype=torch.float32, **options).eval()
    if save is not None:
        model.save_pretrained(save)
    return evaluate(model, common.load_tensors(source / "inputs.safetensors"), described["method"], described["args"])


def complete(folder, reference):
    """Gives a folder of weights the inputs and arguments of `reference`."""
    for name in ("inputs.safetensors", "args.json"):
        (Path(folder) / name).write_bytes((Path(reference) / name).read_bytes())


def to_python(ferry, reference, scheme, work):
    """(error, output) of ferry's folder in Python against the same folder in ferry."""
    folder = work / f"{Path(reference).name}-ferry-{scheme}"
    common.run_ferry(ferry, "quantize", reference, "--scheme", scheme, "--out", folder, "--quiet")
    complete(folder, reference)
    return compare.worst(compare.forward(ferry, folder), python_outputs(folder))


def from_python(ferry, reference, scheme, work):
    """(error, output) of a folder that Python quantized and saved, in ferry against Python."""
    folder = work / f"{Path(reference).name}-python-{scheme}"
    expected = python_outputs(reference, config_of(scheme), folder)
    complete(folder, reference)
    return compare.worst(compare.forward(ferry, folder), expected)
