"""Where things are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shapes() -> Path:
    """A small trained pipeline."""
    return ROOT / "models" / "shapes"


@pytest.fixture(scope="session")
def ferry_cli() -> Path:
    """The command line as a program: $FERRY_CLI, else that of the build the package is from."""
    import ferry

    cli = os.environ.get("FERRY_CLI") or Path(ferry.__file__).parents[2] / "apps/ferry/ferry"
    if not Path(cli).is_file():
        pytest.skip(f"no {cli}: build ferry_cli, or set FERRY_CLI")
    return Path(cli)
