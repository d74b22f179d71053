"""Training through modules whose weights come and go.

Memory that streams must not enter a graph: a backward would find other weights in it. So a call
through a module that leases is one autograd function, which leases again in its backward and
computes anew, as a reentrant checkpoint does (torch.utils.checkpoint.CheckpointFunction).
"""

from __future__ import annotations

import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states, set_device_states

__all__ = ["run_recomputed", "wants_recompute"]


@torch.compiler.disable
def wants_recompute(module: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a graph would be made around this call."""
    if not torch.is_grad_enabled():
        return False
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad
           for leaf in pytree.tree_leaves((args, kwargs))):  # fmt: skip
        return True
    return any(parameter.requires_grad for parameter in module.parameters())


# Of what pytree takes apart, what a module can change in place.
_CONTAINERS = (list, dict, OrderedDict, defaultdict)


def _containers(value: Any) -> Iterator[list | dict]:
    """The lists and dicts in what is handed to a module, each before those in it."""
    if type(value) in _CONTAINERS:
        yield value
    elif not isinstance(value, tuple):
        return
    for one in value.values() if isinstance(value, dict) else value:
        yield from _containers(one)


def _contents(container: list | dict) -> list | dict:
    return list(container) if isinstance(container, list) else dict(container)


def _is_changed(container: list | dict, before: list | dict) -> bool:
    if isinstance(container, dict):
        if list(container) != list(before):
            return True
        container, before = list(container.values()), list(before.values())
    return len(container) != len(before) or any(map(operator.is_not, container, before))


@dataclass
class _Given:
    """Stands for a container that the call was given."""

    index: int


class _Call:
    """One call: how to run it again, and what it needs to give the same.

    Each run is given lists and dicts of its own, as they were at the call. What it changes in them
    is a part of what it returns, so that the caller's are changed to tensors of the graph.
    """

    def __init__(
        self,
        forward: Callable,
        lease: Callable[[], AbstractContextManager],
        leaves: list[Any],
        spec: pytree.TreeSpec,
    ):
        self.forward = forward
        self.lease = lease
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.spec = spec
        self.returned: tuple[list[Any], list[int], pytree.TreeSpec] | None = None

    def run(self, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        given = list(_containers((args, *kwargs.values())))
        index_of = {id(one): _Given(i) for i, one in enumerate(given)}
        before = [_contents(one) for one in given]
        output = self.forward(*args, **kwargs)
        changed = {
            i: _contents(one) for i, one in enumerate(given) if _is_changed(one, before[i])
        }
        leaves, spec = pytree.tree_flatten((output, changed), is_leaf=lambda x: id(x) in index_of)
        leaves = [index_of.get(id(leaf), leaf) for leaf in leaves]
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        outputs = [leaves[i] for i in places]
        for i in places:
            leaves[i] = None
        self.returned = (leaves, places, spec)
        return outputs

    def rebuild(self, outputs: tuple[torch.Tensor, ...], given: list[list | dict]) -> Any:
        """What the call returns. Changes the caller's containers as the run changed its own."""
        leaves, places, spec = self.returned
        leaves = [given[leaf.index] if isinstance(leaf, _Given) else leaf for leaf in leaves]
        for place, tensor in zip(places, outputs, strict=True):
            leaves[place] = tensor
        self.returned = None
        output, changed = pytree.tree_unflatten(leaves, spec)
        for i, contents in changed.items():
            given[i].clear()
            if isinstance(contents, list):
                given[i].extend(contents)
            else:
                given[i].update(contents)
        return output


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, _anchor: torch.Tensor, *tensors: torch.Tensor):
        ctx.set_materialize_grads(False)  # an output that nothing uses is not gone through
        ctx.call = call
        ctx.cpu_state = torch.get_rng_state()
        ctx.device_type = next((t.device.type for t in tensors if t.device.type != "cpu"), "cpu")
        ctx.device_states = None
        if ctx.device_type != "cpu":
            ctx.device_states = get_device_states(*tensors)
        ctx.autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", ctx.device_type}
        }
        ctx.save_for_backward(*tensors)
        with call.lease():
            outputs = call.run(tensors)
        ctx.mark_non_differentiable(
            *(out for out in outputs if not (out.is_floating_point() or out.is_complex()))
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        call = ctx.call
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        devices = [] if ctx.device_states is None else list(ctx.device_states[0])
        with call.lease(), torch.random.fork_rng(
            devices=devices, device_type="cuda" if ctx.device_type == "cpu" else ctx.device_type
        ):
            torch.set_rng_state(ctx.cpu_state)
            if ctx.device_states is not None:
                set_device_states(*ctx.device_states, device_type=ctx.device_type)
            with torch.enable_grad(), _autocast(ctx.autocast):
                outputs = call.run(tuple(inputs))
            wanted = [
                (out, grad)
                for out, grad in zip(outputs, gradients, strict=True)
                if out.requires_grad and grad is not None
            ]
            if wanted and torch.autograd._is_checkpoint_valid():
                torch.autograd.backward(*map(list, zip(*wanted)))
            elif wanted:
                # Within autograd.grad() or backward(inputs=...): parameters keep the .grad they have.
                asked = [t for t in inputs if t.requires_grad]
                outs, grads = map(list, zip(*wanted))
                found = torch.autograd.grad(outs, asked, grads, allow_unused=True) if asked else ()
                for tensor, gradient in zip(asked, found, strict=True):
                    tensor.grad = gradient
        return (None, None, *(t.grad for t in inputs))


class _autocast:
    """The autocast state of the forward."""

    def __init__(self, states: dict[str, tuple[bool, torch.dtype]]):
        self._contexts = [
            torch.autocast(kind, dtype=dtype, enabled=enabled)
            for kind, (enabled, dtype) in states.items()
            if enabled
        ]

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exc) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*exc)


def run_recomputed(
    forward: Callable, lease: Callable[[], AbstractContextManager], args: tuple, kwargs: dict
) -> Any:
    """``forward(*args, **kwargs)`` under ``lease()``, as one node of the graph."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    call = _Call(forward, lease, leaves, spec)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    # The anchor makes a node also where only parameters want gradients.
    outputs = _Recompute.apply(call, torch.empty(0, requires_grad=True), *tensors)
    return call.rebuild(outputs, list(_containers((args, *kwargs.values()))))
