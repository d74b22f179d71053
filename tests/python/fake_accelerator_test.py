"""The fake accelerator from Python: device "fake" behaves as a GPU does, and computes what the CPU
computes.

    PYTHONPATH=build/release/tests/python python -m pytest tests/python/fake_accelerator_test.py
"""

from __future__ import annotations

import io
import time

import pytest
import torch

ferry_fake = pytest.importorskip("ferry_fake", reason="PYTHONPATH lacks build/.../tests/python")

MIB = 1 << 20


@pytest.fixture(autouse=True)
def fresh_device():
    ferry_fake.set_options()
    ferry_fake.reset_counters()
    ferry_fake.clear_log()
    yield
    ferry_fake.set_options()


def test_it_is_the_accelerator_of_torch():
    assert torch.accelerator.current_accelerator() == torch.device("fake")
    assert torch.accelerator.is_available() and torch.accelerator.device_count() == 1
    assert torch.get_device_module("fake") is torch.fake
    assert torch.zeros(2, device="fake").device == torch.device("fake", 0)
    with pytest.raises(RuntimeError, match="only fake:0"):
        torch.fake.set_device("fake:1")


OPERATIONS = {
    "matmul": lambda x: x @ x.T,
    "softmax": lambda x: torch.softmax(x, -1),
    "scalars": lambda x: (2 * x + 1) / 3 - x**2,
    "norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None]
    ),
    "convolution": lambda x: torch.nn.functional.conv2d(x[None, None], x[None, None, :3, :3]),
    "cat and views": lambda x: torch.cat([x[:, ::2], x.T[:2].reshape(-1, 4)]).permute(1, 0),
    "index": lambda x: x[torch.tensor([2, 0], device=x.device)],
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "sort": lambda x: torch.sort(x, dim=0).values,
    "unique": lambda x: x.round().unique(),
    "complex": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(-1, 2)) * torch.polar(torch.ones_like(x[0, 0]), x[0, 1])
    ),
    "cast": lambda x: x.to(torch.bfloat16).float(),
    "interpolate": lambda x: torch.nn.functional.interpolate(x[None, None], scale_factor=2.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_the_cpu(name):
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    expected = OPERATIONS[name](x)
    got = OPERATIONS[name](x.to("fake"))
    assert got.device.type == "fake"
    assert torch.equal(got.cpu(), expected)


DRAWS = {
    "randn": lambda device, **options: torch.randn(5, device=device, **options),
    "randint": lambda device, **options: torch.randint(100, (5,), device=device, **options),
    "randperm": lambda device, **options: torch.randperm(9, device=device, **options),
    "bernoulli": lambda device, **options: torch.full((9,), 0.5, device=device).bernoulli(**options),
    "multinomial": lambda device, **options: torch.full((9,), 0.5, device=device).multinomial(
        3, **options
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_the_cpus(name):
    torch.manual_seed(3)
    expected = DRAWS[name]("cpu")
    torch.manual_seed(3)
    assert torch.equal(DRAWS[name]("fake").cpu(), expected)

    expected = DRAWS[name]("cpu", generator=torch.Generator().manual_seed(4))
    generator = torch.Generator("fake").manual_seed(4)
    assert generator.device.type == "fake"
    assert torch.equal(DRAWS[name]("fake", generator=generator).cpu(), expected)


def test_a_draw_takes_its_numbers_at_the_call():
    """Not when the stream comes to it: the seed that follows must not change it."""
    ferry_fake.set_options(op_delay_ms=20)
    torch.manual_seed(1)
    expected = [torch.randn(4), torch.randn(4)]
    torch.manual_seed(1)
    first = torch.randn(4, device="fake")
    second = torch.randn(4)
    torch.manual_seed(2)
    assert torch.equal(second, expected[1])
    assert torch.equal(first.cpu(), expected[0])


def test_the_state_of_a_generator_comes_back():
    generator = torch.Generator("fake").manual_seed(7)
    state = generator.get_state()
    first = torch.randn(3, device="fake", generator=generator).cpu()
    generator.set_state(state)
    assert torch.equal(torch.randn(3, device="fake", generator=generator).cpu(), first)
    with torch.random.fork_rng(devices=[0], device_type="fake"):
        torch.randn(3, device="fake")


def test_a_pinned_copy_does_not_wait_and_a_pageable_one_does():
    ferry_fake.set_options(copy_delay_ms=50)
    pageable = torch.arange(6.0)
    pinned = pageable.pin_memory()
    assert pinned.is_pinned() and not pageable.is_pinned()

    begin = time.monotonic()
    copy = pinned.to("fake", non_blocking=True)
    assert time.monotonic() - begin < 0.045
    assert ferry_fake.counters()["host_synchronizations"] == []
    assert torch.equal(copy.cpu(), pageable)

    ferry_fake.reset_counters()
    pageable.to("fake", non_blocking=True)
    assert ferry_fake.counters()["host_synchronizations"] == ["copy host to device (pageable)"]
    assert ferry_fake.counters()["host_to_device_bytes"] == 24


@pytest.mark.parametrize("waits", [False, True])
def test_a_stream_has_to_wait_for_the_copies_of_another(waits):
    ferry_fake.set_options(copy_delay_ms=30)
    pinned = torch.full((4,), 3.0).pin_memory()
    stream = torch.fake.Stream()
    assert isinstance(stream, torch.Stream) and stream != torch.fake.default_stream()
    with torch.fake.stream(stream):
        assert torch.fake.current_stream() == stream
        copy = pinned.to("fake", non_blocking=True)
    assert torch.fake.current_stream() == torch.fake.default_stream()
    if waits:
        torch.fake.current_stream().wait_stream(stream)
    doubled = 2 * copy
    right = torch.equal(doubled.cpu(), torch.full((4,), 6.0))
    stream.synchronize()
    assert right == waits


def test_events_order_streams_and_tell_time():
    ferry_fake.set_options(copy_delay_ms=20)
    stream = torch.fake.Stream()
    begin, end = (torch.fake.Event(enable_timing=True) for _ in range(2))
    pinned = torch.ones(4).pin_memory()
    with torch.fake.stream(stream):
        begin.record()
        copy = pinned.to("fake", non_blocking=True)
        end.record()
    assert not end.query()
    torch.fake.current_stream().wait_event(end)
    assert (copy + 1).sum().item() == 8
    end.synchronize()
    assert begin.elapsed_time(end) >= 20


def test_record_stream_holds_memory_that_was_freed():
    ferry_fake.set_options(op_delay_ms=20)
    base = ferry_fake.live_bytes()
    source = torch.full((256,), 5.0, device="fake")
    torch.fake.synchronize()
    stream = torch.fake.Stream()
    with torch.fake.stream(stream):
        out = source * 2
    source.record_stream(stream)
    del source
    assert ferry_fake.live_bytes() == base + 2048
    stream.synchronize()
    ferry_fake.drain()
    assert ferry_fake.live_bytes() == base + 1024  # `out`
    assert torch.equal(out.cpu(), torch.full((256,), 10.0))


def test_out_of_memory():
    used = ferry_fake.live_bytes()
    ferry_fake.set_options(capacity_bytes=used + MIB)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 4194304 bytes"):
        torch.empty(MIB, device="fake")
    fits = torch.empty(MIB // 4, device="fake")
    assert torch.fake.mem_get_info() == (0, used + MIB)
    del fits
    assert torch.fake.mem_get_info() == (MIB, used + MIB)


def test_memory_figures():
    torch.fake.reset_peak_memory_stats()
    before = torch.fake.memory_allocated()
    tensors = [torch.zeros(MIB // 4, device="fake") for _ in range(3)]
    del tensors[1:]
    assert torch.fake.memory_allocated() == before + MIB
    assert torch.fake.max_memory_allocated() == before + 3 * MIB
    assert torch.accelerator.max_memory_allocated() == before + 3 * MIB
    torch.fake.reset_peak_memory_stats()
    assert torch.fake.max_memory_allocated() == before + MIB


def test_options_by_name():
    ferry_fake.set_options(copy_delay_ms=2.5, seed=7)
    with ferry_fake.changed_options(record_log=True):
        (torch.ones(2, device="fake") + 1).cpu()
        assert ferry_fake.options()["copy_delay_ms"] == 2.5
    assert "aten::add.out" in [name for _, name, *_ in ferry_fake.log()]
    assert ferry_fake.options()["record_log"] is False
    with pytest.raises(TypeError, match="no option 'copy_delay'"):
        ferry_fake.set_options(copy_delay=3)


def test_a_cpu_tensor_among_the_arguments_is_refused():
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(2, 2, device="fake") @ torch.ones(2, 2)


def test_tensors_are_saved_and_loaded(tmp_path):
    x = torch.randn(3, device="fake")
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded.device.type == "fake" and torch.equal(loaded.cpu(), x.cpu())

    safetensors = pytest.importorskip("safetensors.torch")
    ferry_fake.patch_safetensors()
    safetensors.save_file({"x": x.cpu()}, tmp_path / "x.safetensors")
    loaded = safetensors.load_file(tmp_path / "x.safetensors", device="fake")["x"]
    assert loaded.device.type == "fake" and torch.equal(loaded.cpu(), x.cpu())


def test_training_steps_equal_the_cpus():
    def losses(device):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1)
        ).to(device)
        x = torch.randn(16, 4).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for _ in range(3):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses("fake") == losses("cpu")


# ---- whole models ----


def autoencoder():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    return model, {"sample": torch.randn(1, 3, 32, 32)}


def flux():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 48, 32),
        "pooled_projections": torch.randn(1, 32),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(48, 3),
        "timestep": torch.tensor([1.0]),
    }
    return model, inputs


@pytest.mark.parametrize("build", [autoencoder, flux])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_diffusers_equal_the_cpu(build, dtype):
    torch.manual_seed(0)
    model, inputs = build()
    model = model.eval().to(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs).sample
        model.to("fake")
        inputs = {name: tensor.to("fake") for name, tensor in inputs.items()}
        ferry_fake.reset_counters()
        got = model(**inputs).sample
        assert ferry_fake.counters()["host_synchronizations"] == []
    assert torch.equal(got.cpu(), expected)
