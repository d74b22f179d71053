"""``offload_to_disk_path``: files under the names that diffusers gives them.

Every file is written anew, under a temporary name, and renamed: a file that another model left there
is replaced and never read, and a model that still reads the old one keeps it. All of them stay open.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence

from safetensors.torch import save_file
from torch import nn

from . import _C
from .files import allow_open_files, publish
from .slots import Slot, inner_tensors, own_tensors

__all__ = ["write_folder"]


def _file_name(group_id: str) -> str:
    return f"group_{hashlib.sha256(group_id.encode()).hexdigest()[:16]}.safetensors"


def _slots_below(modules: Iterable[nn.Module]) -> list[int]:
    return [
        id(plain)
        for top in modules
        for module in top.modules()
        for _, tensor in own_tensors(module)
        for plain in inner_tensors(tensor).values()
    ]


def _block_level(
    module: nn.Module, per_group: int, block_modules: Sequence[str], prefix: str = ""
) -> dict[str, list[int]]:
    """diffusers' groups of ``_apply_group_offloading_block_level``: their ids and slots."""
    groups: dict[str, list[int]] = {}
    rest: list[nn.Module] = []
    for name, child in module.named_children():
        if name in block_modules:
            groups |= _block_level(child, per_group, block_modules, f"{prefix}{name}.")
        elif isinstance(child, (nn.ModuleList, nn.Sequential)):
            for i in range(0, len(child), per_group):
                chunk = list(child[i : i + per_group])
                groups[f"{prefix}{name}_{i}_{i + len(chunk) - 1}"] = _slots_below(chunk)
        else:
            rest.append(child)
    own = [id(p) for _, tensor in own_tensors(module) for p in inner_tensors(tensor).values()]
    if rest or own:
        groups[f"{prefix}{type(module).__name__}_unmatched_group"] = own + _slots_below(rest)
    return groups


def write_folder(
    root: nn.Module,
    slots: Mapping[int, Slot],
    folder: str | os.PathLike,
    offload_type: str,
    num_blocks_per_group: int,
    block_modules: Sequence[str],
) -> dict[int, _C.StoredTensor]:
    """Writes ``slots`` to files in ``folder`` and returns where each is.

    Raises:
        OSError: the folder cannot be written.
    """
    if offload_type == "block_level":
        groups = _block_level(root, num_blocks_per_group, block_modules)
    else:
        groups = {
            name: [id(p) for _, t in own_tensors(module) for p in inner_tensors(t).values()]
            for name, module in root.named_modules()
        }
    os.makedirs(folder, exist_ok=True)
    allow_open_files(2 * len(groups))  # each is open for reads through the page cache and past it
    found: dict[int, _C.StoredTensor] = {}
    for group_id, keys in groups.items():
        keys = [key for key in dict.fromkeys(keys) if key in slots and key not in found]
        if not keys and offload_type == "leaf_level":
            continue
        tensors = {
            slots[key].name: slots[key].tensor.detach().cpu().contiguous().clone() for key in keys
        }
        path = os.path.join(folder, _file_name(group_id))
        publish(path, lambda temporary: save_file(tensors, temporary))
        stored = {one.key: one for one in _C.stored_in(path)}
        for key in keys:
            found[key] = stored[slots[key].name]
    return found
