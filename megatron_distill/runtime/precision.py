"""The numbers a model computes in. This room holds the settings; `backend` says which of them a machine can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """TransformerEngine FP8 GEMMs inside transformer layers; needs a GPU of compute capability 8.9 or more."""

    format: Literal["hybrid", "e4m3"] = "hybrid"
    """`hybrid`: e4m3 forward and e5m2 gradients; `e4m3`: both."""
    recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = "tensorwise"
    """How scales are found; `mxfp8` needs compute capability 10."""
    margin: int = 0
    """Powers of two kept free below the largest FP8 value (`delayed` only)."""
    amax_history: int = 1024
    """Steps of history that a scale looks back on (`delayed` only)."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layer in bf16; not with `delayed`."""

    def __post_init__(self) -> None:
        if self.recipe == "delayed" and self.first_last_layers_bf16:
            raise ValueError("recipe=delayed cannot keep first and last layers in bf16: choose another recipe")
        if self.amax_history < 1:
            raise ValueError(f"amax_history={self.amax_history}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Section `precision`."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Weights and activations; gradients, optimizer state and losses are fp32 either way."""
    fp8: Fp8 | None = None
    """FP8 GEMMs on top of bf16, or nothing."""

    def __post_init__(self) -> None:
        if self.fp8 is not None and self.dtype != "bf16":
            raise ValueError(f"fp8 runs on top of bf16, dtype={self.dtype}: set precision.dtype=bf16")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of weights."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32
