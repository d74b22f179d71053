"""Where on disk a module's weights are already, so that nothing has to be written."""

from __future__ import annotations

import bisect
import os
import struct
from collections.abc import Mapping

import torch

from . import _C
from .slots import Slot

__all__ = ["mapped_sources", "checkpoint_sources"]

_PAGE = os.sysconf("SC_PAGE_SIZE")


class _Mapping:
    """One line of /proc/self/maps."""

    def __init__(self, line: str):
        fields = line.rstrip("\n").split(maxsplit=5)
        self.begin, self.end = (int(x, 16) for x in fields[0].split("-"))
        self.permissions = fields[1]
        self.offset = int(fields[2], 16)
        self.inode = int(fields[4])
        self.path = fields[5] if len(fields) > 5 else ""


def _file_mappings() -> list[_Mapping]:
    """Mappings whose bytes are their file's and stay so, by address.

    Names tell nothing: the hub's cache keeps its files without an extension. Programs and libraries are
    none, nor what writing to memory would change in the file (shared memory, pinned memory of a driver).
    """
    with open("/proc/self/maps") as maps:
        mappings = [_Mapping(line) for line in maps]
    programs = {m.path for m in mappings if "x" in m.permissions}
    return [
        m
        for m in mappings
        if m.inode and m.path not in programs and not ("w" in m.permissions and "s" in m.permissions)
    ]


def _is_untouched(pagemap, begin: int, end: int) -> bool:
    """Whether no page of the range was written since it was mapped.

    A page that was written is anonymous from then on: bit 61 of its entry ("file page") is clear, or
    it is swapped (bit 62).
    """
    first, last = begin // _PAGE, (end + _PAGE - 1) // _PAGE
    pagemap.seek(first * 8)
    raw = pagemap.read((last - first) * 8)
    for (entry,) in struct.iter_unpack("<Q", raw):
        present, swapped, of_file = entry >> 63 & 1, entry >> 62 & 1, entry >> 61 & 1
        if swapped or (present and not of_file):
            return False
    return True


def mapped_sources(slots: Mapping[int, Slot]) -> dict[int, _C.StoredTensor]:
    """Places in files of the weights that are file mappings, unchanged; any file will do.

    ``from_pretrained`` of diffusers and transformers maps safetensors files and, where no cast is
    wanted, makes parameters of the mapping: their bytes are the file's by definition. Weights that
    were written since (a fused LoRA) are told apart by the kernel's own account of pages.
    """
    try:
        mappings = _file_mappings()
        pagemap = open("/proc/self/pagemap", "rb", buffering=0)
    except OSError:
        return {}
    begins = [m.begin for m in mappings]
    files: dict[str, _C.File | None] = {}
    found: dict[int, _C.StoredTensor] = {}
    with pagemap:
        for key, slot in slots.items():
            tensor = slot.tensor
            size = slot.size_bytes
            if tensor.device.type != "cpu" or size == 0 or not tensor.is_contiguous():
                continue
            begin = tensor.data_ptr()
            at = bisect.bisect_right(begins, begin) - 1
            if at < 0 or begin + size > mappings[at].end:
                continue
            mapping = mappings[at]
            if mapping.path not in files:
                files[mapping.path] = _open_same(mapping)
            file = files[mapping.path]
            if file is None or not _is_untouched(pagemap, begin, begin + size):
                continue
            offset = begin - mapping.begin + mapping.offset
            try:
                found[key] = _C.StoredTensor(
                    file, slot.name, tensor.dtype, list(tensor.shape), offset
                )
            except (RuntimeError, ValueError):  # a dtype that no file has, a file cut short
                continue
    return found


def _open_same(mapping: _Mapping) -> _C.File | None:
    """The file that is mapped, if its name still means that file."""
    try:
        file = _C.File(mapping.path)
    except RuntimeError:
        return None
    return file if file.inode == mapping.inode else None


def checkpoint_sources(
    slots: Mapping[int, Slot], path: str | os.PathLike, variant: str = ""
) -> dict[int, _C.StoredTensor]:
    """Places in the checkpoint ``path`` (a folder or a file) of the weights that equal it.

    Tensors are found by name; each is read once and compared, since a weight may have changed after
    it was loaded. A stored dtype other than the weight's is cast as it is read.
    """
    stored = {one.key: one for one in _C.stored_in(os.fspath(path), variant)}
    found: dict[int, _C.StoredTensor] = {}
    for key, slot in slots.items():
        one = stored.get(slot.name)
        if one is None or list(one.shape) != list(slot.tensor.shape):
            continue
        value = one.read().to(slot.tensor.dtype)
        if torch.equal(
            value.reshape(-1).view(torch.uint8),
            slot.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8),
        ):
            found[key] = one
    return found
