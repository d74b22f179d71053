"""ferry: diffusion models in less memory than their weights need."""

import torch  # noqa: F401  its libraries have to be loaded before the extension's

from . import _C
from .group_offloading import (
    GroupOffloading,
    GroupOffloadingConfig,
    apply_group_offloading,
    offloading_of,
)
from .slots import register_tensor_subclass
