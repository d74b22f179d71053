"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

__all__ = ["publish"]


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
