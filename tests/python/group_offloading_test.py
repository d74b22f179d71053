"""apply_group_offloading on the CPU: streamed equals resident, bit for bit, whatever the options."""

from __future__ import annotations

import copy
import gc
import glob
import os
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event

import pytest
import torch
from offload_nets import Net, identities, input_of, make
from torch import nn

import ferry

KINDS = ["block_level", "leaf_level"]


def small(kind: str) -> dict:
    return {"offload_type": kind, "num_blocks_per_group": 1 if kind == "block_level" else None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("disk", [False, True])
@torch.no_grad()
def test_streamed_equals_resident(kind, stream, disk, tmp_path):
    net, x = make(), input_of()
    expected, expected_more = net(x), net(x, use_skipped=True)
    before = identities(net)
    offloading = ferry.apply_group_offloading(
        net, "cpu", use_stream=stream, offload_to_disk_path=tmp_path if disk else None, **small(kind)
    )
    for _ in range(3):
        assert torch.equal(net(x), expected)
    assert torch.equal(net(x, use_skipped=True), expected_more)
    assert torch.equal(net(x), expected)
    assert identities(net) == before
    assert bool(glob.glob(str(tmp_path / "*.safetensors"))) == disk
    assert not glob.glob(str(tmp_path / "*.tmp"))
    offloading.remove()
    assert torch.equal(net(x), expected)
    assert identities(net) == before
    assert "forward" not in net.__dict__ and "forward" not in net.blocks[0].__dict__


@torch.no_grad()
def test_outside_of_a_lease_weights_are_loud():
    net = make()
    ferry.apply_group_offloading(net, "cpu", **small("block_level"))
    assert net.blocks[1].proj_in.weight.isnan().all()
    assert net.blocks[1].proj_in.weight.shape == (256, 128)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@torch.no_grad()
def test_several_blocks_a_group_with_streams(count):
    net, x = make(), input_of()
    expected = net(x)
    made = ferry.apply_group_offloading(
        net, "cpu", offload_type="block_level", num_blocks_per_group=count, use_stream=True
    )
    assert torch.equal(net(x), expected) and torch.equal(net(x), expected)
    blocks = [g for g in made.report()["plan"]["groups"] if g["name"].startswith("blocks")]
    assert len(blocks) == -(-4 // count)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_two_models_through_one_folder(kind, tmp_path):
    """diffusers reads the first model's files for the second one."""
    from diffusers.hooks import apply_group_offloading as theirs

    x = input_of()
    outputs = {}
    for name, apply in (("ferry", ferry.apply_group_offloading), ("diffusers", theirs)):
        folder = tmp_path / name
        nets = [make(seed=1), make(seed=2)]
        for net in nets:
            # Theirs cannot do the parameters of a module with others' in its way: blocks only.
            for block in (net.blocks if name == "diffusers" else [net]):
                apply(
                    block,
                    onload_device=torch.device("cpu"),
                    offload_to_disk_path=str(folder),
                    **small(kind),
                )
        outputs[name] = [net(x) for net in nets]
    expected = [make(seed=1)(x), make(seed=2)(x)]
    assert torch.equal(outputs["ferry"][0], expected[0])
    assert torch.equal(outputs["ferry"][1], expected[1])
    assert not torch.equal(outputs["diffusers"][1], expected[1])


@torch.no_grad()
def test_mapped_weights_are_read_from_their_file(tmp_path):
    from diffusers import AutoencoderKL

    config = dict(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    torch.manual_seed(0)
    AutoencoderKL(**config).save_pretrained(tmp_path)
    vae = AutoencoderKL.from_pretrained(tmp_path).eval()
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = vae.decode(z).sample
    stamp = os.stat(tmp_path / "diffusion_pytorch_model.safetensors").st_mtime_ns
    made = ferry.apply_group_offloading(vae, "cpu", offload_type="leaf_level", use_stream=True)
    assert made.client.bound_bytes == made.client.total_bytes > 0
    for _ in range(2):
        assert torch.equal(vae.decode(z).sample, expected)
    assert made.report()["bytes_read"] > 0
    assert os.stat(tmp_path / "diffusion_pytorch_model.safetensors").st_mtime_ns == stamp
    assert len(os.listdir(tmp_path)) == 2


@torch.no_grad()
def test_weights_of_the_hubs_cache_are_read_from_their_file(tmp_path):
    """Its files are named by their hash, and a snapshot links to them."""
    from safetensors.torch import load_file, save_file

    net, x = make(), input_of()
    weights = {k: v.clone() for k, v in net.state_dict().items() if k != "linear_2.weight"}
    expected = net(x)
    save_file(weights, tmp_path / "0a1b2c")
    (tmp_path / "model.safetensors").symlink_to("0a1b2c")
    net.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False, assign=True)
    net.linear_2.weight = net.linear_1.weight
    made = ferry.apply_group_offloading(net, "cpu", **small("leaf_level"))
    assert made.client.bound_bytes == made.client.total_bytes > 0
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_mappings_that_are_no_checkpoint(tmp_path):
    import ctypes

    path = tmp_path / "numbers"
    torch.arange(1024.0).numpy().tofile(path)

    def bound(weight: torch.Tensor) -> int:
        net = nn.Linear(32, 32, bias=False)
        net.weight = nn.Parameter(weight.view(32, 32), requires_grad=False)
        expected = weight.clone()
        made = ferry.apply_group_offloading(net, "cpu", **small("leaf_level"))
        bytes = made.client.bound_bytes
        made.remove()
        assert torch.equal(net.weight.reshape(-1).view(torch.uint8), expected.view(torch.uint8))
        return bytes

    # Memory that is a file's without ever changing it is as good as a checkpoint's.
    assert bound(torch.from_file(str(path), shared=False, size=1024)) == 4096
    # What is written to this one goes to the file; the other is a library's.
    assert bound(torch.from_file(str(path), shared=True, size=1024)) == 0
    with open("/proc/self/maps") as maps:
        line = next(one for one in maps if "libtorch_cpu" in one and " r--p " in one)
    library = (ctypes.c_float * 1024).from_address(int(line.split("-")[0], 16))
    assert bound(torch.frombuffer(library, dtype=torch.float32)) == 0


@torch.no_grad()
def test_a_mapped_weight_that_was_written_is_not_read_from_its_file(tmp_path):
    from safetensors.torch import load_file, save_file

    net, x = make(), input_of()
    save_file({k: v.clone() for k, v in net.state_dict().items() if k != "linear_2.weight"}, tmp_path / "w.safetensors")
    for name, value in load_file(tmp_path / "w.safetensors").items():
        owner, _, last = name.rpartition(".")
        table = net.get_submodule(owner)
        old = getattr(table, last)
        old.data = value
    net.blocks[1].proj_in.weight.data.add_(1)  # no version counter tells
    expected = net(x)
    made = ferry.apply_group_offloading(net, "cpu", **small("leaf_level"))
    changed = net.blocks[1].proj_in.weight.numel() * 4
    # Neighbours that share a page with it go with it.
    assert 0 < made.client.bound_bytes <= made.client.total_bytes - changed
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_checkpoint_is_compared_before_it_is_relied_on(tmp_path):
    from safetensors.torch import save_file

    net, x = make(), input_of()
    save_file({k: v.clone() for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
    net.blocks[0].proj_in.weight.add_(1)
    expected = net(x)
    made = ferry.apply_group_offloading(
        net, "cpu", checkpoint=tmp_path / "w.safetensors", **small("block_level")
    )
    assert 0 < made.client.bound_bytes < made.client.total_bytes
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_changed_weights_stay_changed(kind):
    net, x = make(), input_of()
    other = make(seed=5)
    made = ferry.apply_group_offloading(net, "cpu", use_stream=True, **small(kind))
    net(x)
    net.load_state_dict(other.state_dict())
    assert torch.equal(net(x), other(x)) and torch.equal(net(x), other(x))
    net.to(torch.float64)
    other.to(torch.float64)
    assert torch.equal(net(x.double()), other(x.double()))
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    made.remove()
    assert torch.equal(net(x.double()), other(x.double()))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_weights_that_are_changed_by_their_data_stay_changed(kind):
    net, twin, x = make(), make(), input_of()
    made = ferry.apply_group_offloading(net, "cpu", weights_memory="64MiB", **small(kind))
    net(x)
    with pytest.raises(KeyError), made.weights():
        net.blocks[1].proj_in.weight.data.mul_(2)  # no version counter tells
        net.linear_1.bias.data = net.linear_1.bias.data + 1
        net.gain.data[3:5] = net.gain.data[3:5].flip(0)
        raise KeyError
    twin.blocks[1].proj_in.weight.mul_(2)
    twin.linear_1.bias.add_(1)
    twin.gain[3:5] = twin.gain[3:5].flip(0)
    for _ in range(2):
        assert torch.equal(net(x), twin(x))
    changed = made.report()["changed"]
    with made.weights():
        assert torch.equal(net.blocks[1].proj_in.weight, twin.blocks[1].proj_in.weight)
    assert made.report()["changed"] == changed  # to look is no change
    made.remove()
    assert torch.equal(net(x), twin(x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_resident_ones(kind):
    x = input_of()
    resident, streamed = make().train(), make().train()
    resident(x).square().sum().backward()
    made = ferry.apply_group_offloading(streamed, "cpu", use_stream=True, **small(kind))
    streamed(x).square().sum().backward()
    for (name, a), b in zip(resident.named_parameters(), streamed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5 * a.grad.abs().max().item())
    made.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_asked_for_is_the_only_one(kind):
    resident, streamed = make(), make()
    ferry.apply_group_offloading(streamed, "cpu", use_stream=True, **small(kind))
    gradients = []
    for net in (resident, streamed):
        x = input_of().requires_grad_()
        gradients.append(torch.autograd.grad(net(x).square().sum(), x)[0])
        assert x.grad is None and all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(gradients[1], gradients[0])


def _wan() -> nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_lists_that_modules_change_in_place(kind):
    """AutoencoderKLWan hands on what a chunk of frames leaves to the next one, with its gradient."""
    resident, streamed = make(_wan), make(_wan)
    ferry.apply_group_offloading(streamed, "cpu", use_stream=True, **small(kind))
    x = torch.randn(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(3))
    for net in (resident, streamed):
        net.output = net(x).sample
        net.output.square().sum().backward()
    torch.testing.assert_close(streamed.output, resident.output)
    for (name, a), b in zip(resident.named_parameters(), streamed.parameters(), strict=True):
        torch.testing.assert_close(
            b.grad, a.grad, rtol=1e-4, atol=1e-5 * a.grad.abs().max().item(), msg=lambda m: f"{name}: {m}"
        )


class _Changing(nn.Module):
    """Changes what it is given in all ways."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(128))

    def forward(self, x, log, state):
        x = x * self.weight
        log.append(x.sum())
        state["seen"] = state.get("seen", 0) + 1
        state["inner"][0] = log
        state["inner"].append(None)
        return x, log


def test_containers_stay_the_same_objects():
    results = []
    for offloaded in (False, True):
        net = make(_Changing)
        if offloaded:
            ferry.apply_group_offloading(net, "cpu", offload_type="leaf_level")
        log, state = [], {"inner": [torch.zeros(1)], "kept": []}
        inner, kept = state["inner"], state["kept"]
        for _ in range(2):
            y, same = net(input_of(), log, state)
            assert same is log and state["inner"] is inner and inner[0] is log and state["kept"] is kept
        assert len(log) == 2 and state["seen"] == 2 and len(inner) == 3
        sum(log).backward()
        results.append(net.weight.grad)
    torch.testing.assert_close(results[1], results[0])


@torch.no_grad()
def test_an_error_in_forward_leaves_nothing_leased():
    net, x = make(), input_of()
    expected = net(x)
    ferry.apply_group_offloading(net, "cpu", use_stream=True, **small("block_level"))
    with pytest.raises(RuntimeError):
        net(x[:, :5])
    assert net.blocks[0].proj_in.weight.isnan().all()
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_threads_take_turns():
    net, layer_input = make(), input_of(seed=99)
    layer = net.blocks[1].proj_in
    inputs = [input_of(seed=seed) for seed in range(8)]
    expected = [net(x) for x in inputs]
    expected_of_layer = layer(layer_input)
    inner, others, first_is_done = layer.forward, [], Event()

    def slow(x):
        if not others:
            others.append(pool.submit(torch.no_grad()(layer), layer_input))
            wait(others, timeout=0.3)
        if x is layer_input:
            first_is_done.wait(10)
        return inner(x)

    layer.forward = slow
    ferry.apply_group_offloading(net, "cpu", use_stream=True, **small("leaf_level"))
    with ThreadPoolExecutor(2) as pool:
        assert torch.equal(net(inputs[0]), expected[0])
        first_is_done.set()
        # It came while the layer ran, and leases the weights itself.
        assert torch.equal(others[0].result(), expected_of_layer)
        assert all(map(torch.equal, pool.map(torch.no_grad()(net), inputs), expected))


@torch.inference_mode()
def test_inference_mode():
    net, x = make(), input_of()
    expected = net(x)
    ferry.apply_group_offloading(net, "cpu", use_stream=True, **small("leaf_level"))
    assert torch.equal(net(x), expected) and torch.equal(net(x), expected)


@torch.no_grad()
def test_compiled_blocks_are_not_compiled_again():
    net, x = make(), input_of()
    expected = net(x)
    ferry.apply_group_offloading(net, "cpu", use_stream=True, **small("block_level"))
    compiled = torch.compile(net, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected)
    assert graphs > 0 and stats["unique_graphs"] == graphs
    torch._dynamo.reset()


@torch.no_grad()
def test_hooks_that_come_later_run_under_the_lease():
    net, x = make(), input_of()
    expected = net(x)
    ferry.apply_group_offloading(net, "cpu", **small("leaf_level"))
    seen = []
    layer = net.blocks[2].proj_in
    inner = layer.forward

    def spy(*args):
        seen.append(bool(layer.weight.isnan().any()))
        return inner(*args)

    layer.forward = spy
    assert torch.equal(net(x), expected)
    assert seen == [False]


def _cast_over_offloading(**options):
    """A module that was offloaded and then cast, its offloading, an input, and what it gives resident."""
    from diffusers.hooks import apply_layerwise_casting

    net, late, x = make(), make(), input_of()
    apply_layerwise_casting(net, torch.float8_e4m3fn, torch.float32)
    made = ferry.apply_group_offloading(late, "cpu", **options, **small("leaf_level"))
    apply_layerwise_casting(late, torch.float8_e4m3fn, torch.float32)
    return late, made, x, net(x)


@torch.no_grad()
def test_layerwise_casting_over_offloading():
    """Weights that are cast and cast back around each call are not written anew each time."""
    late, made, x, expected = _cast_over_offloading(use_stream=True)
    assert torch.equal(late(x), expected)
    changed = made.report()["changed"]
    assert torch.equal(late(x), expected)
    assert made.report()["changed"] == changed


@torch.no_grad()
def test_hooks_that_came_later_outlast_offloading():
    late, _, x, expected = _cast_over_offloading()
    layer, seen = late.blocks[2].proj_in, []
    inner = layer.forward

    def spy(*args):
        seen.append(layer.weight.dtype)
        return inner(*args)

    layer.forward = spy
    late(x)  # ferry goes around them
    seen.clear()
    ferry.remove(late)
    assert torch.equal(late(x), expected)
    assert late.linear_1.weight.dtype == torch.float8_e4m3fn
    assert layer.forward is spy and len(seen) == 1


def test_memory_does_not_grow_in_200_steps():
    net, x = make(width=256, blocks=6), input_of(width=256)
    made = ferry.apply_group_offloading(net, "cpu", use_stream=True, **small("block_level"))
    with torch.no_grad():
        for _ in range(20):
            net(x)
        gc.collect()
        before = ferry._C.current_rss_bytes()
        for _ in range(200):
            net(x)
    gc.collect()
    assert ferry._C.current_rss_bytes() - before < 4 << 20
    assert made.report()["peak_bytes"] < made.client.total_bytes


def test_remove_gives_back_a_module_that_can_be_copied():
    net, x = make(), input_of()
    made = ferry.apply_group_offloading(net, "cpu", **small("block_level"))
    made.remove()
    made.remove()  # a second time does nothing
    twin = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(twin(x), make()(x))
    again = ferry.apply_group_offloading(net, "cpu", **small("leaf_level"))
    again.remove()


@torch.no_grad()
def test_is_not_removed_from_under_what_holds_weights():
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    net, x = make(), input_of()
    expected = net(x)
    made = ferry.apply_group_offloading(net, "cpu", weights_memory="64MiB", **small("leaf_level"))
    with made.weights():
        for remove in (
            made.remove,
            lambda: ferry.remove(net),
            lambda: _maybe_remove_and_reapply_group_offloading(net),  # an adapter is unloaded
        ):
            with pytest.raises(ferry.ArgumentError, match="while weights are held"):
                remove()
        assert ferry.offloading_of(net) is made
    assert torch.equal(net(x), expected)
    net.blocks[1].register_forward_hook(lambda *_: made.remove())
    with pytest.raises(ferry.ArgumentError, match="while weights are held"):
        net(x)
    net.blocks[1]._forward_hooks.clear()
    assert torch.equal(net(x), expected)
    made.remove()
    assert torch.equal(net(x), expected) and ferry.offloading_of(net) is None


_MANY_FILES = """
import os, resource, sys, torch, ferry
from torch import nn

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
net, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(150))), torch.randn(1, 8)
with torch.no_grad():
    expected = net(x)
    ferry.apply_group_offloading(net, "cpu", offload_type="leaf_level", offload_to_disk_path=sys.argv[1])
    assert torch.equal(net(x), expected)
assert len(os.listdir(sys.argv[1])) == 150
assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2000  # no more than is needed
"""


def test_more_files_than_may_be_open(tmp_path):
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", _MANY_FILES, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_options_that_mean_nothing():
    net = make()
    with pytest.raises(ValueError, match="num_blocks_per_group"):
        ferry.apply_group_offloading(net, "cpu", offload_type="block_level")
    with pytest.raises(ValueError, match="expected 'block_level' or 'leaf_level'"):
        ferry.apply_group_offloading(net, "cpu", offload_type="layer_level")
    with pytest.raises(ValueError, match="use onload_device='cpu'"):
        ferry.apply_group_offloading(net, "xpu", **small("leaf_level"))
    with pytest.raises(ValueError, match="there is no module named 'nothing'"):
        ferry.apply_group_offloading(net, "cpu", exclude=["nothing"], **small("leaf_level"))
    with pytest.raises(ferry.BudgetError, match="give at least"):
        ferry.apply_group_offloading(net, "cpu", weights_memory=4096, **small("block_level"))
    assert not any(p.isnan().any() for p in net.parameters())  # all came back
    ferry.apply_group_offloading(net, "cpu", **small("leaf_level"))
    with pytest.raises(ValueError, match="is on already"):
        ferry.apply_group_offloading(net, "cpu", **small("leaf_level"))


def test_accelerates_hooks_are_refused():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    net = make()
    add_hook_to_module(net.linear_1, AlignDevicesHook())
    with pytest.raises(ValueError, match="Cannot apply group offloading"):
        ferry.apply_group_offloading(net, "cpu", **small("leaf_level"))


class Strange(torch.Tensor):
    pass


def test_an_unknown_subclass_is_named():
    net = Net(width=32)
    net.gain = nn.Parameter(torch.ones(32).as_subclass(Strange))
    with pytest.raises(TypeError, match="'gain' is a .*Strange.*register_tensor_subclass"):
        ferry.apply_group_offloading(net, "cpu", **small("leaf_level"))
    ferry.register_tensor_subclass(Strange, lambda t: {"": t})
    x = input_of(width=32)
    with torch.no_grad():
        expected = net(x)
        ferry.apply_group_offloading(net, "cpu", **small("leaf_level"))
        assert torch.equal(net(x), expected)


@torch.no_grad()
def test_attention_that_reads_the_weights_below_it():
    torch.manual_seed(0)
    layer = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 5, 64)
    expected = layer(x)
    ferry.apply_group_offloading(layer, "cpu", offload_type="leaf_level", use_stream=True)
    assert torch.equal(layer(x), expected)


class _Contained(nn.Module):
    """Blocks that are containers and are never called themselves, as autoencoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for _ in range(3):
            stage = nn.Module()
            stage.block = nn.ModuleList([nn.Linear(128, 128), nn.Linear(128, 128)])
            stage.norm = nn.LayerNorm(128)
            stage.scale = nn.Parameter(torch.randn(128))
            self.stages.append(stage)
        self.pairs = nn.ModuleList(nn.ModuleList([nn.Linear(128, 128), nn.SiLU()]) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            for layer in stage.block:
                x = layer(x)
            x = stage.norm(x) * stage.scale
        for layer, activation in self.pairs:
            x = x + activation(layer(x))
        return x


@torch.no_grad()
def test_blocks_that_are_never_called():
    torch.manual_seed(0)
    net, x = _Contained(), input_of()
    expected = net(x)
    offloading = ferry.apply_group_offloading(net, "cpu", use_stream=True, **small("block_level"))
    names = [group["name"] for group in offloading.report()["plan"]["groups"]]
    assert {"stages.0", "stages.2", "pairs.1"} <= set(names)
    for _ in range(3):
        assert torch.equal(net(x), expected)


def _vq_model() -> nn.Module:
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        num_vq_embeddings=2000,
    )


def _oobleck() -> nn.Module:
    from diffusers import AutoencoderOobleck

    return AutoencoderOobleck(
        encoder_hidden_size=64,
        downsampling_ratios=[2, 4, 4],
        channel_multiples=[1, 2, 4],
        decoder_channels=32,
        decoder_input_channels=32,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls, size", [(_vq_model, (1, 3, 16, 16)), (_oobleck, (1, 2, 64))])
def test_models_that_diffusers_does_not_offload_in_groups(cls, size, kind):
    """They read weights outside of the forward of the module that has them."""
    resident, streamed = make(cls), make(cls)
    x = torch.randn(size, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match="does not support group offloading"):
        streamed.enable_group_offload("cpu", **small(kind))
    made = ferry.apply_group_offloading(streamed, "cpu", use_stream=True, **small(kind))
    assert len(made.report()["plan"]["groups"]) == 1
    results = []
    for net in (resident, streamed):
        with torch.no_grad():
            latents = net.encode(x)[0]
            latents = latents if isinstance(latents, torch.Tensor) else latents.mode()
            outputs = [latents, net.decode(latents).sample, net(x).sample]
        net.decode(latents).sample.square().sum().backward()
        results.append(outputs + [p.grad for p in net.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) > 3
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a)
    made.remove()
