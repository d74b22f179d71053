"""Small modules for the tests of offloading, and how they are run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj_in = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.randn(width))
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.proj_out(torch.relu(self.proj_in(x))) * self.scale + self.shift


class Net(nn.Module):
    """Blocks between two layers; a parameter and a buffer of its own; a block that is shared."""

    def __init__(self, width: int = 128, blocks: int = 4):
        super().__init__()
        self.linear_1 = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.linear_2 = nn.Linear(width, width)
        self.linear_2.weight = self.linear_1.weight  # tied
        self.gain = nn.Parameter(torch.randn(width))
        self.skipped = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, use_skipped: bool = False) -> torch.Tensor:
        x = self.linear_1(x) * self.gain
        for block in self.blocks:
            x = block(x)
        x = self.blocks[0](x)  # twice in a pass
        if use_skipped:
            x = x + self.skipped(x)
        return self.linear_2(x)


def make(cls: Callable[..., nn.Module] = Net, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return cls(**kwargs).eval()


def input_of(width: int = 128, rows: int = 3, seed: int = 7, device: str = "cpu") -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(device)


def identities(module: nn.Module) -> list[int]:
    return [id(t) for t in (*module.parameters(), *module.buffers())]
