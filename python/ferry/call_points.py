"""Attaches to a module's forward, and to what else reads or changes its weights.

A wrapper goes around ``module.forward`` (as diffusers' and accelerate's hooks do), so that whatever
error ends the call is seen. It is kept outermost: hooks that others add later run inside it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

__all__ = ["CallPoint", "untraced"]


def untraced(function: Callable) -> Callable:
    """The function as torch.compile leaves it; what it calls is compiled."""
    return torch._dynamo.disable(function, recursive=False)


class _Inside(threading.local):
    """How many calls through a module the thread is in."""

    calls = 0


class CallPoint:
    """What is attached to one module; ``detach`` takes it away.

    Args:
        module: whose calls are wrapped.
        around: ``around(forward, args, kwargs)`` runs the call; none: calls are left as they are.
        lease: holds the module's weights while code other than its forward touches them (``to()``,
            ``state_dict()``, ``load_state_dict()``); none: the module has no weights that move.
        entries: methods besides ``forward`` that are called from outside (``encode``, ``decode``).
    """

    def __init__(
        self,
        module: nn.Module,
        around: Callable[[Callable, tuple, dict], Any] | None,
        lease: Callable[[], AbstractContextManager] | None = None,
        entries: tuple[str, ...] = (),
    ):
        self.module = module
        self._around = None if around is None else untraced(around)
        self._attached = True
        self._inside = _Inside()
        # Of each name the newest last: the wrapper, and what was the module's own before it, if any.
        self._wrappers: dict[str, list[tuple[Callable, Any]]] = {}
        if around is not None:
            for name in ("forward", *entries):
                self._wrap_call(name)
        if lease is not None:
            self._wrap_held("_apply", lease)
            self._wrap_held("_load_from_state_dict", lease)
            self._wrap_state_dict(lease)

    def _wrap_call(self, name: str) -> None:
        inner = getattr(self.module, name)

        def guarded(*args, **kwargs):
            self._inside.calls += 1
            try:
                return inner(*args, **kwargs)
            finally:
                self._inside.calls -= 1

        guarded = untraced(guarded)

        @functools.wraps(inner)
        def wrapper(*args, **kwargs):
            # Inside: a wrapper that was once outermost, or a module that calls itself.
            if self._inside.calls or not self._attached:
                return inner(*args, **kwargs)
            return self._around(guarded, args, kwargs)

        self._put(name, untraced(wrapper))

    def _put(self, name: str, wrapper: Callable) -> None:
        own = self.module.__dict__
        self._wrappers.setdefault(name, []).append((wrapper, own.get(name)))
        own[name] = wrapper

    def _wrap_held(self, name: str, lease: Callable[[], AbstractContextManager]) -> None:
        inner = getattr(self.module, name)

        @functools.wraps(inner)
        def wrapper(*args, **kwargs):
            if not self._attached:
                return inner(*args, **kwargs)
            with lease():
                return inner(*args, **kwargs)

        self._put(name, wrapper)

    def _wrap_state_dict(self, lease: Callable[[], AbstractContextManager]) -> None:
        inner = self.module._save_to_state_dict

        # What streams is gone after the lease, so a state dict gets copies.
        @functools.wraps(inner)
        def wrapper(destination, prefix, keep_vars):
            if not self._attached:
                return inner(destination, prefix, keep_vars)
            with lease():
                before = set(destination)
                inner(destination, prefix, keep_vars)
                for key in destination.keys() - before:
                    value = destination[key]
                    if isinstance(value, torch.Tensor):
                        destination[key] = value.detach().cpu().clone()

        self._put("_save_to_state_dict", wrapper)

    def keep_outermost(self) -> None:
        """Goes around hooks that were added since."""
        if self._around is None:
            return
        if self.module.__dict__.get("forward") is not self._wrappers["forward"][-1][0]:
            self._wrap_call("forward")

    def detach(self) -> None:
        self._attached = False  # where others have wrapped the wrapper, it lets calls through
        own = self.module.__dict__
        for name, wrappers in self._wrappers.items():
            for wrapper, before in reversed(wrappers):
                if own.get(name) is not wrapper:
                    continue
                if before is not None:
                    own[name] = before
                else:
                    del own[name]
