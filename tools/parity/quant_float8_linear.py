#!/usr/bin/env python
"""Writes tests/fixtures/quant/float8_linear.safetensors: linear layers whose input torchao quantizes to
float8 as it runs. Seeded."""

import torch
from common import ROOT, save_file
from torchao.quantization import Float8Tensor, PerRow, PerTensor
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

OUT = ROOT / "tests/fixtures/quant/float8_linear.safetensors"


def main():
    generator = torch.Generator().manual_seed(12)
    tensors = {}
    for name, granularity in {"row": PerRow(), "tensor": PerTensor()}.items():
        weight = (torch.randn(32, 64, generator=generator) * 0.3).bfloat16()
        x = torch.randn(12, 64, generator=generator)
        x[3] *= 100
        x = x.bfloat16()
        quantized = Float8Tensor.from_hp(weight, granularity=granularity)
        # What its linear function does with act_quant_kwargs, but for torch._scaled_mm, which is
        # taken in float32 here: the same sums, rounded to bfloat16 once.
        kwargs = QuantizeTensorToFloat8Kwargs(granularity=granularity)
        input = Float8Tensor.from_hp(x, kwargs.float8_dtype, kwargs.granularity)
        y = (input.qdata.float() @ quantized.qdata.float().t()) * input.scale * quantized.scale.t()
        tensors |= {f"{name}.qdata": quantized.qdata.view(torch.uint8), f"{name}.scale": quantized.scale}
        tensors |= {f"{name}.x": x, f"{name}.y": y.bfloat16()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT)
    print(f"{OUT}: {len(tensors)} tensors, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
