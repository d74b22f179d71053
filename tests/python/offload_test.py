"""A whole pipeline under one budget, its report and its trace."""

from __future__ import annotations

import json

import pytest
import torch
from offload_nets import input_of, make

import ferry

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe(shapes):
    # float32, as Python diffusers reads models/shapes for its parity.
    return diffusers.FluxPipeline.from_pretrained(shapes)


def draw(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(
        pipe("a red circle on a blue background", num_inference_steps=2, generator=generator,
             height=64, width=64, output_type="np").images
    )  # fmt: skip


def test_picture_equals_the_resident_one(pipe, tmp_path):
    expected = draw(pipe)
    made = ferry.offload(pipe, memory="4GiB", device="cpu", activations="64MiB")
    try:
        made.engine.set_weights_memory(24 << 20)  # less than the weights
        with ferry.trace(tmp_path / "step.json") as recorded:
            assert torch.equal(draw(pipe), expected)
        assert torch.equal(draw(pipe), expected)
        text = str(ferry.report(pipe))
        assert "transformer" in text and "text_encoder" in text and "read " in text
        numbers = ferry.report(pipe).dict()["transformer"]
        assert numbers["peak_bytes"] <= 24 << 20
        events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
        assert any(event.get("cat") == "compute" for event in events)
        svg = recorded.svg()
        assert svg.startswith("<svg") and svg.count("<rect") > 10
        assert "<table>" in ferry.report(pipe)._repr_html_()
        with pytest.raises(ValueError, match="You are trying to apply model/sequential CPU offloading"):
            pipe.enable_model_cpu_offload(device="cpu")
    finally:
        ferry.remove(pipe)
    assert torch.equal(draw(pipe), expected)
    assert ferry.report(pipe).dict() == {}


def test_a_budget_that_is_too_small_changes_nothing(pipe):
    expected = draw(pipe)
    with pytest.raises(ValueError, match="nothing is left for weights"):
        ferry.offload(pipe, memory="1MiB", device="cpu")
    assert torch.equal(draw(pipe), expected)


def test_one_module():
    net, x = make(width=256, blocks=6), input_of(width=256)
    with torch.no_grad():
        expected = net(x)
        made = ferry.offload(net, memory=ferry._C.current_rss_bytes() + (512 << 20), device="cpu")
        assert torch.equal(net(x), expected)
        assert made.activations == 256 << 20
        made.remove()
        assert torch.equal(net(x), expected)


def test_lora_before_and_after():
    peft = pytest.importorskip("peft")
    x = input_of()
    config = peft.LoraConfig(r=4, target_modules=["proj_in", "proj_out"], init_lora_weights=False)

    def with_lora(net):
        torch.manual_seed(11)
        return peft.inject_adapter_in_model(config, net)

    with torch.no_grad():
        expected = with_lora(make())(x)
        assert not torch.equal(expected, make()(x))
        before = with_lora(make())
        ferry.apply_group_offloading(before, "cpu", offload_type="leaf_level", use_stream=True)
        assert torch.equal(before(x), expected) and torch.equal(before(x), expected)
        after = make()
        ferry.apply_group_offloading(after, "cpu", offload_type="leaf_level", use_stream=True)
        after(x)
        after = with_lora(after)
        assert torch.equal(after(x), expected) and torch.equal(after(x), expected)


def test_an_adapter_has_it_laid_anew_on_the_same_engine(pipe):
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    expected = draw(pipe)
    made = ferry.offload(pipe, memory="4GiB", device="cpu", activations="64MiB")
    try:
        before = made.parts["transformer"]
        _maybe_remove_and_reapply_group_offloading(pipe.transformer)  # as diffusers' loaders do
        after = made.parts["transformer"]
        assert before.removed and after is ferry.offloading_of(pipe.transformer) is not before
        assert after.engine is made.engine and after.name == "transformer"
        assert torch.equal(draw(pipe), expected)
    finally:
        made.remove()
    assert made.parts == {} and torch.equal(draw(pipe), expected)
