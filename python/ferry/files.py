"""Files that appear whole or not at all, and room to have them open."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable

__all__ = ["allow_open_files", "publish"]

_SPARE = 512  # descriptors for the rest of the program


def publish(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Has ``write`` fill a file beside ``path`` and renames it to that.

    Raises:
        OSError, and what ``write`` raises; nothing is left then, and what was at ``path`` stays.
    """
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def allow_open_files(more: int) -> None:
    """Raises the process's soft limit, as far as the hard one lets it, so that ``more`` can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + more + _SPARE
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
