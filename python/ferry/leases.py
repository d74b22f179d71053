"""A client that knows which of its leases are open."""

from __future__ import annotations

from collections.abc import Sequence

from . import _C

__all__ = ["Client", "HeldLease"]


class HeldLease:
    """Groups that are held where compute happens, until ``release``."""

    def __init__(self, lease: _C.Lease, held: set[HeldLease]):
        self._lease = lease
        self._held = held
        held.add(self)

    def release(self) -> None:
        self._lease.release()
        self._held.discard(self)

    def __enter__(self) -> HeldLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class Client(_C.Client):
    """Is not removed from under a lease, which would give its groups back to what is gone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._held: set[HeldLease] = set()  # a set: threads add and discard without a lock

    def lease(self, groups: Sequence[int]) -> HeldLease:
        return HeldLease(super().lease(groups), self._held)

    @property
    def is_held(self) -> bool:
        return bool(self._held)
