"""ferry runs diffusion models in less memory than their weights need.

Weights are brought to where compute happens just before they are used, from disk or from host
memory, while what comes before them computes.
"""

from __future__ import annotations

from ferry._load import load_extension

_C = load_extension()

from ferry import diffusers_hooks, models  # noqa: E402
from ferry._C import (  # noqa: E402
    ArgumentError,
    BudgetError,
    Cancelled,
    DeviceError,
    Error,
    FormatError,
    IoError,
    __version__,
    set_log_level,
)
from ferry.group_offloading import (  # noqa: E402
    GroupOffloading,
    GroupOffloadingConfig,
    apply_group_offloading,
    offloading_of,
)
from ferry.offload import Offloading, Report, TraceFile, offload, remove, report, trace  # noqa: E402
from ferry.pictures import Picture, Pipeline, generate  # noqa: E402
from ferry.slots import register_tensor_subclass  # noqa: E402

__all__ = [
    "ArgumentError",
    "BudgetError",
    "Cancelled",
    "DeviceError",
    "Error",
    "FormatError",
    "GroupOffloading",
    "GroupOffloadingConfig",
    "IoError",
    "Offloading",
    "Picture",
    "Pipeline",
    "Report",
    "TraceFile",
    "__version__",
    "apply_group_offloading",
    "diffusers_hooks",
    "generate",
    "models",
    "offload",
    "offloading_of",
    "register_tensor_subclass",
    "remove",
    "report",
    "set_log_level",
    "trace",
]
