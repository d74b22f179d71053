"""Which modules lease which slots: the groups of diffusers' block_level and leaf_level."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from .slots import inner_tensors, own_tensors

__all__ = ["Group", "Grouping"]


@dataclass
class Group:
    """Slots that move together."""

    name: str
    slots: list[int]  # keys of the slots
    keep_resident: bool = False  # leased while others come and go


@dataclass
class Lease:
    """What a module leases while it runs."""

    module: nn.Module
    groups: list[int] = field(default_factory=list)
    # Its own code uses the weights, so that a graph cannot be made around it.
    recomputes: bool = True


# Modules whose code reads the weights of the modules below without calling those.
_READ_BELOW = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _reads_below(module: nn.Module) -> bool:
    # diffusers says so of models that do it somewhere within.
    return isinstance(module, _READ_BELOW) or not getattr(module, "_supports_group_offloading", True)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or of a container that cannot be called (``nn.Module()``, a ModuleList) those in it
    that can."""
    if type(module).forward is not nn.Module.forward or "forward" in module.__dict__:
        yield module
        return
    for child in module.children():
        yield from _called(child)


def is_below(name: str, ancestor: str) -> bool:
    return not ancestor or name == ancestor or name.startswith(ancestor + ".")


class Grouping:
    """The groups of one root module.

    Blocks are those of the outermost ModuleLists anywhere below the root (T5's lie under
    ``encoder.block``), and of Sequentials among its direct children. ``block_modules``: children that
    are looked at as roots of their own (an autoencoder's encoder and decoder).
    """

    def __init__(
        self,
        root: nn.Module,
        offload_type: str,
        num_blocks_per_group: int = 1,
        block_modules: Sequence[str] | None = None,
        exclude: Iterable[str] = (),
        stay: Iterable[int] = (),
    ):
        self.modules = dict(root.named_modules())
        self.groups: list[Group] = []
        self._leases: dict[int, Lease] = {}
        self._own = {
            id(module): [
                id(plain)
                for _, tensor in own_tensors(module)
                for plain in inner_tensors(tensor).values()
            ]
            for module in self.modules.values()
        }
        self._holders: dict[int, int] = {}
        for keys in self._own.values():
            for key in set(keys):
                self._holders[key] = self._holders.get(key, 0) + 1
        self._group_of: dict[int, int] = {}
        self.excluded = self._find_excluded(exclude)
        self._stay = self.excluded | set(stay)
        if offload_type == "leaf_level" or _reads_below(root):
            whole: list[str] = []
            for name, module in self.modules.items():
                if any(is_below(name, one) for one in whole):
                    continue
                if _reads_below(module):
                    whole.append(name)
                    self._add_leaf(name, module, self._keys_below([module]))
                else:
                    self._add_leaf(name, module, self._own[id(module)])
        else:
            self._add_blocks("", num_blocks_per_group, list(block_modules or []))
        order = {id(module): i for i, module in enumerate(self.modules.values())}
        self.leases = sorted(self._leases.values(), key=lambda lease: order[id(lease.module)])
        for lease in self.leases:
            lease.groups.sort()
            if lease.module is root:
                lease.recomputes = _reads_below(root) or any(
                    key in self._group_of for key in self._own[id(root)]
                )

    def groups_of(self, module: nn.Module) -> list[int]:
        """The groups that hold the module's own slots."""
        return sorted({self._group_of[k] for k in self._own[id(module)] if k in self._group_of})

    def _find_excluded(self, exclude: Iterable[str]) -> set[int]:
        names = list(exclude)
        for name in names:
            if name not in self.modules:
                raise ValueError(f"exclude: there is no module named '{name}'")
        return {
            key
            for name, module in self.modules.items()
            if any(is_below(name, one) for one in names)
            for key in self._own[id(module)]
        }

    def _lease(self, module: nn.Module, group: int) -> None:
        lease = self._leases.setdefault(id(module), Lease(module))
        if group not in lease.groups:
            lease.groups.append(group)

    def _take(self, keys: Iterable[int]) -> list[int]:
        """Those that no group has and that do not stay; they belong to the next group."""
        own = []
        for key in keys:
            if key not in self._group_of and key not in self._stay:
                self._group_of[key] = len(self.groups)
                own.append(key)
        return own

    def _add_leaf(self, name: str, module: nn.Module, keys: list[int]) -> None:
        # Tied weights and shared modules: a leaf also leases the groups that hold its slots already.
        others = {self._group_of[key] for key in keys if key in self._group_of}
        own = self._take(keys)
        if own:
            whole = _reads_below(module)
            outlasts = bool(others) or (not whole and any(True for _ in module.children()))
            self.groups.append(Group(name or "(root)", own, keep_resident=outlasts))
            others.add(len(self.groups) - 1)
        for group in others:
            self._lease(module, group)

    def _add_blocks(self, prefix: str, per_group: int, block_modules: list[str]) -> None:
        root = self.modules[prefix]
        inner = [f"{prefix}.{name}" if prefix else name for name in block_modules]
        for name in inner:
            if name in self.modules:
                self._add_blocks(name, per_group, [])
        lists: list[str] = []
        for name, module in self.modules.items():
            if not is_below(name, prefix) or any(is_below(name, one) for one in inner):
                continue
            direct = name.rpartition(".")[0] == prefix and name != prefix
            if not isinstance(module, nn.ModuleList) and not (
                direct and isinstance(module, nn.Sequential)
            ):
                continue
            if any(is_below(name, outer) for outer in lists):
                continue
            lists.append(name)
            children = list(module.named_children())
            for i in range(0, len(children), per_group):
                self._add_chunk(name, children[i : i + per_group])
        self._add_top_level(prefix, root)

    def _keys_below(self, modules: Iterable[nn.Module]) -> list[int]:
        return [key for top in modules for m in top.modules() for key in self._own.get(id(m), [])]

    def _add_chunk(self, list_name: str, chunk: list[tuple[str, nn.Module]]) -> None:
        called = [one for _, module in chunk for one in _called(module)]
        keys = self._keys_below(called)
        held: dict[int, int] = {}
        for top in {id(m): m for module in called for m in module.modules()}.values():
            for key in set(self._own.get(id(top), [])):
                held[key] = held.get(key, 0) + 1
        # What another module holds too is left to the top level.
        own = self._take(key for key in dict.fromkeys(keys) if held[key] == self._holders[key])
        if own:
            self.groups.append(Group(f"{list_name}.{chunk[0][0]}", own))
            for module in called:
                self._lease(module, len(self.groups) - 1)

    def _add_top_level(self, prefix: str, root: nn.Module) -> None:
        # Leased by the root for as long as it runs, and by the modules that use it, since those are
        # what a backward runs again and what is called where the root's forward is not.
        own = self._take(dict.fromkeys(self._keys_below([root])))
        if not own:
            return
        group = len(self.groups)
        self.groups.append(Group(f"{prefix} top level".strip(), own, keep_resident=True))
        self._lease(root, group)
        for module in self.modules.values():
            if module is not root and any(self._group_of.get(k) == group for k in self._own[id(module)]):
                self._lease(module, group)
