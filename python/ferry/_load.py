"""Loads the extension, and says in plain words why where that fails.

The extension is compiled against one torch. With another one the dynamic linker says no more than
the name of a C++ symbol, or nothing at all where the symbols happen to be there and classes differ.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def _series(version: str) -> str:
    """Major and minor: what fixes torch's C++ interface. "2.11.0+cpu" is "2.11"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def load_extension() -> ModuleType:
    """ferry._C. Raises ImportError that says what was found, what is needed and what to do."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"ferry needs torch, which does not import: {error}") from error
    try:
        from ferry import _build_info as build
    except ImportError as error:
        raise ImportError(
            "ferry: the extension is not built: this is the folder of its sources. Run "
            "`pip install .` in the checkout, or set PYTHONPATH to build/release/python"
        ) from error
    again = (
        f"Install the torch that it was built for (pip install 'torch=={_series(build.torch_version)}"
        ".*'), or build ferry again (pip install --force-reinstall --no-deps . in its checkout)"
    )
    if _series(torch.__version__) != _series(build.torch_version):
        raise ImportError(
            f"ferry {build.version} was built for torch {build.torch_version}, but torch "
            f"{torch.__version__} is installed. {again}"
        )
    try:
        return importlib.import_module("ferry._C")
    except ImportError as error:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ImportError(
            f"ferry {build.version}: its extension, built for torch {build.torch_version} and "
            f"Python {build.python_version}, does not load with torch {torch.__version__} and "
            f"Python {python}: {error}. {again}"
        ) from error
