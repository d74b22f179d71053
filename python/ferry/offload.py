"""A whole pipeline under one budget."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _C
from .files import publish
from .group_offloading import (
    GroupOffloading,
    GroupOffloadingConfig,
    apply_config,
    as_bytes,
    checked,
    offloading_of,
)
from .timeline import draw_svg

__all__ = ["Offloading", "Report", "TraceFile", "offload", "remove", "report", "trace"]

logger = logging.getLogger("ferry")

# Components that run once a picture: nothing of theirs is brought again at their end.
_RUN_ONCE = ("text_encoder", "image_encoder", "vae", "vqvae", "movq", "safety_checker", "vocoder")
_LEAST_ACTIVATIONS = 256 << 20


def _components(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {type(target).__name__: target}
    parts = getattr(target, "components", None)
    if not isinstance(parts, dict):
        raise TypeError(f"expected a module or a pipeline with components, got {type(target)}")
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not found:
        raise ValueError(f"{type(target).__name__} has no component with weights")
    return found


def _default_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found if found is not None else torch.device("cpu")


class Offloading:
    """What ``offload`` attached: one engine under the components of a pipeline."""

    def __init__(self, components: dict[str, nn.Module], engine: _C.Engine, memory: int):
        self.engine = engine
        self.memory = memory  # bytes in all
        self.activations = 0  # bytes of them that are kept free of weights
        self._components = components

    @property
    def parts(self) -> dict[str, GroupOffloading]:
        """What is attached to each component now: an adapter has it laid anew."""
        return _attached(self._components)

    def remove(self) -> None:
        """Detaches from every component; their weights are in CPU memory again.

        Raises:
            ArgumentError: weights are held; nothing is detached then.
        """
        remove(self)

    def report(self) -> Report:
        return Report(self.parts)


def offload(
    target: Any,
    memory: int | str,
    host_memory: int | str | None = None,
    *,
    device: str | torch.device | None = None,
    activations: int | str | None = None,
    offload_type: str = "leaf_level",
    num_blocks_per_group: int = 1,
    exclude: tuple[str, ...] = (),
    offload_to_disk_path: str | os.PathLike | None = None,
) -> Offloading:
    """Runs a pipeline, or one module, in ``memory``: what does not fit is brought as it is needed.

    Args:
        target: a diffusers pipeline, or a module.
        memory: all that may be held where compute happens, in bytes or as "6GiB": weights,
            activations and, on a CPU-only machine, the program itself.
        host_memory: pinned host memory on an accelerator; default: room for all weights.
        device: where compute happens; default: the accelerator, else the CPU, where weights stream
            from disk into RAM.
        activations: bytes of ``memory`` to keep free of weights. Default: a quarter of what the
            program leaves, at least 256 MiB.
        offload_type: "leaf_level" fits the tightest budgets, "block_level" moves whole blocks.
        exclude: names of components that stay on the device whole.
        offload_to_disk_path: folder for weights that come from no file; default: the cache folder.

    Raises:
        ValueError: nothing of the budget is left for weights; other offloading is on.
        BudgetError: what is left is too little for them; the message says what would do.
        TypeError: a tensor subclass that ferry does not know (``register_tensor_subclass``).
    """
    components = _components(target)
    unknown = set(exclude) - components.keys()
    if unknown:
        raise ValueError(f"exclude: no such component: {', '.join(sorted(unknown))}")
    where = torch.device(device) if device is not None else _default_device()
    total = as_bytes(memory)
    config = checked(
        GroupOffloadingConfig(
            onload_device=where,
            offload_device=where,
            offload_type=offload_type,
            num_blocks_per_group=num_blocks_per_group,
            use_stream=True,
            offload_to_disk_path=None if offload_to_disk_path is None else os.fspath(offload_to_disk_path),
        ),
        "offload",
    )
    on_cpu = config.onload_device.type == "cpu"
    host = as_bytes(host_memory) if host_memory is not None else 0 if on_cpu else _C.ALL_WEIGHTS
    # First with as little as can be: what the program takes is known once the weights have left.
    engine = _C.Engine(config.onload_device, host_memory=host)
    made = Offloading(components, engine, total)
    try:
        for name, module in components.items():
            if name in exclude:
                module.to(config.onload_device)
                continue
            apply_config(
                module,
                replace(
                    config, engine=engine, name=name, wrap_around=not name.startswith(_RUN_ONCE)
                ),
            )
        program = _C.current_rss_bytes() if on_cpu else _allocated(config.onload_device)
        left = total - program
        kept = as_bytes(activations) or max(_LEAST_ACTIVATIONS, left // 4)
        if left <= kept:
            raise ValueError(
                f"memory is {_C.format_bytes(total)}; the program itself takes "
                f"{_C.format_bytes(program)}, and {_C.format_bytes(kept)} are for activations: "
                "nothing is left for weights. Give more, or say activations="
            )
        engine.set_weights_memory(left - kept)
        made.activations = kept
    except BaseException:
        made.remove()
        raise
    logger.info(
        "%s in %s: %s for weights, %s for activations, %s is the program",
        type(target).__name__,
        _C.format_bytes(total),
        _C.format_bytes(left - kept),
        _C.format_bytes(kept),
        _C.format_bytes(program),
    )
    return made


def _allocated(device: torch.device) -> int:
    backend = getattr(torch, device.type)
    return int(backend.memory_allocated(device)) if hasattr(backend, "memory_allocated") else 0


def _offloadings(target: Any) -> dict[str, GroupOffloading]:
    if isinstance(target, Offloading):
        return target.parts
    if isinstance(target, GroupOffloading):
        return {target.name: target}
    return _attached(_components(target))


def _attached(components: dict[str, nn.Module]) -> dict[str, GroupOffloading]:
    found = {name: offloading_of(module) for name, module in components.items()}
    return {name: one for name, one in found.items() if one is not None}


def remove(target: Any) -> None:
    """Takes ferry's offloading off a module, or off every component of a pipeline.

    Raises:
        ArgumentError: weights are held (``weights()``); nothing is detached then.
    """
    parts = list(_offloadings(target).values())
    for one in parts:
        one.refuse_if_held()
    for one in parts:
        one.remove()


class Report:
    """What the engines did so far; ``str()`` is a table, ``dict()`` the numbers."""

    def __init__(self, parts: dict[str, GroupOffloading]):
        self.parts = {name: one.report() for name, one in parts.items()}

    def dict(self) -> dict[str, dict[str, Any]]:
        return self.parts

    def _rows(self) -> Iterator[tuple[str, ...]]:
        yield ("component", "groups", "resident", "streamed", "arena", "step")
        for name, one in self.parts.items():
            plan = one["plan"]
            step = f"{plan['step_seconds']:.3f} s ({plan['bound']})" if plan["step_seconds"] else "-"
            yield (
                name,
                str(len(plan["groups"])),
                _C.format_bytes(plan["resident_bytes"]),
                _C.format_bytes(plan["streamed_bytes"]),
                _C.format_bytes(plan["arena_bytes"]),
                step,
            )

    def __str__(self) -> str:
        if not self.parts:
            return "nothing is offloaded"
        rows = list(self._rows())
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        seen: set[tuple] = set()
        for one in self.parts.values():
            key = (one["bytes_read"], one["leases"], one["peak_bytes"])
            if key in seen:
                continue  # components of one engine share its account
            seen.add(key)
            lines.append(
                f"read {_C.format_bytes(one['bytes_read'])}, copied {_C.format_bytes(one['bytes_copied'])}; "
                f"{one['hits']} of {one['leases']} groups were there when asked for; waited "
                f"{one['stall_seconds']:.3f} s; weights held at most {_C.format_bytes(one['peak_bytes'])}"
            )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = self._rows()
        cells = "".join(f"<th>{cell}</th>" for cell in head)
        rows = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in body)
        tail = str(self).splitlines()[len(body) + 1 :]
        return f"<table><tr>{cells}</tr>{rows}</table>" + "".join(f"<p>{line}</p>" for line in tail)


def report(target: Any) -> Report:
    """What ferry did for a module or a pipeline since it was offloaded."""
    return Report(_offloadings(target))


class TraceFile:
    """What ``trace`` records: Chrome's JSON (ui.perfetto.dev), and an SVG for notebooks."""

    def __init__(self) -> None:
        self._json = ""

    @property
    def events(self) -> list[dict[str, Any]]:
        return json.loads(self._json)["traceEvents"] if self._json else []

    def svg(self, width: int = 960) -> str:
        """The timeline: one row each for reads, copies, waits and compute."""
        return draw_svg(self.events, width)

    def _repr_svg_(self) -> str:
        return self.svg()


@contextmanager
def trace(path: str | os.PathLike | None = None, target: Any = None) -> Iterator[TraceFile]:
    """Records what the engines do inside the block, and writes it to ``path`` at its end.

    Args:
        path: a ``.json`` file for chrome://tracing and ui.perfetto.dev, or an ``.svg``; none: what
            the block is given has it.
        target: the module or pipeline to look at; default: all that is offloaded.
    """
    recorder = _C.Trace()
    file = TraceFile()
    parts = _offloadings(target).values() if target is not None else list(GroupOffloading.alive)
    engines = {id(part.engine): part.engine for part in parts if not part.removed}
    for engine in engines.values():
        engine.set_trace(recorder)
    try:
        yield file
    finally:
        for engine in engines.values():
            engine.set_trace(None)
        file._json = recorder.to_json()
        if path is not None:
            text = file.svg() if os.fspath(path).endswith(".svg") else file._json
            publish(path, lambda temporary: Path(temporary).write_text(text))
