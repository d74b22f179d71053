#!/usr/bin/env python3
"""Writes tests/fixtures/quant: quantized checkpoints by the libraries that define them, and their dequantized weights.

Each `<name>.safetensors` (or folder) has a `<name>.expected.safetensors`: every quantized parameter as the library
dequantizes it in float32. Usage: tools/parity/.venv/bin/python tools/parity/quant_fixtures.py [NAME ...]

Where a library has no path on a CPU, its formula stands in, and the function here says so:
- Int4Tensor (torchao quantizes it with mslk kernels, and has no dequantize): `int4_plain`
- Int4TilePackedTo4dTensor (packed by a CUDA kernel): `tile_pack`; quantized and dequantized by torchao's tinygemm functions
- ComfyUI's formats: torchao's numbers under ComfyUI's names, with its order of nibbles
"""
import json
import struct
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from safetensors.torch import save_file
from torchao.float8.inference import Float8MMConfig
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.mx_formats.utils import to_blocked
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int4TilePackedTo4dTensor,
    Int4Tensor,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    MappingType,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
)
from torchao.quantization.quant_primitives import (
    _choose_qparams_affine_tinygemm,
    _dequantize_affine_tinygemm,
    _quantize_affine_tinygemm,
    dequantize_affine,
)
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs

OUT = Path(__file__).resolve().parents[2] / "tests/fixtures/quant"
GENERATOR = torch.Generator().manual_seed(20)


def weight(n, k, dtype=torch.bfloat16):
    """Like a trained weight: small values, rows of different size, a few that stand out."""
    w = torch.randn(n, k, generator=GENERATOR) * 0.02 * (1 + torch.arange(n).unsqueeze(1) / n)
    w.view(-1)[torch.randint(n * k, (n * k // 64,), generator=GENERATOR)] *= 6
    return w.to(dtype)


def save(name, tensors, expected, metadata=None):
    """`tensors`: what the file holds. `expected`: parameter -> float32 [out, in]."""
    OUT.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    save_file(tensors, OUT / f"{name}.safetensors", metadata={"format": "pt", **(metadata or {})})
    save_file({k: v.float().contiguous() for k, v in expected.items()}, OUT / f"{name}.expected.safetensors")


def save_torchao(name, state, expected):
    tensors, metadata = flatten_tensor_state_dict(state)
    save(name, tensors, expected, metadata)
    return tensors, metadata


def unalign(name):
    """The same file with a header whose length is no multiple of 8, as some writers leave it."""
    path = OUT / f"{name}.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip(b" ")
    while (len(header) % 8) != 3:
        header += b" "
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def dequantized(state):
    return {k: v.dequantize(torch.float32) for k, v in state.items() if type(v) is not torch.Tensor}


# --- torchao ---------------------------------------------------------------------------------------------------------

def torchao_float8():
    state = {
        "row.weight": Float8Tensor.from_hp(weight(48, 96), granularity=PerRow()),
        "row.bias": torch.randn(48, generator=GENERATOR).bfloat16(),
        "e5m2.weight": Float8Tensor.from_hp(weight(32, 64), float8_dtype=torch.float8_e5m2, granularity=PerRow()),
        "tensor.weight": Float8Tensor.from_hp(weight(32, 64), granularity=PerTensor()),
        "group.weight": Float8Tensor.from_hp(weight(32, 128), granularity=PerGroup(32)),
        "block.weight": Float8Tensor.from_hp(weight(64, 96), granularity=PerBlock([32, 48])),
        "dynamic_row.weight": Float8Tensor.from_hp(
            weight(32, 64), granularity=PerRow(), mm_config=Float8MMConfig(use_fast_accum=True),
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow())),
        "dynamic_tensor.weight": Float8Tensor.from_hp(
            weight(32, 64), granularity=PerTensor(),
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerTensor())),
        # A parameter of the root, as Wan's: no module before its name.
        "scale_shift_table": torch.randn(2, 8, generator=GENERATOR),
    }
    save_torchao("torchao_float8", state, dequantized(state))


def torchao_int8():
    symmetric = Int8Tensor.from_hp(weight(32, 64), granularity=PerRow())
    without_zero = Int8Tensor(symmetric.qdata, symmetric.scale, symmetric.block_size, torch.bfloat16)
    scaled = Int8Tensor.from_hp(weight(32, 64), granularity=PerRow())
    scaled.act_pre_scale = torch.rand(64, generator=GENERATOR).bfloat16() + 0.5
    state = {
        "row.weight": symmetric,
        "without_zero_point.weight": without_zero,
        "group.weight": Int8Tensor.from_hp(weight(32, 128), granularity=PerGroup(32)),
        "tensor.weight": Int8Tensor.from_hp(weight(32, 64), granularity=PerTensor()),
        "asymmetric.weight": Int8Tensor.from_hp(
            weight(32, 64) + 0.03, granularity=PerRow(), mapping_type=MappingType.ASYMMETRIC),
        "dynamic.weight": Int8Tensor.from_hp(
            weight(32, 64), granularity=PerRow(), act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow())),
        "pre_scaled.weight": scaled,
    }
    expected = dequantized(state)
    # torchao multiplies the input; the weight that the unscaled input meets is this one.
    expected["pre_scaled.weight"] = expected["pre_scaled.weight"] * scaled.act_pre_scale.float()
    save_torchao("torchao_int8", state, expected)


def int4_plain(w, group, activation=torch.bfloat16, pre_scale=None):
    """Int4Tensor.from_hp by formula: asymmetric in groups of a row, scale and offset [k / group, n]."""
    groups = w.float().reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    zero = low + scale * 8
    q = (groups.sub(low).div(scale).round().clamp(0, 15) - 8).to(torch.int8).reshape(w.shape)
    qdata = ((q[:, ::2] & 0xF) | (q[:, 1::2] << 4)).contiguous()
    scale, zero = (x.view(w.shape[0], -1).t().contiguous().to(w.dtype) for x in (scale, zero))
    tensor = Int4Tensor(qdata, scale, zero, [1, group], w.shape, pre_scale, activation)
    spread = lambda x: x.float().t().repeat_interleave(group, 1)
    dequantized = q.float() * spread(scale) + spread(zero)
    return tensor, dequantized if pre_scale is None else dequantized * pre_scale.float()


def torchao_int4():
    state, expected = {}, {}
    for name, n, k, group, activation in [("g32", 32, 64, 32, torch.bfloat16), ("g64", 48, 192, 64, torch.bfloat16),
                                          ("g128", 32, 256, 128, torch.float8_e4m3fn)]:
        state[f"{name}.weight"], expected[f"{name}.weight"] = int4_plain(weight(n, k), group, activation)
    state["pre_scaled.weight"], expected["pre_scaled.weight"] = int4_plain(
        weight(32, 64), 32, pre_scale=torch.rand(64, generator=GENERATOR).bfloat16() + 0.5)
    state["g32.bias"] = torch.randn(32, generator=GENERATOR).bfloat16()
    save_torchao("torchao_int4", state, expected)
    unalign("torchao_int4")
    # What a linear layer cannot hold: a stack of experts.
    two = [int4_plain(weight(8, 64), 32)[0] for _ in range(2)]
    experts = Int4Tensor(*(torch.stack([getattr(t, a) for t in two]) for a in ("qdata", "scale", "zero_point")),
                         [1, 1, 32], torch.Size([2, 8, 64]))
    save_torchao("torchao_int4_experts", {"experts.weight": experts}, {})


def tile_pack(q):
    """`_convert_weight_to_int4pack(u8[n, k / 2], 8)` of CUDA by formula; q [n, k] in 0..15. Returns int32 [n/8, k/128, 32, 4]."""
    n, k = q.shape
    out = torch.zeros(n // 8, k // 128, 32, 4, dtype=torch.int64)
    for lane in range(32):
        for j in range(4):
            for half in range(2):        # the two k-tiles of 16 that one int32 holds
                for part in range(2):    # bytes t % 4 and t % 4 + 4 of each
                    column = (2 * j + half) * 16 + (lane % 4 + 4 * part) * 2
                    tiles = q.view(n // 8, 8, k // 128, 128)[:, lane // 4, :, :].long()
                    even, odd = tiles[..., column], tiles[..., column + 1]
                    slot = 2 * half + part
                    out[:, :, lane, j] |= odd << (16 + 4 * slot) | even << (4 * slot)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def torchao_int4_tile_packed():
    state, expected = {}, {}
    for name, n, k, group in [("even", 8, 1024, 128), ("padded", 20, 200, 32)]:
        w = weight(n, k)
        full = torch.nn.functional.pad(w, (0, -k % 1024, 0, -n % 8))
        bounds = dict(quant_min=0, quant_max=15)
        scale, zero = _choose_qparams_affine_tinygemm(
            full, MappingType.ASYMMETRIC, (1, group), torch.int32, scale_dtype=torch.bfloat16,
            zero_point_dtype=torch.bfloat16, **bounds)
        q = _quantize_affine_tinygemm(full, (1, group), scale, zero, torch.int32, **bounds)
        both = torch.stack([scale.reshape(full.shape[0], -1), zero.reshape(full.shape[0], -1)], 2)
        state[f"{name}.weight"] = Int4TilePackedTo4dTensor(
            tile_pack(q), both.transpose(0, 1).contiguous(), [1, group], w.shape)
        expected[f"{name}.weight"] = _dequantize_affine_tinygemm(
            q, (1, group), scale, zero, torch.int32, output_dtype=torch.float32, **bounds)[:n, :k]
    save_torchao("torchao_int4_tile_packed", state, expected)


def torchao_intx():
    state = {
        "int4.weight": IntxUnpackedToInt8Tensor.from_hp(weight(32, 64), (1, 32), torch.int4),
        "int3_asymmetric.weight": IntxUnpackedToInt8Tensor.from_hp(
            weight(32, 64) + 0.02, (1, 16), torch.int3, mapping_type=MappingType.ASYMMETRIC),
        "row.weight": IntxUnpackedToInt8Tensor.from_hp(weight(32, 64, torch.float32), (1, 64), torch.int8),
    }
    base = state["int4.weight"]
    state["float_zero_point.weight"] = IntxUnpackedToInt8Tensor(
        base.qdata, base.scale, (torch.randn(base.scale.shape, generator=GENERATOR)).bfloat16(), torch.int4, [1, 32],
        torch.bfloat16, None)
    expected = {k: dequantize_affine(v.qdata, v.block_size, v.scale, v.zero_point, torch.int8,
                                     output_dtype=torch.float32) for k, v in state.items()}
    save_torchao("torchao_intx", state, expected)


def torchao_nvfp4():
    state = {}
    for name, n, k, two_level, swizzled in [("plain", 32, 64, False, False), ("scaled", 32, 96, True, False),
                                            ("swizzled", 136, 80, False, True), ("both", 32, 128, True, True)]:
        w = weight(n, k)
        scale = per_tensor_amax_to_scale(w.abs().max()) if two_level else None
        state[f"{name}.weight"] = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=scale, is_swizzled_scales=swizzled)
    save_torchao("torchao_nvfp4", state, dequantized(state))


def torchao_mx():
    state = {}
    for name, n, k, dtype, swizzled in [
            ("e4m3", 32, 64, torch.float8_e4m3fn, False), ("e5m2", 32, 64, torch.float8_e5m2, False),
            ("e4m3_swizzled", 40, 160, torch.float8_e4m3fn, True), ("e2m1", 32, 96, torch.float4_e2m1fn_x2, False),
            ("e2m1_swizzled", 32, 64, torch.float4_e2m1fn_x2, True)]:
        w = weight(n, k)
        w[1] = 0      # the smallest exponent there is
        w[2] *= 2e-30
        state[f"{name}.weight"] = MXTensor.to_mx(w, dtype, is_swizzled_scales=swizzled)
    save_torchao("torchao_mx", state, dequantized(state))


def torchao_sharded():
    """As diffusers shards: after flattening, so that a weight's tensors lie in different files; metadata in all."""
    state = {
        "a.weight": Float8Tensor.from_hp(weight(32, 64), granularity=PerRow()),
        "a.bias": torch.randn(32, generator=GENERATOR).bfloat16(),
        "b.weight": int4_plain(weight(32, 64), 32)[0],
        "scale_shift_table": torch.randn(2, 8, generator=GENERATOR),
    }
    expected = {"a.weight": state["a.weight"].dequantize(torch.float32),
                "b.weight": state["b.weight"].qdata}
    tensors, metadata = flatten_tensor_state_dict(state)
    folder = OUT / "torchao_sharded"
    folder.mkdir(parents=True, exist_ok=True)
    first = {"a._weight_qdata", "b._weight_scale", "scale_shift_table"}
    weight_map = {}
    for shard, keys in enumerate([first, set(tensors) - first], start=1):
        file = f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors"
        save_file({k: tensors[k].contiguous() for k in sorted(keys)}, folder / file, metadata={"format": "pt", **metadata})
        weight_map.update({k: file for k in keys})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    b = state["b.weight"]
    q = torch.stack([(b.qdata << 4) >> 4, b.qdata >> 4], 2).view(32, 64).float()
    spread = lambda x: x.float().t().repeat_interleave(32, 1)
    expected["b.weight"] = q * spread(b.scale) + spread(b.zero_point)
    save_file(expected, OUT / "torchao_sharded.expected.safetensors")


def torchao_encoders():
    """Weights and what torchao's from_hp (int4: the formula) makes of them."""
    tensors = {}
    for dtype in (torch.bfloat16, torch.float32):
        name, w = str(dtype).split(".")[1], weight(32, 64, dtype)
        float8, int4 = Float8Tensor.from_hp(w, granularity=PerRow()), int4_plain(w, 32)[0]
        tensors.update({f"{name}.weight": w, f"{name}.float8.qdata": float8.qdata, f"{name}.float8.scale": float8.scale,
                        f"{name}.int4.qdata": int4.qdata, f"{name}.int4.scale": int4.scale,
                        f"{name}.int4.zero_point": int4.zero_point})
    save_file(tensors, OUT / "torchao_encoders.safetensors")


# --- bitsandbytes ----------------------------------------------------------------------------------------------------

def flat_blocks(qdata, state):
    """Blocks over the flattened weight, as bitsandbytes quantizes and as its torch code dequantizes.

    The AVX-512 kernel of bitsandbytes 0.50.2 is wrong by whole scales where a row is a multiple of 32 values but not of
    the blocks (dequantizing what it quantized misses by more than a block's greatest value), so it is the reference
    only elsewhere.
    """
    n, k = state.shape
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = qdata.view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: n * k].int()
    result = (state.code[codes] * absmax.repeat_interleave(state.blocksize)[: n * k]).view(n, k)
    if k % state.blocksize == 0 or k % 32 != 0:
        state.dtype = torch.float32
        assert torch.equal(bnb.dequantize_4bit(qdata, state).reshape(n, k), result)
    return result


def bitsandbytes_4bit():
    tensors, expected = {}, {}
    for name, n, k, options in [
            ("nf4", 32, 64, dict(quant_type="nf4")),
            ("fp4", 32, 64, dict(quant_type="fp4", blocksize=128)),
            # Blocks cross the ends of rows, and the last one is short.
            ("uneven", 37, 50, dict(quant_type="nf4")),
            ("nested", 32, 100, dict(quant_type="nf4", compress_statistics=True)),
            ("nested_many", 40, 256, dict(quant_type="fp4", blocksize=32, compress_statistics=True)),
            ("bf16_storage", 32, 64, dict(quant_type="nf4", quant_storage=torch.bfloat16)),
            ("f32_storage", 32, 64, dict(quant_type="nf4", quant_storage=torch.float32)),
    ]:
        qdata, state = bnb.quantize_4bit(weight(n, k), **options)
        tensors[f"{name}.weight"] = qdata
        tensors.update({f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()})
        expected[f"{name}.weight"] = flat_blocks(qdata, state)
    tensors["nf4.bias"] = torch.randn(32, generator=GENERATOR).bfloat16()
    save("bitsandbytes_4bit", tensors, expected)


def bitsandbytes_int8():
    tensors, expected = {}, {}
    for name, n, k in [("a", 32, 64), ("b", 48, 40)]:
        q, scb, _ = bnb.int8_vectorwise_quant(weight(n, k, torch.float16))
        tensors.update({f"{name}.weight": q, f"{name}.SCB": scb})
        expected[f"{name}.weight"] = bnb.int8_vectorwise_dequant(q, scb)
    tensors["a.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    save("bitsandbytes_int8", tensors, expected)


def bitsandbytes_encoders():
    tensors = {}
    for dtype in (torch.bfloat16, torch.float32):
        for shape, name in [((32, 64), "even"), ((37, 51), "odd")]:
            w = weight(*shape, dtype)
            w[3] = 0
            qdata, state = bnb.quantize_4bit(w, quant_type="nf4")
            prefix = f"{str(dtype).split('.')[1]}.{name}"
            tensors.update({f"{prefix}.weight": w, f"{prefix}.qdata": qdata, f"{prefix}.absmax": state.absmax,
                            f"{prefix}.quant_map": state.code})
    save_file(tensors, OUT / "bitsandbytes_encoders.safetensors")


# --- ComfyUI ---------------------------------------------------------------------------------------------------------

def fp8(w, dtype=torch.float8_e4m3fn, rows=False):
    high = w.float().abs().amax(1, keepdim=True) if rows else w.float().abs().max()
    scale = high / torch.finfo(dtype).max
    q = (w.float() / scale).to(dtype)
    return q, scale, q.float() * scale


def text(value):
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def swap_nibbles(packed):
    return (packed >> 4) | (packed << 4)


def comfy_metadata():
    """`_quantization_metadata` without the prefix that the keys have; NVFP4 and MXFP8 by torchao's numbers."""
    prefix, tensors, expected, layers = "model.diffusion_model.", {}, {}, {}
    q, scale, expected[prefix + "a.weight"] = fp8(weight(32, 64))
    tensors.update({"a.weight": q, "a.weight_scale": scale, "a.input_scale": torch.tensor(0.5)})
    q, scale, expected[prefix + "b.weight"] = fp8(weight(32, 64), torch.float8_e5m2, rows=True)
    tensors.update({"b.weight": q, "b.weight_scale": scale.flatten()})
    layers.update(a={"format": "float8_e4m3fn"}, b={"format": "float8_e5m2"})

    w = weight(48, 80)
    nvfp4 = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().max()))
    tensors.update({"c.weight": swap_nibbles(nvfp4.qdata), "c.weight_scale": to_blocked(nvfp4.scale).view(128, 8),
                    "c.weight_scale_2": nvfp4.per_tensor_scale})
    expected[prefix + "c.weight"] = nvfp4.dequantize(torch.float32)
    layers["c"] = {"format": "nvfp4"}

    mx = MXTensor.to_mx(weight(32, 160), torch.float8_e4m3fn)
    tensors.update({"d.weight": mx.qdata, "d.weight_scale": to_blocked(mx.scale.view(torch.uint8)).view(128, 8)})
    expected[prefix + "d.weight"] = mx.dequantize(torch.float32)
    layers["d"] = {"format": "mxfp8"}
    tensors["a.bias"] = torch.randn(32, generator=GENERATOR).bfloat16()
    save("comfy_metadata", {prefix + k: v for k, v in tensors.items()}, expected,
         {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})})


def comfy_tensors():
    """`<layer>.comfy_quant`; int8 with one scale, one a row and blocks; a fp8 layer that has a scale and no description."""
    tensors, expected = {}, {}
    q, scale, expected["a.weight"] = fp8(weight(32, 64))
    tensors.update({"a.weight": q, "a.weight_scale": scale.view(1),
                    "a.comfy_quant": text({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})})
    for name, form, block in [("b", "int8_tensorwise", (32, 64)), ("c", "int8_tensorwise", (1, 64)),
                              ("d", "int8_blockwise", (16, 32))]:
        w = weight(32, 64).float()
        blocks = w.view(32 // block[0], block[0], 64 // block[1], block[1])
        scale = blocks.abs().amax((1, 3)) / 127
        q = (blocks / scale[:, None, :, None]).round().to(torch.int8)
        expected[f"{name}.weight"] = (q.float() * scale[:, None, :, None]).reshape(32, 64)
        tensors.update({f"{name}.weight": q.reshape(32, 64),
                        f"{name}.weight_scale": scale if scale.numel() > 1 else scale.reshape(()),
                        f"{name}.comfy_quant": text({"format": form})})
    q, scale, expected["e.weight"] = fp8(weight(32, 64))
    tensors.update({"e.weight": q, "e.weight_scale": scale})
    q, scale, dequantized = fp8(weight(32, 64))
    pre = torch.rand(64, generator=GENERATOR) + 0.5
    tensors.update({"f.weight": q, "f.weight_scale": scale, "f.pre_quant_scale": pre,
                    "f.comfy_quant": text({"format": "float8_e4m3fn"})})
    expected["f.weight"] = dequantized * pre
    save("comfy_tensors", tensors, expected)


def comfy_legacy():
    """The marker `scaled_fp8` with scale_weight and scale_input."""
    prefix, tensors, expected = "model.diffusion_model.", {}, {}
    q, scale, expected[prefix + "a.weight"] = fp8(weight(32, 64))
    tensors.update({"a.weight": q, "a.scale_weight": scale, "a.scale_input": torch.tensor(1.0),
                    "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
                    "a.bias": torch.randn(32, generator=GENERATOR).bfloat16(),
                    "norm.weight": torch.ones(64).bfloat16()})
    save("comfy_legacy", {prefix + k: v for k, v in tensors.items()}, expected)


def plain_fp8():
    """Values cast to fp8 and nothing else."""
    w = weight(32, 64).to(torch.float8_e4m3fn)
    tensors = {"a.weight": w, "a.bias": torch.randn(32, generator=GENERATOR).to(torch.float8_e4m3fn),
               "conv.weight": torch.randn(4, 4, 3, 3, generator=GENERATOR).to(torch.float8_e4m3fn)}
    save("plain_fp8", tensors, {"a.weight": w.float()})


# --- what ferry writes -----------------------------------------------------------------------------------------------

def quantization_configs():
    """config.json's quantization_config, as diffusers' classes write it."""
    rows = ["proj_out"]
    configs = {
        "int8wo": TorchAoConfig(Int8WeightOnlyConfig(), rows),
        "int8wo:64": TorchAoConfig(Int8WeightOnlyConfig(granularity=PerGroup(64))),
        "int8da8w": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
        "fp8wo": TorchAoConfig(Float8WeightOnlyConfig()),
        "fp8da8w": TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), rows),
        "int4wo": TorchAoConfig(Int4WeightOnlyConfig()),
        "int4wo:32": TorchAoConfig(Int4WeightOnlyConfig(group_size=32)),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=rows,
                                  bnb_4bit_compute_dtype=torch.bfloat16),
    }
    text = json.dumps({k: v.to_dict() for k, v in configs.items()}, indent=1)
    (OUT / "quantization_configs.json").write_text(text + "\n")


def fuzz_corpus():
    """Headers of the fixtures, for tests/fuzz/quant_metadata_fuzz.cpp."""
    corpus = OUT.parents[1] / "fuzz/corpus/quant_metadata"
    corpus.mkdir(parents=True, exist_ok=True)
    for path in sorted(OUT.glob("*.safetensors")):
        if "expected" in path.name or "encoders" in path.name or path.name == "int8.safetensors":
            continue
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        texts = {}
        for key, entry in header.items():
            if key.endswith(".comfy_quant") or ".quant_state." in key or key.endswith(".weight_format"):
                begin, end = entry["data_offsets"]
                texts[key] = data[8 + length + begin : 8 + length + end].decode()
        tensors = {k: [v["dtype"], *v["shape"]] for k, v in header.items() if k != "__metadata__"}
        seed = {"metadata": header["__metadata__"], "tensors": tensors, "texts": texts}
        (corpus / f"{path.stem}.json").write_text(json.dumps(seed))


ALL = [bitsandbytes_4bit, bitsandbytes_int8, bitsandbytes_encoders, comfy_metadata, comfy_tensors, comfy_legacy, plain_fp8,
       torchao_encoders, torchao_float8, torchao_int8, torchao_int4, torchao_int4_tile_packed, torchao_intx, torchao_nvfp4, torchao_mx,
       torchao_sharded, quantization_configs, fuzz_corpus]


def main():
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    for function in ALL:
        GENERATOR.manual_seed(20)
        if not wanted or function.__name__ in wanted:
            function()
    total = sum(p.stat().st_size for p in OUT.rglob("*") if p.is_file())
    print(f"{OUT}: {total / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
