"""``torch.fake``: what torch, accelerate and diffusers call on the module of a device.

There is one device. Streams and events are the device-neutral ``torch.Stream`` and ``torch.Event``.
Random numbers come from the CPU's default generator, so that results equal the CPU's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from . import _fake

_DeviceLike = torch.device | str | int | None

_initialized = True


def _index(device: _DeviceLike, optional: bool = True) -> int:
    """0, or RuntimeError for a device that is not fake:0."""
    if device is None or device == -1:
        return 0
    given = torch.device("fake", device) if isinstance(device, int) else torch.device(device)
    if given.type != "fake" or given.index not in (None, 0):
        raise RuntimeError(f"there is no device {given}, only fake:0")
    return 0


# torch.serialization asks here where a tensor that was on this device goes.
_utils = SimpleNamespace(_get_device_index=_index)


def _is_in_bad_fork() -> bool:
    return False


def init() -> None:
    pass


def is_initialized() -> bool:
    return True


def is_available() -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: _DeviceLike) -> None:
    _index(device)


class device:
    """Context manager; there is nothing to change."""

    def __init__(self, device: _DeviceLike) -> None:
        self.idx = _index(device)

    def __enter__(self) -> "device":
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class device_of(device):
    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(0)


def get_device_name(device: _DeviceLike = None) -> str:
    _index(device)
    return "fake accelerator"


def get_device_capability(device: _DeviceLike = None) -> tuple[int, int]:
    _index(device)
    return (0, 0)


def get_device_properties(device: _DeviceLike = None) -> SimpleNamespace:
    _index(device)
    total = torch.accelerator.get_memory_info(0)[1]
    return SimpleNamespace(name=get_device_name(), total_memory=total, major=0, minor=0)


# ---- streams and events ----


def Stream(device: _DeviceLike = None, priority: int = 0, **known: int) -> torch.Stream:
    """A stream of the device's pool. ``known``, stream_id, device_index and device_type, names an
    existing one."""
    if known:
        return torch.Stream(priority=priority, **known)
    return torch.Stream(torch.device("fake", _index(device)), priority=priority)


def Event(enable_timing: bool = False, **ignored: bool) -> torch.Event:
    # No subclass: Event.elapsed_time() takes torch.Event only.
    return torch.Event(device="fake", enable_timing=enable_timing)


def current_stream(device: _DeviceLike = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


def default_stream(device: _DeviceLike = None) -> torch.Stream:
    kind = torch._C._autograd.DeviceType.PrivateUse1
    return torch.Stream(stream_id=0, device_index=_index(device), device_type=int(kind.value))


def set_stream(stream: torch.Stream | None) -> None:
    if stream is not None:
        torch.accelerator.set_stream(stream)


class StreamContext:
    """Makes ``stream`` current; None changes nothing, as torch.cuda.stream()."""

    def __init__(self, stream: torch.Stream | None) -> None:
        self.stream = stream
        self._before: list[torch.Stream] = []

    def __enter__(self) -> None:
        if self.stream is not None:
            self._before.append(current_stream())
            set_stream(self.stream)

    def __exit__(self, *error: Any) -> None:
        if self.stream is not None:
            set_stream(self._before.pop())


def stream(stream: torch.Stream | None) -> StreamContext:
    return StreamContext(stream)


def synchronize(device: _DeviceLike = None) -> None:
    torch.accelerator.synchronize(_index(device))


# ---- memory, in bytes ----


def empty_cache() -> None:
    """Nothing: there is no cache."""


def ipc_collect() -> None:
    pass


def memory_allocated(device: _DeviceLike = None) -> int:
    _index(device)
    return _fake.live_bytes()


def max_memory_allocated(device: _DeviceLike = None) -> int:
    _index(device)
    return _fake.peak_bytes()


memory_reserved = memory_allocated
max_memory_reserved = max_memory_allocated


def reset_peak_memory_stats(device: _DeviceLike = None) -> None:
    _index(device)
    _fake.reset_peak()


reset_max_memory_allocated = reset_peak_memory_stats


def reset_accumulated_memory_stats(device: _DeviceLike = None) -> None:
    torch.accelerator.reset_accumulated_memory_stats(_index(device))


def memory_stats(device: _DeviceLike = None) -> dict[str, Any]:
    return torch.accelerator.memory_stats(_index(device))


def mem_get_info(device: _DeviceLike = None) -> tuple[int, int]:
    """Free, total."""
    return torch.accelerator.get_memory_info(_index(device))


# ---- random numbers ----


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


manual_seed_all = manual_seed


def seed() -> int:
    return torch.default_generator.seed()


seed_all = seed


def initial_seed() -> int:
    return torch.default_generator.initial_seed()


def get_rng_state(device: _DeviceLike = "fake") -> torch.Tensor:
    _index(device)
    return torch.default_generator.get_state()


def set_rng_state(state: torch.Tensor, device: _DeviceLike = "fake") -> None:
    _index(device)
    torch.default_generator.set_state(state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state()]


def set_rng_state_all(states: list[torch.Tensor]) -> None:
    for state in states:
        set_rng_state(state)


# ---- dtypes ----


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]
