"""``apply_group_offloading``, with diffusers' arguments, on ferry's engine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from . import _C, diffusers_hooks
from .call_points import CallPoint, untraced
from .changes import noticing
from .disk_folder import write_folder
from .grouping import Grouping
from .leases import Client
from .recompute import run_recomputed, wants_recompute
from .slots import (
    Slot,
    collect_slots,
    inner_tensors,
    leave_inference_mode,
    own_tensors,
    rebuild_wrappers,
)
from .sources import checkpoint_sources, mapped_sources

__all__ = ["GroupOffloading", "GroupOffloadingConfig", "apply_group_offloading", "offloading_of"]

_ATTRIBUTE = "_ferry_offloading"
_FEW_BYTES = 16 << 10
_Left = Sequence[tuple[torch.Tensor, _C.StoredTensor]]
# What pipelines call besides forward: each is a pass of its own.
_ENTRIES = ("encode", "decode", "get_image_features", "get_text_features")


@dataclass
class GroupOffloadingConfig:
    """diffusers' options by its names, and what ferry adds below them."""

    onload_device: torch.device
    offload_device: torch.device = torch.device("cpu")
    offload_type: str = "block_level"
    num_blocks_per_group: int | None = None
    # Copies never block the host, and the arena is never freed under a stream: accepted, and there
    # is nothing to choose.
    non_blocking: bool = False
    record_stream: bool = False
    # Bring groups ahead of the compute.
    use_stream: bool = False
    # Keep no copy of the weights in pinned memory.
    low_cpu_mem_usage: bool = False
    offload_to_disk_path: str | None = None
    block_modules: list[str] | None = None
    exclude_kwargs: list[str] | None = None
    # Names of modules (dotted) whose weights stay on the onload device.
    exclude: tuple[str, ...] = ()
    # Folder or file that the weights come from, where it cannot be seen from their memory.
    checkpoint: str | None = None
    # What it runs on, kept for when an adapter has it laid anew.
    engine: _C.Engine | None = None
    name: str = ""
    # The next pass's first groups are brought during this pass's last ones.
    wrap_around: bool = True

    @property
    def idle_device(self) -> torch.device:
        """What parameters say their device is while their weights are away."""
        return torch.device("cpu") if self.offload_device.type == "disk" else self.offload_device


def offloading_of(module: nn.Module) -> GroupOffloading | None:
    """What is attached to ``module``, if anything is."""
    found = module.__dict__.get(_ATTRIBUTE)
    return found if found is not None and not found.removed else None


def _send(value: Any, device: torch.device) -> Any:
    """``value`` with the tensors in it moved; the object itself where there is nothing to move."""
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, (list, tuple)):
        moved = [_send(one, device) for one in value]
        if all(a is b for a, b in zip(moved, value, strict=True)):
            return value
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    if isinstance(value, dict):
        moved = {key: _send(one, device) for key, one in value.items()}
        return value if all(moved[k] is value[k] for k in value) else type(value)(moved)
    return value


class GroupOffloading:
    """What is attached to one root module. ``remove`` detaches it and brings the weights back."""

    # For whoever looks at all of them (``ferry.trace``).
    alive: ClassVar[weakref.WeakSet[GroupOffloading]] = weakref.WeakSet()

    def __init__(self, root: nn.Module, config: GroupOffloadingConfig, left: _Left = ()):
        self.config = config
        self.engine = config.engine
        self.name = config.name
        self._root = weakref.ref(root)
        self._device = config.onload_device
        self._points: list[CallPoint] = []
        exclude_kwargs = config.exclude_kwargs
        if exclude_kwargs is None:
            exclude_kwargs = getattr(root, "_skip_keys", None)
        self._exclude_kwargs = frozenset(exclude_kwargs or ())
        self._on_remove: list[Callable[[], None]] = []

        leave_inference_mode(root)
        slots = collect_slots(root)
        block_modules = config.block_modules
        if block_modules is None:
            block_modules = getattr(root, "_group_offload_block_modules", None) or []
        # Pipelines read these outside of any call (latents_mean, a normalizer's mean and std). Where idle
        # parameters name the device that computes, the engine keeps what is small there.
        moves_with_root = config.idle_device != self._device
        read = {key for key, slot in slots.items() if moves_with_root and _is_read(slot, root)}
        grouping = Grouping(
            root,
            config.offload_type,
            config.num_blocks_per_group or 1,
            block_modules,
            config.exclude,
            read,
        )
        read -= grouping.excluded
        self._read = [slots[key].tensor for key in read]
        for key in grouping.excluded:
            slots[key].tensor.data = slots[key].tensor.data.to(self._device)
        moving = {key: slot for key, slot in slots.items() if key not in grouping.excluded | read}
        # Of a module that is laid anew only what is new has no place yet: an adapter's few weights.
        sources = {id(one): source for one, source in left if id(one) in moving}
        if not left:
            sources = self._find_sources(root, moving, block_modules)
        self._grouped = [[slots[key].tensor for key in group.slots] for group in grouping.groups]
        self._group_of = {key: i for i, group in enumerate(grouping.groups) for key in group.slots}
        first_order = [group for lease in grouping.leases for group in lease.groups]
        on_cpu = self._device.type == "cpu"
        self._client = Client(
            self.engine,
            self.name,
            [
                (
                    group.name,
                    [(slots[k].name, slots[k].tensor, sources.get(k)) for k in group.slots],
                    group.keep_resident,
                )
                for group in grouping.groups
            ],
            first_order=list(dict.fromkeys(first_order)),
            read_ahead=config.use_stream,
            wrap_around=config.wrap_around,
            in_memory=not on_cpu and config.offload_to_disk_path is None,
            idle_device=config.idle_device,
        )
        self._known = {id(tensor) for tensor in _registered(root)}
        try:
            rebuild_wrappers(root, self._device)
            self._attach(root, grouping)
            GroupOffloading.alive.add(self)
        except BaseException:
            self.remove()
            raise

    def _find_sources(
        self, root: nn.Module, slots: dict[int, Slot], block_modules: Sequence[str]
    ) -> dict[int, _C.StoredTensor]:
        config = self.config
        if self._device.type != "cpu" and config.offload_to_disk_path is None:
            return {}  # host memory is nearer than any file
        sources = mapped_sources(slots)
        left = {key: slot for key, slot in slots.items() if key not in sources}
        if config.checkpoint is not None and left:
            sources |= checkpoint_sources(left, config.checkpoint)
            left = {key: slot for key, slot in slots.items() if key not in sources}
        if config.offload_to_disk_path is not None and left:
            sources |= write_folder(
                root,
                left,
                config.offload_to_disk_path,
                config.offload_type,
                config.num_blocks_per_group or 1,
                block_modules,
            )
        return sources

    # ---- calls ----

    def _attach(self, root: nn.Module, grouping: Grouping) -> None:
        # First: what is laid around a forward later is outside.
        leasing = [root, *(lease.module for lease in grouping.leases if lease.module is not root)]
        self._on_remove.append(diffusers_hooks.mark(leasing, self))
        of_root: list[int] = []
        root_recomputes = False
        for lease in grouping.leases:
            if lease.module is root:
                of_root, root_recomputes = lease.groups, lease.recomputes
            else:
                self._points.append(
                    CallPoint(
                        lease.module,
                        self._leased(
                            lambda groups=lease.groups: self._client.lease(groups), lease.module
                        ),
                        lambda groups=lease.groups: self._client.lease(groups),
                    )
                )
        # to(), state_dict() and load_state_dict() reach the weights of modules that lease nothing
        # themselves, since what is around them does.
        leasing = {id(lease.module) for lease in grouping.leases}
        for module in root.modules():
            groups = grouping.groups_of(module)
            if groups and id(module) not in leasing and module is not root:
                self._points.append(
                    CallPoint(
                        module,
                        None,
                        lambda groups=groups: self._client.lease(groups),
                    )
                )
        entries = tuple(name for name in _ENTRIES if callable(getattr(root, name, None)))
        self._points.append(
            CallPoint(
                root,
                self._pass(root, of_root, root_recomputes),
                (lambda: self._client.lease(of_root)) if of_root else None,
                entries,
            )
        )

    @torch.compiler.disable
    def _moved(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args = _send(args, self._device)
        if self._exclude_kwargs:
            moved = {k: v for k, v in kwargs.items() if k not in self._exclude_kwargs}
            return args, kwargs | _send(moved, self._device)
        return args, _send(kwargs, self._device)

    def _leased(self, hold: Callable[[], AbstractContextManager], module: nn.Module) -> Callable:
        def around(forward: Callable, args: tuple, kwargs: dict) -> Any:
            args, kwargs = self._moved(args, kwargs)
            if wants_recompute(module, args, kwargs):
                return run_recomputed(forward, hold, args, kwargs)
            with hold():
                return forward(*args, **kwargs)

        return around

    def _pass(self, root: nn.Module, groups: list[int], recomputes: bool) -> Callable:
        client = self._client

        @contextmanager
        def hold() -> Iterator[None]:
            with client.lease(groups), self._bringing_read():
                yield

        leased = untraced(self._leased(hold, root)) if groups and recomputes else None

        def around(forward: Callable, args: tuple, kwargs: dict) -> Any:
            args, kwargs = self._moved(args, kwargs)
            client.begin_pass()  # from here on it is this thread's turn
            completed = False
            try:
                self.adopt_new()
                if leased is not None:
                    output = leased(forward, args, kwargs)
                else:
                    with hold():
                        output = forward(*args, **kwargs)
                completed = True
                return output
            finally:
                client.end_pass(completed)

        return around

    @contextmanager
    def _bringing_read(self) -> Iterator[None]:
        """Holds the root's own few numbers where it computes. Waits for the device only where they were
        changed."""
        idle = self.config.idle_device
        brought = []
        try:
            for tensor in self._read:
                before = tensor.data
                tensor.data = before.to(self._device)
                # A graph may have kept it: it stays until a call without one, or with its gradient.
                if not torch.is_grad_enabled() and tensor.grad is None:
                    brought.append((tensor, before, tensor._version))
            yield
        finally:
            for tensor, before, version in brought:
                unchanged = tensor._version == version and before.device == idle
                tensor.data = before if unchanged else tensor.data.to(idle)

    # ---- from outside ----

    @property
    def root(self) -> nn.Module | None:
        return self._root()

    @property
    def client(self) -> Client:
        return self._client

    @property
    def removed(self) -> bool:
        return self._client.removed

    @property
    def is_held(self) -> bool:
        """Whether weights are held now, by ``weights()`` or by a call."""
        return self._client.is_held

    def refuse_if_held(self) -> None:
        """Raises ArgumentError where weights are held."""
        if self.is_held:
            raise _C.ArgumentError(
                f"{self.name}: offloading cannot be removed while weights are held: leave the weights() "
                "block, or let the call end, first (loading or unloading an adapter removes it, too)"
            )

    @torch.compiler.disable
    def adopt_new(self) -> None:
        """Goes around what took the place of a forward since. Parameters that appeared since (an adapter's)
        stay where compute happens."""
        for point in self._points:
            point.keep_outermost()
        root = self._root()
        if root is None or self._device.type == "cpu":
            return
        for tensor in _registered(root):
            if id(tensor) not in self._known:
                self._known.add(id(tensor))
                for plain in inner_tensors(tensor).values():
                    if plain.device != self._device:
                        plain.data = plain.data.to(self._device)

    def remove(self) -> None:
        """Detaches from the module; its weights are in CPU memory again, in the same tensors.

        Raises:
            ArgumentError: weights are held, by ``weights()`` or a call; nothing is detached then.
        """
        self._detach()
        self._client.remove()
        root = self._root()
        if root is not None:
            rebuild_wrappers(root, torch.device("cpu"))

    def lay_anew(self) -> GroupOffloading:
        """Lays offloading with the same options over the module as it is now: an adapter came or went.

        Weights that are away stay away: only what is new is looked at.

        Raises:
            ArgumentError: weights are held; all is as before then.
            BudgetError, OSError, RuntimeError: the module is not offloaded any more, and its weights
                are in CPU memory.
        """
        self._detach()
        root = self._root()
        left = self._client.withdraw()
        try:
            return apply_config(root, self.config, left)
        except BaseException:
            self._client.remove()
            rebuild_wrappers(root, torch.device("cpu"))
            raise

    def _detach(self) -> None:
        self.refuse_if_held()
        for point in self._points:
            point.detach()
        self._points.clear()
        for undo in self._on_remove:
            undo()
        self._on_remove.clear()
        for tensor in self._read:
            tensor.data = tensor.data.to("cpu")
        root = self._root()
        if root is not None:
            root.__dict__.pop(_ATTRIBUTE, None)

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """Holds all weights where compute happens, to look at or to change them, by ``.data`` too.

        Needs room for all of them at once, and reads all bytes twice to see what changed.
        """
        with self.holding(range(len(self._grouped))):
            yield self._root()

    @contextmanager
    def holding(self, groups: Iterable[int]) -> Iterator[None]:
        """``weights`` for some groups."""
        groups = sorted(groups)
        with self._client.lease(groups), noticing([t for i in groups for t in self._grouped[i]]):
            yield

    def groups_below(self, module: nn.Module) -> frozenset[int]:
        """The groups that hold weights of ``module`` and of the modules in it."""
        plain = (one for tensor in _registered(module) for one in inner_tensors(tensor).values())
        return frozenset(self._group_of[id(one)] for one in plain if id(one) in self._group_of)

    def report(self) -> dict[str, Any]:
        return self.engine.report() | {"plan": self._client.plan()}


def _is_read(slot: Slot, root: nn.Module) -> bool:
    """Whether it is one of the root's own few numbers."""
    return slot.size_bytes < _FEW_BYTES and any(module is root for module, _ in slot.owners)


def _registered(root: nn.Module) -> Iterator[torch.Tensor]:
    for module in root.modules():
        for _, tensor in own_tensors(module):
            yield tensor


def _check_no_other_hooks(module: nn.Module) -> None:
    for name, child in module.named_modules():
        hook = child.__dict__.get("_hf_hook")
        if hook is not None and type(hook).__name__ in ("AlignDevicesHook", "CpuOffload"):
            raise ValueError(
                "Cannot apply group offloading to a module that is already applying an alternative "
                "offloading strategy from Accelerate. If you want to apply group offloading, please "
                f"disable the existing offloading strategy first (pipe.remove_all_hooks()). "
                f"Offending module: {name} ({type(child)})"
            )
        if offloading_of(child) is not None:
            raise ValueError(
                f"ferry's offloading is on already for '{name or type(child).__name__}'; "
                "ferry.remove(module) first, to change its options"
            )
        registry = child.__dict__.get("_diffusers_hook")
        if registry is not None and registry.get_hook("group_offloading") is not None:
            raise ValueError(
                "diffusers' own group offloading is on already for "
                f"'{name or type(child).__name__}'; load the model anew, or use one of the two"
            )


def checked(config: GroupOffloadingConfig, name: str) -> GroupOffloadingConfig:
    """Throws ValueError for options that mean nothing."""
    config.onload_device = torch.device(config.onload_device)
    config.offload_device = torch.device(config.offload_device)
    config.offload_type = str(getattr(config.offload_type, "value", config.offload_type))
    if config.offload_type not in ("block_level", "leaf_level"):
        raise ValueError(
            f"{name}: offload_type is '{config.offload_type}', expected 'block_level' or 'leaf_level'"
        )
    if config.offload_type == "block_level" and config.num_blocks_per_group is None:
        raise ValueError("`num_blocks_per_group` must be provided when using block_level offloading.")
    if config.num_blocks_per_group is not None and config.num_blocks_per_group < 1:
        raise ValueError(f"{name}: num_blocks_per_group is {config.num_blocks_per_group}; at least 1 is meant")
    if config.offload_device.type not in ("cpu", "disk", config.onload_device.type):
        raise ValueError(
            f"{name}: offload_device is {config.offload_device}; weights wait on the CPU, or on disk "
            "with offload_to_disk_path"
        )
    device = config.onload_device
    if device.type == "cpu":
        return config
    backend = getattr(torch, device.type, None)
    if backend is None or not getattr(backend, "is_available", lambda: False)():
        raise ValueError(
            f"{name}: onload_device is {device}, and there is no such device here. On a machine "
            "without an accelerator use onload_device='cpu': weights then stream from disk"
        )
    if device.index is None:
        config.onload_device = torch.device(device.type, backend.current_device())
    if config.offload_device.type == device.type:
        config.offload_device = config.onload_device
    return config


def apply_group_offloading(
    module: nn.Module,
    onload_device: str | torch.device,
    offload_device: str | torch.device = torch.device("cpu"),
    offload_type: str = "block_level",
    num_blocks_per_group: int | None = None,
    non_blocking: bool = False,
    use_stream: bool = False,
    record_stream: bool = False,
    low_cpu_mem_usage: bool = False,
    offload_to_disk_path: str | os.PathLike | None = None,
    block_modules: list[str] | None = None,
    exclude_kwargs: list[str] | None = None,
    *,
    exclude: Iterable[str] = (),
    checkpoint: str | os.PathLike | None = None,
    weights_memory: int | str | None = None,
    engine: _C.Engine | None = None,
    name: str | None = None,
) -> GroupOffloading:
    """Moves the layers of ``module`` in groups: to where compute happens just before they run, away
    after. The arguments are those of ``diffusers.hooks.apply_group_offloading``.

    Unlike there, any number of blocks a group works with ``use_stream``, and disk with every kind of
    weight, quantized ones too; with ``onload_device="cpu"`` weights stream from disk into RAM. Weights
    that are in memory as mappings of the safetensors files they were loaded from are read from those
    files, which are not rewritten.

    Args:
        module: any module; its weights are in memory when this is called.
        onload_device: where compute happens.
        offload_device: what parameters say their device is while they are away. Of the tensors that a
            quantized weight consists of it is these that say so; the weight itself says ``onload_device``.
        offload_to_disk_path: weights that come from no file are written to this folder.
        exclude: names of modules (dotted) whose weights stay on the onload device.
        checkpoint: folder or safetensors file the weights were loaded from, for weights that are no
            mapping of it. Each is compared before it is relied on.
        weights_memory: what weights may take where compute happens, in bytes or as "6GiB". Default:
            as little as can be done with, and with ``use_stream`` as much again to read ahead.
        engine: shares its budget with other modules. Default: one of its own.

    Raises:
        ValueError: options that mean nothing; other offloading is on.
        BudgetError: ``weights_memory`` is too small; the message says what would do.
        TypeError: a tensor subclass that ferry does not know (``register_tensor_subclass``).
        OSError, RuntimeError: reading or writing failed.
    """
    name = name or type(module).__name__
    config = checked(
        GroupOffloadingConfig(
            onload_device=onload_device,
            offload_device=offload_device,
            offload_type=offload_type,
            num_blocks_per_group=num_blocks_per_group,
            non_blocking=non_blocking,
            record_stream=record_stream,
            use_stream=use_stream,
            low_cpu_mem_usage=low_cpu_mem_usage,
            offload_to_disk_path=None if offload_to_disk_path is None else os.fspath(offload_to_disk_path),
            block_modules=block_modules,
            exclude_kwargs=exclude_kwargs,
            exclude=tuple(exclude),
            checkpoint=None if checkpoint is None else os.fspath(checkpoint),
            engine=engine,
            name=name,
        ),
        name,
    )
    if config.engine is None:
        config.engine = _own_engine(config, as_bytes(weights_memory))
    return apply_config(module, config)


def as_bytes(size: int | str | None) -> int:
    """Bytes of a number or of a text as "6GiB"; none is 0."""
    if size is None:
        return 0
    return _C.parse_bytes(size) if isinstance(size, str) else int(size)


def _own_engine(config: GroupOffloadingConfig, weights_memory: int) -> _C.Engine:
    # As diffusers: pinned where copies are to overlap, pageable else.
    all_in_host = (
        config.onload_device.type != "cpu"
        and config.use_stream
        and not config.low_cpu_mem_usage
        and config.offload_to_disk_path is None
    )
    return _C.Engine(
        config.onload_device,
        weights_memory=weights_memory,
        host_memory=_C.ALL_WEIGHTS if all_in_host else 0,
        # As diffusers: small tensors too wait on the CPU.
        all_move=config.onload_device.type != "cpu",
        read_ahead=config.use_stream,
    )


def apply_config(
    module: nn.Module, config: GroupOffloadingConfig, left: _Left = ()
) -> GroupOffloading:
    """``apply_group_offloading`` with checked options and an engine. ``left``: weights that are away
    already, and where they are."""
    _check_no_other_hooks(module)
    engine = config.engine
    if engine.device != config.onload_device:
        raise ValueError(
            f"onload_device is {config.onload_device}, but the engine computes on {engine.device}"
        )
    offloading = GroupOffloading(module, config, left)
    module.__dict__[_ATTRIBUTE] = offloading
    return offloading
