"""ferry.models against what Python diffusers and transformers computed (tests/fixtures/models)."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ferry

ROOT = Path(__file__).resolve().parents[2]
CASES = sorted((ROOT / "tests/fixtures/models").glob("*-*"))
FLUX = ROOT / "tests/fixtures/models/FluxTransformer2DModel-0"


def call(model: ferry.models.Model, case: Path) -> dict[str, torch.Tensor]:
    arguments = json.loads((case / "args.json").read_text())
    with torch.no_grad():
        return getattr(model, arguments["method"])(
            **load_file(case / "inputs.safetensors"), **arguments["args"]
        )


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_equals_python(case: Path) -> None:
    model = ferry.models.load(case, dtype=torch.float32)
    assert model.class_name == case.name.rsplit("-", 1)[0]
    expected = load_file(case / "outputs.safetensors")
    got = call(model, case)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape, name
        if tensor.is_floating_point():
            assert (got[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name
        else:
            assert torch.equal(got[name], tensor), name


def test_config_methods_and_dtype_are_pythons(shapes: Path) -> None:
    vae = ferry.models.load(shapes, subfolder="vae", dtype="fp32")
    written = json.loads((shapes / "vae/config.json").read_text())
    assert {key: vae.config[key] for key in written if not key.startswith("_")} == {
        key: value for key, value in written.items() if not key.startswith("_")
    }
    assert {"encode", "decode"} <= set(vae.methods)
    assert vae.dtype is torch.float32
    assert vae.device == torch.device("cpu")
    assert vae.to(torch.bfloat16) is vae
    assert vae.dtype is torch.bfloat16


def test_tensors_enter_and_leave_without_a_copy() -> None:
    model = ferry.models.load(FLUX, dtype=torch.float32)
    model.load_weights()
    parameters = dict(model.named_parameters())
    state = model.state_dict()
    assert list(state) == [*parameters, *dict(model.named_buffers())]
    for name, parameter in parameters.items():
        assert state[name].data_ptr() == parameter.data_ptr(), name
    # The same Python object, each time.
    assert dict(model.named_parameters())["proj_out.weight"] is parameters["proj_out.weight"]

    # A change in place is the model's.
    before = call(model, FLUX)["sample"]
    state["proj_out.bias"].add_(1.0)
    after = call(model, FLUX)["sample"]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before + 1.0)

    # What a linear layer keeps for its backward is the caller's own tensor.
    parameters["x_embedder.weight"].requires_grad_()
    inputs = load_file(FLUX / "inputs.safetensors")
    kept: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs)["sample"].square().mean()
    assert inputs["hidden_states"].data_ptr() in kept
    loss.backward()
    gradient = parameters["x_embedder.weight"].grad
    assert gradient is not None and gradient.abs().max() > 0


def test_streamed_equals_resident() -> None:
    resident = ferry.models.load(FLUX)
    expected = call(resident, FLUX)
    weights = {name: tensor.clone() for name, tensor in resident.state_dict().items()}
    for options in (
        {},
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        {"use_stream": False},
        {"weights_memory": "100MB"},
        {"exclude": ["x_embedder"], "unused": resident.unused_modules("forward")},
    ):
        model = ferry.models.load(FLUX)
        assert model.enable_group_offload(**options) is model
        assert model.group_offload_enabled
        for _ in range(3):
            assert_equal(call(model, FLUX), expected)
        assert model.bytes_streamed > 0
        assert model.peak_weights_bytes > 0
        assert_equal(model.state_dict(), weights)  # read one by one
        model.disable_group_offload()
        assert_equal(call(model, FLUX), expected)
        assert model.weights_loaded


def test_a_budget_at_load_is_kept_or_refused() -> None:
    expected = call(ferry.models.load(FLUX), FLUX)
    with pytest.raises(ferry.BudgetError, match="at least") as refused:
        ferry.models.load(FLUX, weights_memory=1000)
    least = str(refused.value).split("at least ")[1].split(",")[0].split(";")[0]
    budget = " ".join(least.split()[:2])
    model = ferry.models.load(FLUX, weights_memory=budget)
    assert model.group_offload_enabled
    for _ in range(3):
        assert_equal(call(model, FLUX), expected)
    number, unit = budget.split()
    assert model.peak_weights_bytes <= float(number) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit]
    with pytest.raises(ferry.ArgumentError, match="offload"):
        model.to(torch.bfloat16)
    with pytest.raises(ferry.ArgumentError):
        model.enable_group_offload()


def test_saved_is_read_by_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = ferry.models.load(FLUX)
    model.enable_group_offload()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    assert_equal(
        {name: tensor.to(torch.float32) for name, tensor in model.state_dict().items()},
        dict(theirs.state_dict()),
    )


def test_attention_backends_processors_and_fused_projections() -> None:
    model = ferry.models.load(FLUX, dtype=torch.float32)
    expected = call(model, FLUX)["sample"]
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(call(model, FLUX)["sample"], expected, rtol=1e-4, atol=1e-4)
    assert set(model.attn_processors.values()) == {"FluxAttnProcessor"}
    model.set_attn_processor("FluxAttnProcessor")
    model.fuse_qkv_projections()
    torch.testing.assert_close(call(model, FLUX)["sample"], expected, rtol=1e-4, atol=1e-4)
    model.unfuse_qkv_projections()
    with pytest.raises(ferry.ArgumentError, match="no such backend"):
        model.set_attention_backend("no such backend")
    with pytest.raises(ferry.ArgumentError, match="FluxAttnProcessor"):
        model.set_attn_processor("NoSuchProcessor")


def test_layerwise_casting_keeps_weights_narrow() -> None:
    model = ferry.models.load(FLUX, dtype=torch.bfloat16)
    assert model.enable_layerwise_casting() > 0
    model.load_weights()
    dtypes = {tensor.dtype for tensor in model.state_dict().values()}
    assert torch.float8_e4m3fn in dtypes
    assert model.dtype is torch.bfloat16
    with pytest.raises(ferry.ArgumentError):
        model.enable_layerwise_casting(torch.int8)


def test_wrong_arguments_are_told(shapes: Path, tmp_path: Path) -> None:
    model = ferry.models.load(FLUX)
    with pytest.raises(ValueError, match=r"missing inputs \[hidden_states"):
        model.forward(hidden_state=torch.zeros(1))
    with pytest.raises(ferry.ArgumentError, match="'guidance'.*object"):
        model.forward(guidance=object())
    with pytest.raises(AttributeError, match="its methods are forward"):
        model.encode(sample=torch.zeros(1))
    with pytest.raises(ferry.ArgumentError, match="offload_type"):
        model.enable_group_offload(offload_type="by_luck")
    with pytest.raises(ferry.IoError, match="none"):
        ferry.models.load(shapes, subfolder="none")
    with pytest.raises(ferry.ArgumentError, match="NoSuchModel.*FluxTransformer2DModel"):
        ferry.models.load(FLUX, class_name="NoSuchModel")
    with pytest.raises(ferry.ArgumentError, match="host_memory"):
        ferry.models.load(FLUX, host_memory="1GB")
    inputs = load_file(FLUX / "inputs.safetensors")
    inputs["hidden_states"] = inputs["hidden_states"][..., :-1]
    with pytest.raises(RuntimeError) as wrong_shape:
        model(**inputs)
    assert "C++" not in str(wrong_shape.value)  # the message without torch's stack


def long_inputs() -> dict[str, torch.Tensor]:
    """Inputs that take the small model seconds: thousands of tokens."""
    inputs = load_file(FLUX / "inputs.safetensors")
    tokens = 6000
    batch, _, channels = inputs["hidden_states"].shape
    inputs["hidden_states"] = torch.randn(batch, tokens, channels)
    inputs["img_ids"] = torch.zeros(tokens, inputs["img_ids"].shape[-1])
    return inputs


def test_python_runs_while_a_model_computes() -> None:
    model = ferry.models.load(FLUX, dtype=torch.float32)
    inputs = long_inputs()
    done = threading.Event()
    ticks: list[float] = []

    def tick() -> None:
        while not done.wait(0.002):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    with torch.no_grad():
        model(**inputs)
    end = time.monotonic()
    done.set()
    thread.join()
    inside = [start, *(at for at in ticks if start < at < end), end]
    longest = max(after - before for before, after in zip(inside, inside[1:]))
    assert longest < 0.5 * (end - start)


def test_ctrl_c_stops_between_two_blocks() -> None:
    model = ferry.models.load(FLUX, dtype=torch.float32)
    inputs = long_inputs()
    with torch.no_grad():
        start = time.monotonic()
        expected = model(**inputs)
        whole = time.monotonic() - start
        start = time.monotonic()
        timer = threading.Timer(0.1 * whole, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        stopped = time.monotonic() - start
        assert stopped < 0.8 * whole
        assert_equal(model(**inputs), expected)
