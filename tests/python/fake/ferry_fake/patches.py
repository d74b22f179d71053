"""safetensors knows its devices by name, and this one is none of them."""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch


def patch_safetensors() -> None:
    """Lets ``safetensors.torch.load_file(device="fake")`` load on the host and move, as it does
    itself for devices that it cannot read into. Does nothing a second time."""
    import safetensors.torch

    load_file: Callable[..., dict[str, torch.Tensor]] = safetensors.torch.load_file
    if hasattr(load_file, "__wrapped__"):
        return

    @functools.wraps(load_file)
    def load(filename: Any, device: Any = "cpu", **options: Any) -> dict[str, torch.Tensor]:
        if isinstance(device, int) or torch.device(device).type != "fake":
            return load_file(filename, device=device, **options)
        loaded = load_file(filename, device="cpu", **options)
        return {name: tensor.to(device) for name, tensor in loaded.items()}

    safetensors.torch.load_file = load
