"""An accelerator without hardware for eager PyTorch: device ``"fake"``.

Import it right after torch, before anything asks which accelerators there are: torch remembers the
answer. The import registers the backend, the device name and the device module ``torch.fake``;
memory, streams and kernels behave as src/ferry/testing/fake_accelerator.h says::

    import torch
    import ferry_fake

    ferry_fake.set_options(capacity_bytes=64 << 20, copy_delay_ms=3)
    x = torch.randn(2, 3).to("fake")
    ferry_fake.peak_bytes()

Every size is in bytes. Options are those of ``FakeAcceleratorOptions``, by name; one that is not
given takes its default.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

import torch

from . import _fake, device_module
from ._fake import (
    clear_log,
    counters,
    drain,
    live_bytes,
    log,
    options,
    peak_bytes,
    pinned_bytes,
    reset_counters,
    reset_peak,
    set_options,
)
from .patches import patch_safetensors

__all__ = [
    "changed_options",
    "clear_log",
    "counters",
    "drain",
    "live_bytes",
    "log",
    "options",
    "patch_safetensors",
    "peak_bytes",
    "pinned_bytes",
    "reset_counters",
    "reset_peak",
    "set_options",
]

_fake.install()
torch.utils.rename_privateuse1_backend("fake")
torch._register_device_module("fake", device_module)
torch.utils.generate_methods_for_privateuse1_backend(
    for_tensor=True, for_module=True, for_packed_sequence=False, for_storage=True
)


@contextlib.contextmanager
def changed_options(**changes: Any) -> Iterator[None]:
    """The current options with ``changes`` for a while; those from before come back."""
    before = options()
    set_options(**{**before, **changes})
    try:
        yield
    finally:
        set_options(**before)
