"""Builds the Python package: scikit-build-core, told where torch is.

The extension has to be compiled with the headers of the torch that it will run with. pip builds in
an environment of its own, which hides the packages of the one that it installs into; yet it runs
the latter's interpreter, so the folders of that are known. Only where they hold no torch that fits
(`python -m build`, another tool's environment) is torch asked for as a requirement of the build: it
is 5 GB.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from scikit_build_core import build as _backend
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_wheel",
]

ConfigSettings = dict[str, "str | list[str]"]

# As in pyproject.toml's dependencies: a wheel for another torch would not load.
TORCH_SERIES = "2.11"
TORCH_REQUIREMENT = f"torch=={TORCH_SERIES}.*"
# A source with torch's headers takes about a gigabyte to compile.
BYTES_A_JOB = 1_250_000_000


def _torch_version(folder: Path) -> str | None:
    """The version of the torch in `folder`, None if that is none that can be built against."""
    version = folder / "version.py"
    if not version.is_file() or not (folder / "lib" / "libtorch_python.so").is_file():
        return None
    match = re.search(r"^__version__ = '([^']+)'", version.read_text(encoding="utf-8"), re.M)
    return match.group(1) if match else None


def _candidates() -> Iterator[Path]:
    """Folders that may be torch's, the most explicit ones first."""
    if root := os.environ.get("TORCH_DIR"):
        yield Path(root)
        yield from sorted(Path(root).glob("lib/python3*/site-packages/torch"))
    spec = importlib.util.find_spec("torch")  # --no-build-isolation, or torch was asked for
    if spec and spec.origin:
        yield Path(spec.origin).parent
    paths = sysconfig.get_paths()
    for key in ("platlib", "purelib"):
        yield Path(paths[key]) / "torch"
    configuration = Path(sys.prefix) / "pyvenv.cfg"
    shares = not configuration.is_file() or re.search(
        r"^include-system-site-packages\s*=\s*true", configuration.read_text(), re.M | re.I
    )
    if shares:
        folders = site.getsitepackages([sys.base_prefix]) + [site.getusersitepackages()]
        yield from (Path(folder) / "torch" for folder in folders)


def find_torch() -> Path | None:
    """The folder of a torch of TORCH_SERIES; None if there is none."""
    for folder in _candidates():
        version = _torch_version(folder)
        if version and version.startswith(TORCH_SERIES + "."):
            return folder
    return None


def _limit_jobs() -> None:
    """As many compilers at once as the memory holds, unless CMAKE_BUILD_PARALLEL_LEVEL says."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        jobs = max(1, min(available * 1024 // BYTES_A_JOB, len(os.sched_getaffinity(0))))
        os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(jobs))


def get_requires_for_build_wheel(config_settings: ConfigSettings | None = None) -> list[str]:
    requirements = list(_backend.get_requires_for_build_wheel(config_settings))
    if find_torch() is None:
        requirements.append(TORCH_REQUIREMENT)
    return requirements


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: ConfigSettings | None = None
) -> str:
    return _backend.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: ConfigSettings | None = None,
    metadata_directory: str | None = None,
) -> str:
    torch = find_torch()
    if torch is None:
        print(f"ferry: found no torch {TORCH_SERIES}; install it, or set TORCH_DIR", file=sys.stderr)
        raise SystemExit(1)
    print(f"ferry: building for torch {_torch_version(torch)} in {torch}", flush=True)
    _limit_jobs()
    settings = dict(config_settings or {})
    settings["cmake.define.TORCH_DIR"] = str(torch)
    # Also over what an earlier build in the same folder found.
    settings["cmake.define.LibTorch_ROOT"] = str(torch)
    try:
        return _backend.build_wheel(wheel_directory, settings, metadata_directory)
    except SystemExit:
        print(
            "ferry: the build failed. If a package, a header or a program was not found above: "
            "`make deps` installs what ferry needs to build (its Debian packages are listed in "
            "tools/deps.sh).",
            file=sys.stderr,
        )
        raise
