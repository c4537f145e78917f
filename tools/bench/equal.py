"""No time is taken of a method that does not do the work: loss and gradient first, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.bench.work import Expected

LOSS_TOLERANCE = 1e-3
"""Relative, bf16 inputs too: they are the reference's inputs as well. Wide enough for what plain fp32 loses where
student and teacher are close; code that is wrong, or computes in bf16, is off by percents."""
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Relative, in the Euclidean norm. A gradient that is stored in bf16 is off by 0.2% from that alone."""


@dataclass(frozen=True, slots=True)
class Errors:
    """How far a method is from float64, relative."""

    loss: float
    """Largest over rows where the method gives the loss per row, else of the sum."""
    gradient: float
    """Largest over gradients: norm of the difference over norm of the reference."""

    def refusal(self, dtype: str) -> str:
        """Why this is not the same work; empty if it is."""
        found = []
        if not self.loss <= LOSS_TOLERANCE:
            found.append(f"loss off by {self.loss:.1e}")
        if not self.gradient <= GRADIENT_TOLERANCE[dtype]:
            found.append(f"gradient off by {self.gradient:.1e}")
        return ", ".join(found)


def errors(loss: Tensor, gradients: tuple[Tensor, ...], expected: Expected) -> Errors:
    """Hold one result against the reference; a NaN anywhere makes the error NaN."""
    reference = expected.loss_R if loss.dim() else expected.loss_R.sum()
    off = ((loss.detach().double() - reference) / reference).abs().max()
    worst = torch.stack([_off(mine, theirs) for mine, theirs in zip(gradients, expected.gradients, strict=True)])
    return Errors(off.item(), worst.max().item())


def _off(mine: Tensor, theirs: Tensor) -> Tensor:
    # row by row: no second tensor of this size in float64
    difference = [(one.double() - two.double()).square().sum() for one, two in zip(mine, theirs, strict=True)]
    scale = [two.double().square().sum() for two in theirs]
    return (torch.stack(difference).sum() / torch.stack(scale).sum()).sqrt()
