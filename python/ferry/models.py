"""Models by folder: `model = ferry.models.load("models/shapes", subfolder="transformer")`.

They compute in ferry itself, on torch tensors without a copy in or out.
"""

from __future__ import annotations

from ferry._C import Model
from ferry._C import load_model as load

__all__ = ["Model", "load"]
