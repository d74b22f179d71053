#!/usr/bin/env python
"""Writes tests/fixtures/quant/int8.safetensors: weights that torchao's Int8Tensor.from_hp quantizes, what
they dequantize to, and the outputs of linear layers with dynamically quantized inputs. Seeded."""

import torch
from common import ROOT, save_file
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)

OUT = ROOT / "tests/fixtures/quant/int8.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRANULARITIES = {"row": PerRow(), "tensor": PerTensor(), "group": PerGroup(32)}
ROWS, COLUMNS = 16, 64


def weight_of(generator, dtype):
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.3
    weight[3] = 0  # the scale's lower bound
    weight[4] = torch.linspace(-1e-6, 1e-6, COLUMNS)
    weight[5] = (torch.arange(COLUMNS) - 32) * 0.5  # values half way between two steps
    weight[5, 0] = -127.5
    weight[6, 7] = 900.0
    return weight.to(dtype)


def main():
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for dtype_name, dtype in DTYPES.items():
        for name, granularity in GRANULARITIES.items():
            linear = torch.nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype)
            linear.weight = torch.nn.Parameter(weight_of(generator, dtype), requires_grad=False)
            tensors[f"{dtype_name}.{name}.weight"] = linear.weight.data.clone()
            quantize_(linear, Int8WeightOnlyConfig(granularity=granularity))
            quantized = linear.weight
            for component in ("qdata", "scale", "zero_point"):
                tensors[f"{dtype_name}.{name}.{component}"] = getattr(quantized, component).contiguous()
            tensors[f"{dtype_name}.{name}.dequantized"] = quantized.dequantize(torch.float32)

        for name in ("row", "tensor"):
            for with_bias in (False, True):
                key = f"{dtype_name}.dynamic.{name}.{'bias' if with_bias else 'plain'}"
                linear = torch.nn.Linear(COLUMNS, ROWS, bias=with_bias, dtype=dtype)
                linear.weight = torch.nn.Parameter(weight_of(generator, dtype), requires_grad=False)
                x = torch.randn(2, 7, COLUMNS, generator=generator)
                x[0, 1] = 0
                x[0, 2] *= 1e-7
                x[1, 3, 5] = 500.0
                x[1, 4] = (torch.arange(COLUMNS) - 32) * 0.5
                x = x.to(dtype)
                if with_bias:
                    linear.bias = torch.nn.Parameter(torch.randn(ROWS, generator=generator).to(dtype), requires_grad=False)
                    tensors[f"{key}.bias"] = linear.bias.data.clone()
                quantize_(linear, Int8DynamicActivationInt8WeightConfig(granularity=[PerRow(), GRANULARITIES[name]]))
                for component in ("qdata", "scale"):
                    tensors[f"{key}.{component}"] = getattr(linear.weight, component).contiguous()
                tensors[f"{key}.x"] = x
                with torch.no_grad():
                    tensors[f"{key}.y"] = linear(x)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT)
    print(f"{OUT}: {len(tensors)} tensors, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
