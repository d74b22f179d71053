"""Makes ferry's offloading visible to diffusers, where that is loaded.

diffusers asks its hook registries whether a module is group offloaded: to choose the device of a
pipeline, to refuse ``enable_model_cpu_offload`` and ``to()``, to lay the hooks anew after an adapter
was loaded. A hook that does nothing stands there for ferry. ``fuse_lora`` and ``unfuse_lora`` write to
weights directly: ferry holds them meanwhile.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .changes import holding_merges

if TYPE_CHECKING:
    from .group_offloading import GroupOffloading

__all__ = ["install", "mark", "uninstall"]

_NAME = "group_offloading"
_replaced: dict[tuple[Any, str], Any] = {}


def _hooks_module() -> Any:
    return sys.modules.get("diffusers.hooks.group_offloading")


def mark(modules: list[nn.Module], offloading: GroupOffloading) -> Callable[[], None]:
    """Registers the standing hook on ``modules``, the root first; nothing without diffusers.

    Returns what takes it away again.
    """
    if _hooks_module() is None:
        return lambda: None
    from diffusers.hooks.hooks import HookRegistry, ModelHook

    _answer_reapply()
    _hold_for_fusing()

    class FerryGroupOffloadingHook(ModelHook):
        """Stands for ferry's offloading. Removing it from the root removes that."""

        def __init__(self, root: bool):
            super().__init__()
            self.config = offloading.config
            self.group = offloading
            self.root = root
            self.is_leaving = False

        def deinitalize_hook(self, of: nn.Module) -> nn.Module:
            if self.root and offloading.is_held:
                # The registry has put the forward there that was before; what follows raises.
                offloading.adopt_new()
                offloading.refuse_if_held()
            self.is_leaving = True
            if self.root:
                self.root = False
                offloading.remove()
            return of

    placed: dict[int, Any] = {}
    for module in modules:
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(FerryGroupOffloadingHook(module is modules[0]), _NAME)
        placed[id(module)] = module.__dict__.get("forward")

    def unmark() -> None:
        for module in modules:
            registry = HookRegistry.check_if_exists_or_initialize(module)
            hook = registry.get_hook(_NAME)
            # Where its hook is the registry's last one, removing it drops what others put around it.
            around = module.__dict__.get("forward")
            if isinstance(hook, FerryGroupOffloadingHook) and not hook.is_leaving:
                hook.root = False
                registry.remove_hook(_NAME, recurse=False)
                if around is not placed[id(module)]:
                    module.forward = around
            # The registry leaves the bound method it found.
            own = module.__dict__.get("forward")
            if getattr(own, "__func__", None) is type(module).forward:
                del module.__dict__["forward"]
            if not registry.hooks:
                del module.__dict__["_diffusers_hook"]

    return unmark


def _answer_reapply() -> None:
    """Has diffusers' own function, called where an adapter came or went, lay ferry's offloading anew."""
    from .group_offloading import offloading_of

    name = "_maybe_remove_and_reapply_group_offloading"
    # The loaders of adapters import it by name, some of them when they are imported themselves.
    for owner in (_hooks_module(), sys.modules.get("diffusers.loaders.peft")):
        original = getattr(owner, name, None)
        if original is None or (owner, name) in _replaced:
            continue

        @functools.wraps(original)
        def reapply(module: nn.Module, original: Callable = original) -> None:
            found = [one for one in map(offloading_of, module.modules()) if one is not None]
            for one in found:
                one.lay_anew()
            if not found:
                original(module)

        _replaced[owner, name] = original
        setattr(owner, name, reapply)


def _hold_for_fusing() -> None:
    """Has models and pipelines of diffusers fuse adapters into weights that are offloaded."""
    for module, owner in (("peft", "PeftAdapterMixin"), ("lora_base", "LoraBaseMixin")):
        cls = getattr(sys.modules.get(f"diffusers.loaders.{module}"), owner, None)
        for name in ("fuse_lora", "unfuse_lora"):
            original = getattr(cls, name, None)
            if original is not None and (cls, name) not in _replaced:
                _replaced[cls, name] = original
                setattr(cls, name, _holding(original))


def _holding(original: Callable) -> Callable:
    from .group_offloading import offloading_of

    @functools.wraps(original)
    def fuse(self, *args, **kwargs):
        models = [self] if isinstance(self, nn.Module) else self.components.values()
        found = [offloading_of(model) for model in models if isinstance(model, nn.Module)]
        with holding_merges(one for one in found if one is not None):
            return original(self, *args, **kwargs)

    return fuse


def install() -> None:
    """Puts ferry behind diffusers' own names.

    ``model.enable_group_offload(...)``, ``pipe.enable_group_offload(...)`` and
    ``diffusers.hooks.apply_group_offloading(...)`` use ferry's engine from here on.
    """
    import diffusers.hooks
    from diffusers.hooks import group_offloading

    from .group_offloading import apply_group_offloading

    for owner in (diffusers.hooks, group_offloading):
        if (owner, "apply_group_offloading") not in _replaced:
            _replaced[owner, "apply_group_offloading"] = owner.apply_group_offloading
            owner.apply_group_offloading = apply_group_offloading
    _answer_reapply()


def uninstall() -> None:
    """Gives diffusers its own functions back."""
    for (owner, name), original in _replaced.items():
        setattr(owner, name, original)
    _replaced.clear()
