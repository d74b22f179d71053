"""The plain tensors behind a module's parameters and buffers.

A quantized weight of Python is a tensor subclass around a few plain tensors. What moves is those;
the subclass object, and each of its inner tensors, stay the same objects throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from . import _C

__all__ = ["Slot", "collect_slots", "inner_tensors", "register_tensor_subclass"]

InnerTensors = Callable[[torch.Tensor], "dict[str, torch.Tensor]"]

# Classes that hold their data as any tensor does, and what else they hold.
_REGISTERED: dict[type, InnerTensors] = {}


def register_tensor_subclass(cls: type, inner: InnerTensors) -> None:
    """Tells ferry which plain tensors an instance of ``cls`` (or of a subclass) holds.

    Args:
        cls: a subclass of ``torch.Tensor``.
        inner: from an instance to its tensors by name. It must return the same objects at each call.
            ``{"": tensor}`` says that the instance's own data moves, as an ordinary tensor's does.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.Tensor)):
        raise TypeError(f"register_tensor_subclass: {cls!r} is no subclass of torch.Tensor")
    _REGISTERED[cls] = inner


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _itself(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"": tensor}


def _of_bitsandbytes_4bit(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"": tensor}
    state = getattr(tensor, "quant_state", None)
    for prefix in ("", "nested_"):
        if state is None:
            break
        for name in ("absmax", "code", "offset"):
            value = getattr(state, name, None)
            if isinstance(value, torch.Tensor):
                found[prefix + name] = value
        state = getattr(state, "state2", None)
    return found


def _of_bitsandbytes_int8(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"": tensor}
    for name in ("CB", "SCB"):
        value = getattr(tensor, name, None)
        if isinstance(value, torch.Tensor) and value is not tensor:
            found[name] = value
    return found


# By name, so that none of these packages has to be there.
_KNOWN: dict[str, InnerTensors] = {
    "torch.Tensor": _itself,
    "torch.nn.parameter.Parameter": _itself,
    "torch.nn.parameter.Buffer": _itself,
    "diffusers.quantizers.gguf.utils.GGUFParameter": _itself,
    "bitsandbytes.nn.modules.Params4bit": _of_bitsandbytes_4bit,
    "bitsandbytes.nn.modules.Int8Params": _of_bitsandbytes_int8,
}


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a subclass without data of its own (``_make_wrapper_subclass``)."""
    return torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)


def inner_tensors(tensor: torch.Tensor, name: str = "tensor") -> dict[str, torch.Tensor]:
    """The plain tensors of ``tensor`` by name; of an ordinary one itself, by an empty name.

    Raises:
        TypeError: a subclass of which ferry does not know what it holds.
    """
    cls = type(tensor)
    for base in cls.__mro__:
        if base in _REGISTERED:
            return _REGISTERED[base](tensor)
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise TypeError(f"'{name}' is uninitialized: run the module once before offloading it")
    known = _KNOWN.get(_qualified(cls))
    if known is not None:
        return known(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        found: dict[str, torch.Tensor] = {}
        for attribute in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, attribute)
            for tail, plain in inner_tensors(inner, f"{name}.{attribute}").items():
                found[f"{attribute}.{tail}" if tail else attribute] = plain
        return found
    raise TypeError(
        f"'{name}' is a {_qualified(cls)}, and ferry does not know which tensors that holds. Tell it: "
        f"ferry.register_tensor_subclass({cls.__name__}, lambda t: {{'qdata': t.qdata, ...}})"
    )


@dataclass
class Slot:
    """A plain tensor that moves: a parameter or buffer, or a part of one."""

    name: str
    tensor: torch.Tensor
    # The registered tensors it belongs to, with the module and name they are registered under.
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that the module itself registers, by name."""
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                yield name, tensor


def collect_slots(root: nn.Module) -> dict[int, Slot]:
    """All slots below ``root`` by the identity of their tensor, in registration order."""
    slots: dict[int, Slot] = {}
    for module_name, module in root.named_modules():
        for name, tensor in own_tensors(module):
            full = f"{module_name}.{name}" if module_name else name
            for tail, plain in inner_tensors(tensor, full).items():
                if plain.device.type == "meta":
                    raise ValueError(
                        f"'{full}' is on the meta device: it has no weight. Load the model before "
                        "offloading it."
                    )
                slot = slots.setdefault(id(plain), Slot(f"{full}.{tail}" if tail else full, plain))
                slot.owners.append((module, name))
    return slots


def leave_inference_mode(root: nn.Module) -> None:
    """Makes ordinary tensors of parameters and buffers that were made in inference mode.

    Such a tensor has no version counter, and can be given no data of another kind. The object stays
    the same one (``torch.utils.swap_tensors``).
    """
    with torch.inference_mode(False):
        for module_name, module in root.named_modules():
            for name, tensor in own_tensors(module):
                full = f"{module_name}.{name}" if module_name else name
                for plain in inner_tensors(tensor, full).values():
                    if plain.is_inference():
                        again = plain.clone()
                        if isinstance(plain, nn.Parameter):
                            again = nn.Parameter(again, requires_grad=plain.requires_grad)
                        torch.utils.swap_tensors(plain, again)


def rebuild_wrappers(root: nn.Module, device: torch.device) -> None:
    """Makes the outer tensors of subclasses name ``device``, also where their inner ones wait
    elsewhere: what an outer one says is fixed when it is made.

    The outer object stays the same one (``torch.utils.swap_tensors``).
    """
    seen: set[int] = set()
    for module in root.modules():
        for _, tensor in own_tensors(module):
            if id(tensor) in seen or not is_wrapper(tensor) or not hasattr(tensor, "__tensor_flatten__"):
                continue
            seen.add(id(tensor))
            waiting = [one for one in inner_tensors(tensor).values() if one.device != device]
            idle = [one.data for one in waiting]
            for one in waiting:
                one.data = _C.make_stub(one.shape, one.dtype, device)
            _rebuild(tensor, device)
            for one, data in zip(waiting, idle, strict=True):
                one.data = data


def _rebuild(outer: torch.Tensor, device: torch.device) -> None:
    if outer.device == device:
        return
    names, context = outer.__tensor_flatten__()
    inner = {name: getattr(outer, name) for name in names}
    for one in inner.values():
        if is_wrapper(one):
            _rebuild(one, device)
    with torch.no_grad():
        again = type(outer).__tensor_unflatten__(inner, context, outer.size(), outer.stride())
    if isinstance(outer, nn.Parameter):
        # nn.Parameter(again) would detach it, and so make inner tensors of its own.
        again.requires_grad_(outer.requires_grad)
        again._is_param = True
    torch.utils.swap_tensors(outer, again)
