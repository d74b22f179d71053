"""Pictures from a prompt, in ferry itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Literal

import torch

from ferry._C import Picture, Pipeline

__all__ = ["Picture", "Pipeline", "generate"]

Name = str | os.PathLike[str]
OnProgress = Callable[[str, int, int], object]


def generate(
    folder_or_name: Name,
    prompt: str,
    negative_prompt: str | None = None,
    *,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    max_sequence_length: int | None = None,
    num_images: int = 1,
    seed: int | None = None,
    on_progress: OnProgress | Literal[False] | None = None,
    memory: int | str | None = None,
    weights_memory: int | str | None = None,
    reserve: int | str | None = None,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] | None = None,
    device: str | torch.device | None = None,
    quantize: str | Mapping[str, str] | None = None,
    files: Mapping[str, Name] | None = None,
    variant: str | None = None,
    threads: int = 0,
) -> list[Picture]:
    """Loads a pipeline, makes pictures with it and lets it go: `Pipeline.load(...).generate(...)`,
    which explain the arguments. Sizes are bytes (int, or text such as "6GiB"), width and height
    pixels.
    """
    pipeline = Pipeline.load(
        folder_or_name,
        memory=memory,
        weights_memory=weights_memory,
        reserve=reserve,
        dtype=dtype,
        device=device,
        quantize=quantize,
        files=files,
        variant=variant,
        threads=threads,
    )
    return pipeline.generate(
        prompt,
        negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        max_sequence_length=max_sequence_length,
        num_images=num_images,
        seed=seed,
        on_progress=on_progress,
    )
