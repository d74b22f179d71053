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


def _adapter_of(shapes, folder) -> None:
    peft = pytest.importorskip("peft")
    model = diffusers.FluxTransformer2DModel.from_pretrained(shapes / "transformer")
    torch.manual_seed(11)
    model.add_adapter(
        peft.LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False), "mine"
    )
    layers = peft.get_peft_model_state_dict(model, adapter_name="mine")
    diffusers.FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)


def _run(model) -> torch.Tensor:
    config, generator = model.config, torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    with torch.no_grad():
        return model(
            hidden_states=random(1, 16, config.in_channels),
            encoder_hidden_states=random(1, 8, config.joint_attention_dim),
            pooled_projections=random(1, config.pooled_projection_dim),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([3.5]) if config.guidance_embeds else None,
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
        ).sample


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


@pytest.mark.parametrize(
    ("kind", "by"), [("leaf_level", "pipeline"), ("block_level", "pipeline"), ("block_level", "model")]
)
def test_lora_is_fused_and_unfused(shapes, kind, by):
    peft = pytest.importorskip("peft")

    def adapted():
        one = diffusers.FluxPipeline.from_pretrained(shapes)
        torch.manual_seed(11)
        layers = {"transformer": ["to_q", "to_k", "proj_mlp", "linear"], "text_encoder": ["q_proj"]}
        for name, targets in layers.items():
            config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
            getattr(one, name).add_adapter(config, "mine")
        return one

    def fuse(one, what):
        if by == "model":
            getattr(one.transformer, what)()
        else:
            getattr(one, what)(components=["transformer", "text_encoder"])

    def same(one, two) -> bool:
        return all(
            torch.equal(value, two_state[key])
            for name in ("transformer", "text_encoder")
            for two_state in [getattr(two, name).state_dict()]
            for key, value in getattr(one, name).state_dict().items()
        )

    resident, streamed = adapted(), adapted()
    for name in ("transformer", "text_encoder"):
        # With no more room than a call needs.
        ferry.apply_group_offloading(
            getattr(streamed, name), "cpu", offload_type=kind, num_blocks_per_group=1
        )
    weight = resident.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    before = weight.clone()
    for what in ("fuse_lora", "unfuse_lora"):
        fuse(resident, what)
        fuse(streamed, what)
        assert same(resident, streamed)
        assert torch.equal(_run(streamed.transformer), _run(resident.transformer))
        assert torch.allclose(weight, before, atol=1e-5) == (what == "unfuse_lora")
    layer = streamed.transformer.transformer_blocks[0].attn.to_q
    assert "merge" not in layer.__dict__ and "unmerge" not in layer.__dict__
    fuse(resident, "fuse_lora")
    fuse(streamed, "fuse_lora")
    resident.transformer.unload_lora()
    streamed.transformer.unload_lora()  # has it laid anew
    assert same(resident, streamed)
    assert torch.equal(_run(streamed.transformer), _run(resident.transformer))


@pytest.mark.parametrize("to_disk", [False, True])
def test_weights_stay_away_while_an_adapter_comes_and_goes(shapes, tmp_path, to_disk, monkeypatch):
    _adapter_of(shapes, tmp_path / "adapter")
    # As it is stored, so that weights are mapped.
    pipes = [
        diffusers.FluxPipeline.from_pretrained(shapes, torch_dtype=torch.bfloat16) for _ in range(2)
    ]
    resident, streamed = (pipe.transformer for pipe in pipes)
    home = {"offload_to_disk_path": str(tmp_path / "home")} if to_disk else {}
    first = ferry.apply_group_offloading(streamed, "cpu", offload_type="leaf_level", **home)
    written = {file: file.stat().st_ino for file in tmp_path.glob("home/*")}
    with first.holding(first.groups_below(streamed.proj_out)):
        for model in (resident, streamed):
            model.proj_out.weight.data.mul_(2)  # it has no file any more that was there before
    bound = first.client.bound_bytes
    assert bound > 0.9 * first.client.total_bytes
    # It would bring them into memory.
    monkeypatch.setattr(ferry._C.Client, "remove", lambda self: pytest.fail("was removed"))
    for pipe in pipes:
        pipe.load_lora_weights(tmp_path / "adapter")
    second = ferry.offloading_of(streamed)
    assert first.removed and second is not first and second.client.bound_bytes >= 0.99 * bound
    assert {file: file.stat().st_ino for file in tmp_path.glob("home/*")} == written
    adapted = _run(resident)
    assert torch.equal(_run(streamed), adapted)
    for pipe in pipes:
        pipe.unload_lora_weights()
    third = ferry.offloading_of(streamed)
    assert second.removed and third.client.bound_bytes >= 0.99 * bound
    plain = _run(resident)
    assert torch.equal(_run(streamed), plain) and not torch.equal(plain, adapted)
    monkeypatch.undo()
    ferry.remove(streamed)
    assert torch.equal(_run(streamed), plain)


def test_a_module_that_cannot_be_laid_anew_has_its_weights(shapes, monkeypatch):
    model = diffusers.FluxTransformer2DModel.from_pretrained(shapes / "transformer")
    expected = _run(model)
    for where in ("collect_slots", "rebuild_wrappers"):  # before and after the new client took them
        made = ferry.apply_group_offloading(model, "cpu", offload_type="leaf_level")
        with monkeypatch.context() as patch:
            times = iter([True, False, False])

            def fails(*args, original=getattr(ferry.group_offloading, where), times=times):
                if next(times):
                    raise OSError("no space left")
                return original(*args)

            patch.setattr(ferry.group_offloading, where, fails)
            with pytest.raises(OSError, match="no space left"):
                made.lay_anew()
        assert ferry.offloading_of(model) is None and made.removed
        assert torch.equal(_run(model), expected)


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
