"""Compares the tensors of two safetensors files: the greatest difference relative to the greatest value.

  compare_tensors.py EXPECTED GOT LIMIT [--json FILE]      exits with 1 above LIMIT, or for NaN

Needs torch alone, for machines where nothing else is installed.
"""
import json
import struct
import sys

import torch

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}


def read(path):
    data = open(path, "rb").read()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = torch.frombuffer(bytearray(data[begin:end]), dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def main():
    expected, got, limit = read(sys.argv[1]), read(sys.argv[2]), float(sys.argv[3])
    errors = {}
    for name, tensor in expected.items():
        a, b = tensor.double(), got[name].double()
        error = ((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item() if a.shape == b.shape else float("nan")
        errors[name] = error
        print(f"{name} {list(a.shape)}: {error:.2e} of the greatest value (limit {limit:g})")
    if "--json" in sys.argv:
        with open(sys.argv[sys.argv.index("--json") + 1], "w") as handle:
            json.dump({"limit": limit, "errors": errors}, handle)
    sys.exit(0 if errors and all(error <= limit for error in errors.values()) else 1)


if __name__ == "__main__":
    main()
