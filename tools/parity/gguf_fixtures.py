#!/usr/bin/env python
"""Writes the GGUF fixtures of the C++ tests (tests/fixtures/quant/gguf*) with the gguf package.

gguf_blocks.safetensors    <type>.blocks: random valid blocks, <type>.values: what gguf dequantizes them to
gguf_quantize.safetensors  values, and <type>.blocks: what gguf quantizes them to
gguf_metadata.gguf         a value and an array of every metadata type, tensors of several types
gguf_shapes.gguf           comfy.gguf.orig_shape.*, a prefix, five dimensions, a long name
gguf_shapes.safetensors    the tensors of gguf_shapes.gguf, dequantized, in their true shapes
"""

import argparse
from pathlib import Path

import common
import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

SEED = 31
TYPES = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"]
QUANTIZED_BY_PYTHON = ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
# where a block holds half-precision scales
HALVES = {
    "Q8_0": [0], "Q4_0": [0], "Q5_0": [0], "IQ4_NL": [0], "IQ4_XS": [0], "Q4_1": [0, 2], "Q5_1": [0, 2],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def random_blocks(random, name, rows, columns):
    """[rows, bytes of a row]: every bit random, but scales finite: most of a trained weight's size, some
    zero, subnormal or large."""
    elements, size = gguf.GGML_QUANT_SIZES[Type[name]]
    blocks = random.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    for offset in HALVES[name]:
        scales = random.normal(0, 0.01, len(blocks)).astype(np.float16)
        odd = random.integers(0, 8, len(blocks))
        scales[odd == 0] = 0
        scales[odd == 1] = np.float16(6e-8) * random.integers(1, 1000)
        scales[odd == 2] = -30000
        blocks[:, offset : offset + 2] = scales.reshape(-1, 1).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_blocks(out):
    random = np.random.default_rng(SEED)
    tensors = {}
    for name in TYPES:
        columns = 512 if gguf.GGML_QUANT_SIZES[Type[name]][0] == 256 else 96
        blocks = random_blocks(random, name, 6, columns)
        values = gguf.quants.dequantize(blocks, Type[name])
        assert values.dtype == np.float32 and np.isfinite(values).all()
        tensors[f"{name}.blocks"] = torch.from_numpy(blocks)
        tensors[f"{name}.values"] = torch.from_numpy(values)
    common.save_tensors(tensors, out / "gguf_blocks.safetensors")


def write_quantize(out):
    random = np.random.default_rng(SEED + 1)
    values = random.normal(0, 0.02, (24, 128)).astype(np.float32)
    values[0] = 0
    values[1, :64] = 0.5  # a constant block: max equals min
    values[2] = np.abs(values[2])
    values[3] *= 1e5
    values[4] *= 1e-6  # scales that are subnormal halves
    values[5] = np.tile(np.arange(-8, 8), 8)  # halves between two steps
    values[6] = np.tile(np.arange(-64, 64) / 127, 1)
    values[7, ::3] = 0
    tensors = {"values": torch.from_numpy(values)}
    for name in QUANTIZED_BY_PYTHON:
        tensors[f"{name}.blocks"] = torch.from_numpy(gguf.quants.quantize(values, Type[name]))
    common.save_tensors(tensors, out / "gguf_quantize.safetensors")


def write_metadata(out):
    random = np.random.default_rng(SEED + 2)
    writer = gguf.GGUFWriter(out / "gguf_metadata.gguf", "flux")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint32("a.u32", 4000000000)
    writer.add_int32("a.i32", -2000000000)
    writer.add_float32("a.f32", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße")
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_int64("a.i64", -(2**63))
    writer.add_float64("a.f64", 0.1)
    writer.add_array("b.strings", ["<pad>", "", "▁the"])
    writer.add_array("b.floats", [0.5, -1.25])
    writer.add_array("b.ints", [1, -2, 3])
    writer.add_array("b.bools", [True, False])
    writer.add_array("b.bytes", b"\x00\xff\x10")
    for name, kind in (("f32", np.float32), ("f16", np.float16), ("i32", np.int32)):
        writer.add_tensor(f"plain.{name}", random.integers(-9, 9, (3, 5)).astype(kind))
    writer.add_tensor("block.q8", random_blocks(random, "Q8_0", 3, 64), raw_dtype=Type.Q8_0)
    writer.add_tensor("block.q4", random_blocks(random, "Q4_K", 2, 256), raw_dtype=Type.Q4_K)
    writer.add_tensor("bf16", random.integers(0, 255, (2, 6), dtype=np.uint8), raw_dtype=Type.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_shapes(out):
    random = np.random.default_rng(SEED + 3)
    writer = gguf.GGUFWriter(out / "gguf_shapes.gguf", "sdxl")
    expected = {}
    prefix = "model.diffusion_model."

    def add(name, stored, kind, shape=None, prefix=prefix):
        values = gguf.quants.dequantize(stored, kind)
        if shape is not None:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", shape)
            values = values.reshape(shape)
        plain = kind in (Type.F32, Type.F16)
        writer.add_tensor(prefix + name, stored, raw_dtype=None if plain else kind)
        expected[name] = torch.from_numpy(values.copy())

    # 320 columns are no whole K-quant blocks: the writer folds the rows (city96's shape_fix)
    add("folded.weight", random_blocks(random, "Q4_K", 8 * 320 // 256, 256), Type.Q4_K, [8, 320])
    add("conv.weight", random_blocks(random, "Q8_0", 9, 256), Type.Q8_0, [8, 32, 3, 3])
    add("folded_plain.weight", random.normal(size=(5, 256)).astype(np.float16), Type.F16, [4, 320])
    add("linear.weight", random_blocks(random, "Q5_0", 6, 64), Type.Q5_0)
    add("row.weight", random_blocks(random, "Q8_0", 1, 64).reshape(-1), Type.Q8_0)
    add("bias", random.normal(size=7).astype(np.float32), Type.F32)
    add("x" * 127, random.normal(size=(2, 3)).astype(np.float32), Type.F32, prefix="")
    add("patch_embedding.weight", random.normal(size=(2, 3, 1, 2, 2)).astype(np.float32), Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    common.save_tensors(expected, out / "gguf_shapes.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "tests/fixtures/quant")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_blocks(out)
    write_quantize(out)
    write_metadata(out)
    write_shapes(out)


if __name__ == "__main__":
    main()
