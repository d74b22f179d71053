"""apply_group_offloading on an accelerator: the fake one, whose memory the host cannot read."""

from __future__ import annotations

from typing import ClassVar

import ferry_fake  # before anything asks torch for accelerators
import pytest
import torch
from offload_nets import Net, identities, input_of, make
from torch import nn

import ferry
from ferry.slots import inner_tensors

HOMES = {
    "pinned": {},
    "pageable": {"low_cpu_mem_usage": True},
    "disk": {"offload_to_disk_path": "set by the test"},
}
KINDS = {
    "block_level": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf_level": {"offload_type": "leaf_level"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("stream", [False, True])
@torch.no_grad()
def test_equals_the_cpu(kind, home, stream, tmp_path):
    net, x = make(), input_of()
    expected = net(x)
    before = identities(net)
    options = dict(HOMES[home])
    if home == "disk":
        options["offload_to_disk_path"] = str(tmp_path)
    made = ferry.apply_group_offloading(net, "fake", use_stream=stream, **KINDS[kind], **options)
    own = [*net.parameters(recurse=False), *net.buffers(recurse=False)]
    assert all(p.device.type == "cpu" for p in [*net.parameters(), *net.buffers()])
    # Pipelines read a root's own few numbers outside of its calls.
    assert own and not any(p.isnan().any() for p in own)
    for _ in range(3):
        out = net(x)  # from the CPU, as diffusers' hooks take it
        assert out.device.type == "fake" and torch.equal(out.cpu(), expected)
    assert made.report()["bytes_copied"] > 0
    made.remove()
    assert identities(net) == before
    assert all(p.device.type == "cpu" for p in net.parameters())
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_weights_hold_less_device_memory_than_the_model():
    net, x = make(width=256, blocks=8), input_of(width=256)
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    ferry.apply_group_offloading(net, "fake", use_stream=True, **KINDS["leaf_level"])
    torch.accelerator.synchronize()
    torch.fake.reset_peak_memory_stats()
    held = torch.fake.memory_allocated()
    net(x)
    torch.accelerator.synchronize()
    assert torch.fake.max_memory_allocated() - held < size // 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int8wo", "int8da8w", "fp8wo"])
@torch.no_grad()
def test_quantized_weights(kind, scheme):
    torchao = pytest.importorskip("torchao.quantization")
    net, x = make().to(torch.bfloat16), input_of().to(torch.bfloat16)
    net.linear_2 = nn.Linear(128, 128, dtype=torch.bfloat16)
    config = {
        "int8wo": lambda: torchao.Int8WeightOnlyConfig(version=2),
        "int8da8w": lambda: torchao.Int8DynamicActivationInt8WeightConfig(version=2),
        "fp8wo": lambda: torchao.Float8WeightOnlyConfig(),
    }[scheme]()
    torchao.quantize_(net, config)
    expected = net(x)
    weight = net.blocks[0].proj_in.weight
    before = [id(one) for one in (weight, *inner_tensors(weight).values())]
    made = ferry.apply_group_offloading(net, "fake", use_stream=True, **KINDS[kind])
    assert weight.device.type == "fake"
    for _ in range(2):
        assert torch.equal(net(x).cpu(), expected)
    assert [id(one) for one in (weight, *inner_tensors(weight).values())] == before
    made.remove()
    assert weight.device.type == "cpu" and torch.equal(net(x), expected)


@torch.no_grad()
def test_under_a_budget_parameters_name_the_device_they_compute_on():
    net, x = make(), input_of()
    expected = net(x)
    made = ferry.offload(net, memory="1GiB", activations="64MiB", device="fake")
    assert all(p.device.type == "fake" for p in net.parameters())
    assert torch.equal(net(x).cpu(), expected)
    assert all(p.device.type == "fake" for p in net.parameters())
    made.remove()
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_parameters_that_come_later_are_moved():
    peft = pytest.importorskip("peft")
    x = input_of()
    config = peft.LoraConfig(r=4, target_modules=["proj_in"], init_lora_weights=False)

    def with_lora(net: nn.Module) -> nn.Module:
        torch.manual_seed(11)
        return peft.inject_adapter_in_model(config, net)

    expected = with_lora(make())(x)
    net = make()
    ferry.apply_group_offloading(net, "fake", use_stream=True, **KINDS["leaf_level"])
    assert torch.equal(with_lora(net)(x).cpu(), expected)


@pytest.mark.parametrize("home", HOMES)
@torch.no_grad()
def test_weights_that_are_changed_by_their_data(home, tmp_path):
    net, twin, x = make(), make(), input_of()
    options = {"offload_to_disk_path": tmp_path} if home == "disk" else HOMES[home]
    made = ferry.apply_group_offloading(
        net, "fake", weights_memory="64MiB", use_stream=True, **KINDS["leaf_level"], **options
    )
    net(x)
    with made.weights():
        net.blocks[1].proj_in.weight.data.mul_(2)  # no version counter tells
    twin.blocks[1].proj_in.weight.mul_(2)
    assert torch.equal(net(x).cpu(), twin(x)) and torch.equal(net(x).cpu(), twin(x))
    assert made.report()["changed"] == 1
    made.remove()
    assert torch.equal(net(x), twin(x))


@pytest.mark.parametrize("late", [False, True])
def test_lora_is_fused(late, shapes):
    peft = pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)

    def make_model() -> nn.Module:
        return diffusers.FluxTransformer2DModel.from_pretrained(shapes / "transformer")

    def adapt(model: nn.Module) -> None:
        torch.manual_seed(11)
        model.add_adapter(config)

    resident, streamed = make_model(), make_model()
    adapt(resident)
    if not late:
        adapt(streamed)
    ferry.apply_group_offloading(streamed, "fake", use_stream=True, **KINDS["block_level"])
    if late:
        adapt(streamed)
    for what in ("fuse_lora", "unfuse_lora"):
        for model in (resident, streamed):
            getattr(model, what)()
        found = streamed.state_dict()
        assert all(torch.equal(value, found[key].cpu()) for key, value in resident.state_dict().items())


@pytest.mark.parametrize("home", HOMES)
def test_weights_stay_away_while_an_adapter_comes(home, shapes, tmp_path):
    peft = pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    resident, streamed = (
        diffusers.FluxTransformer2DModel.from_pretrained(shapes / "transformer") for _ in range(2)
    )
    options = dict(HOMES[home])
    if home == "disk":
        options["offload_to_disk_path"] = str(tmp_path)
    ferry.apply_group_offloading(streamed, "fake", use_stream=True, **KINDS["leaf_level"], **options)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)
    for model in (resident, streamed):
        torch.manual_seed(11)
        model.add_adapter(config, "mine")
    away = [p for name, p in streamed.named_parameters() if "lora" not in name and p.numel() > 1 << 14]
    assert away and all(ferry._C.is_stub(p) for p in away)
    again = ferry.offloading_of(streamed).lay_anew()
    assert all(ferry._C.is_stub(p) for p in away)
    assert again.client.bound_bytes >= sum(p.numel() * p.element_size() for p in away)
    found = streamed.state_dict()
    assert all(torch.equal(value, found[key].cpu()) for key, value in resident.state_dict().items())


def test_gradients():
    resident, streamed, x = make().train(), make().train(), input_of()
    resident(x).square().sum().backward()
    ferry.apply_group_offloading(streamed, "fake", use_stream=True, **KINDS["block_level"])
    streamed(x).square().sum().backward()
    for (name, a), b in zip(resident.named_parameters(), streamed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(
                b.grad.cpu(), a.grad, rtol=1e-5, atol=1e-5 * a.grad.abs().max().item()
            )


class _OwnWeight(nn.Module):
    """A root that computes with a large parameter of its own, and with a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(128, 128))
        self.gain = nn.Parameter(torch.randn(128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight) * self.gain


@pytest.mark.parametrize("cls", [Net, _OwnWeight])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_through_the_roots_own_numbers(cls, frozen):
    resident, streamed = make(cls).requires_grad_(not frozen), make(cls).requires_grad_(not frozen)
    made = ferry.apply_group_offloading(streamed, "fake", use_stream=True, **KINDS["leaf_level"])
    x, y = input_of().requires_grad_(), input_of().requires_grad_()
    resident(x).square().sum().backward()
    streamed(y).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    for (name, a), b in zip(resident.named_parameters(), streamed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad.cpu(), a.grad)
    streamed.zero_grad()
    with torch.no_grad():
        assert torch.equal(streamed(x).cpu(), resident(x))
    assert streamed.gain.device.type == "cpu"
    made.remove()
    with torch.no_grad():
        assert torch.equal(streamed(x), resident(x))


class _Skipping(nn.Module):
    _skip_keys: ClassVar[list[str]] = ["cache"]

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 128)

    def forward(self, x: torch.Tensor, cache: list) -> torch.Tensor:
        cache.append(self.linear(x))
        return cache[-1]


@pytest.mark.parametrize("grad", [False, True])
def test_what_a_module_skips_is_not_sent(grad):
    net = make(_Skipping)
    ferry.apply_group_offloading(net, "fake", **KINDS["leaf_level"])
    on_cpu = torch.zeros(1)
    cache = [on_cpu]
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            net(input_of(), cache=cache)
    assert len(cache) == 3 and cache[0] is on_cpu and cache[2].device.type == "fake"
