#!/usr/bin/env python3
"""Makes safetensors of a pickled TorchAO checkpoint (.bin), which ferry does not read.

    python3 tools/torchao_pickle.py FOLDER --out FOLDER2 [--dequantize]

FOLDER is a component as diffusers wrote it with safe_serialization=False: config.json and
diffusion_pytorch_model.bin (or shards with an index), or pytorch_model.bin of a text encoder. Run it offline
in the Python that wrote the file: unpickling runs code from it, and wants the torchao version (0.7 to 0.14)
whose classes it names. int8 weights of TorchAO's first tensor classes (int8 weight-only and dynamic, plain
layout) become Int8Tensor, value by value; every other class is dequantized by its own code, as all are with
--dequantize. `ferry quantize` can then quantize the folder anew.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def find_files(folder):
    """The pickled files of a component folder, and the name that safetensors files have in their place."""
    for base, new in (("diffusion_pytorch_model", "diffusion_pytorch_model"), ("pytorch_model", "model")):
        index = folder / f"{base}.bin.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [folder / name for name in names], new
        if (folder / f"{base}.bin").exists():
            return [folder / f"{base}.bin"], new
    sys.exit(f"{folder}: neither diffusion_pytorch_model.bin nor pytorch_model.bin is there")


def int8_parts(tensor):
    """qdata, scale, zero_point, and whether activations are quantized, of an int8 weight by rows; or None."""
    dynamic = type(tensor).__name__ == "LinearActivationQuantizedTensor"
    inner = tensor.original_weight_tensor if dynamic else tensor
    impl = getattr(inner, "tensor_impl", None)
    if type(inner).__name__ != "AffineQuantizedTensor" or impl is None or not hasattr(impl, "get_plain"):
        return None
    values, scale, zero = impl.get_plain()
    if values.dtype != torch.int8 or values.dim() != 2 or tuple(inner.block_size) != (1, values.shape[1]):
        return None
    if zero is not None and zero.numel() and zero.abs().max() != 0:
        return None
    scale = scale.reshape(-1, 1)
    return values, scale.float(), torch.zeros_like(scale, dtype=torch.int8), dynamic


def entry(parts, dtype):
    activation = None
    if parts[3]:
        activation = {"_type": "QuantizeTensorToInt8Kwargs", "_data": {
            "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
            "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "reduce_range": False}}  # fmt: skip
    attributes = {"act_quant_kwargs": activation, "reduce_range": False, "block_size": [1, parts[0].shape[1]],
                  "dtype": {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}}  # fmt: skip
    return {"_type": "Int8Tensor", "_data": attributes, "_tensor_data_names": ["zero_point", "qdata", "scale"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dequantize", action="store_true", help="plain weights, whatever their class")
    args = parser.parse_args()
    files, base = find_files(args.folder)
    tensors, metadata, counts = {}, {}, {"int8": 0, "dequantized": 0, "plain": 0}
    for file in files:
        for name, tensor in torch.load(file, map_location="cpu", weights_only=False).items():
            tensor = tensor.detach()
            metadata[name] = {"_type": "Tensor"}
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                tensors[name] = tensor.contiguous()
                counts["plain"] += 1
                continue
            parts = None if args.dequantize else int8_parts(tensor)
            if parts is None:
                tensors[name] = tensor.dequantize().contiguous()
                counts["dequantized"] += 1
                continue
            module, _, parameter = name.rpartition(".")
            for part, value in zip(("qdata", "scale", "zero_point"), parts):
                tensors[f"{module}._{parameter}_{part}"] = value.contiguous()
            metadata[name] = entry(parts, tensor.dtype)
            counts["int8"] += 1
    header = {"format": "pt"}
    config = json.loads((args.folder / "config.json").read_text())
    if counts["int8"]:
        header["tensor_names"] = json.dumps(list(metadata))
        header.update({name: json.dumps(value) for name, value in metadata.items()})
    else:
        config.pop("quantization_config", None)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out / f"{base}.safetensors", metadata=header)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{args.out}: {counts['int8']} weights as int8, {counts['dequantized']} dequantized, {counts['plain']} plain")


if __name__ == "__main__":
    main()
