"""Quantized weights of Python under offloading: equal to resident, the same objects throughout."""

from __future__ import annotations

import pytest
import torch
from offload_nets import input_of, make
from torch import nn

import ferry
from ferry.slots import inner_tensors

torchao = pytest.importorskip("torchao.quantization")

SCHEMES = {
    "int8wo": lambda: torchao.Int8WeightOnlyConfig(version=2),
    "int8da8w": lambda: torchao.Int8DynamicActivationInt8WeightConfig(version=2),
    "fp8wo": lambda: torchao.Float8WeightOnlyConfig(),
    "intx": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32)),
}
KINDS = {
    "block_level": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf_level": {"offload_type": "leaf_level"},
}


def quantized(scheme: str) -> nn.Module:
    net = make().to(torch.bfloat16)
    net.linear_2 = nn.Linear(128, 128, dtype=torch.bfloat16)  # torchao copies what is tied
    torchao.quantize_(net, SCHEMES[scheme]())
    return net


def objects(net: nn.Module) -> list[int]:
    return [id(one) for p in net.parameters() for one in (p, *inner_tensors(p).values())]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("disk", [False, True])
@torch.no_grad()
def test_equals_resident(scheme, kind, stream, disk, tmp_path):
    if not hasattr(torchao, "PerGroup"):
        from torchao.quantization.granularity import PerGroup

        torchao.PerGroup = PerGroup
    net, x = quantized(scheme), input_of().to(torch.bfloat16)
    expected = net(x)
    before = objects(net)
    assert len(before) > 2 * len(list(net.parameters()))
    made = ferry.apply_group_offloading(
        net, "cpu", use_stream=stream, offload_to_disk_path=tmp_path if disk else None, **KINDS[kind]
    )
    layer = net.blocks[1].proj_in.weight
    assert all(ferry._C.is_stub(one) or one.numel() * one.element_size() < 16 << 10
               for one in inner_tensors(layer).values())  # fmt: skip
    for _ in range(3):
        assert torch.equal(net(x), expected)
    assert objects(net) == before
    made.remove()
    assert objects(net) == before
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_diffusers_refuses_disk_where_ferry_does_not(tmp_path):
    from diffusers.hooks import apply_group_offloading

    net = quantized("int8wo")
    with pytest.raises(ValueError, match="TorchAO"):
        apply_group_offloading(
            net,
            onload_device=torch.device("cpu"),
            offload_type="leaf_level",
            offload_to_disk_path=str(tmp_path),
        )


@torch.no_grad()
def test_bitsandbytes_and_gguf_parameters():
    bnb = pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.gguf.utils import GGUFParameter

    linear = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    linear = linear.to("cpu")
    gguf = nn.Linear(4, 4)
    gguf.weight = GGUFParameter(torch.arange(68, dtype=torch.uint8).repeat(300, 1), quant_type=8)
    net = nn.ModuleList([linear, gguf])
    state = linear.weight.quant_state
    absmax = None if state is None else state.absmax.clone()
    bytes_before = gguf.weight.as_tensor().clone() if hasattr(gguf.weight, "as_tensor") else gguf.weight.data.clone()
    made = ferry.apply_group_offloading(net, "cpu", offload_type="leaf_level")
    with made.client.lease([1]):
        assert torch.equal(gguf.weight.data.as_subclass(torch.Tensor), bytes_before)
    made.remove()
    assert type(gguf.weight).__name__ == "GGUFParameter" and gguf.weight.quant_type == 8
    if absmax is not None:
        assert torch.equal(linear.weight.quant_state.absmax, absmax)
