"""Changes of weights that leave no mark on them.

The engine keeps what changes while it is held, by a tensor's version counter. What goes through
``.data`` does not count there, and that is how adapters are merged into weights.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .group_offloading import GroupOffloading

__all__ = ["holding_merges", "noticing"]


def _digest(tensor: torch.Tensor) -> bytes:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy()).digest()


def _digests(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    if all(tensor.device.type == "cpu" for tensor in tensors):
        with ThreadPoolExecutor() as pool:
            return list(pool.map(_digest, tensors))
    # One at a time is copied to the host, and on the stream that waited for it.
    return [_digest(tensor) for tensor in tensors]


@contextmanager
def noticing(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Counts a change of ``tensors`` inside the block that their version counters do not tell.

    Reads all bytes twice. The weights are held for as long as the block lasts.
    """
    before, versions = _digests(tensors), [tensor._version for tensor in tensors]
    try:
        yield
    finally:
        quiet = [i for i, tensor in enumerate(tensors) if tensor._version == versions[i]]
        for i, after in zip(quiet, _digests([tensors[i] for i in quiet]), strict=True):
            if after != before[i]:
                torch.autograd.graph.increment_version(tensors[i])


def _adapter_layers(root: nn.Module) -> list[nn.Module]:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return []
    return [module for module in root.modules() if isinstance(module, tuners.BaseTunerLayer)]


def _after(first: Callable[[], None], function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        first()
        return function(*args, **kwargs)

    return wrapper


@contextmanager
def holding_merges(parts: Iterable[GroupOffloading]) -> Iterator[None]:
    """Inside the block layers of adapters hold the weights they are merged into or taken out of.

    A layer holds its groups until one that needs others comes: there is room for no more under a tight
    budget, and a block is written once and not with each of its layers.
    """
    held = ExitStack()
    holder: tuple[GroupOffloading | None, frozenset[int]] = (None, frozenset())

    def hold(part: GroupOffloading, layer: nn.Module) -> None:
        nonlocal holder
        groups = part.groups_below(layer)
        if part is holder[0] and groups <= holder[1]:
            return
        holder = (None, frozenset())
        held.close()
        held.enter_context(part.holding(groups))
        holder = (part, groups)

    wrapped: list[tuple[nn.Module, str]] = []
    with held:
        try:
            for part in parts:
                part.adopt_new()
                for layer in _adapter_layers(part.root):
                    for name in ("merge", "unmerge"):
                        if name in layer.__dict__:  # a block around this one holds already
                            continue
                        first = functools.partial(hold, part, layer)
                        layer.__dict__[name] = _after(first, getattr(layer, name))
                        wrapped.append((layer, name))
            yield
        finally:
            for layer, name in wrapped:
                del layer.__dict__[name]
