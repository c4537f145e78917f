"""The words in which an objective says which divergence it means; the arithmetic is in `divergence` and `top_k`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

type Name = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "mixed_kl", "total_variation"
]

type Outside = Literal["tail", "renormalise", "renormalise_teacher", "truncate"]
"""What becomes of ids outside a teacher's top k. `tail`: together they are one more id of either model. `renormalise`:
both models are taken as if the k ids were all there are. `renormalise_teacher`: only the teacher is. `truncate`: they
are left out of the sum, and nothing is renormalised."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence of the student q from the teacher p.

    forward_kl KL(p||q) · reverse_kl KL(q||p) · jsd(beta) beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q ·
    skew_forward_kl(alpha) KL(p || alpha p + (1-alpha) q) · skew_reverse_kl(alpha) KL(q || alpha q + (1-alpha) p) ·
    mixed_kl(w) w KL(p||q) + (1-w) KL(q||p) · total_variation sum |p - q| / 2
    """

    name: Name
    parameter: float = 0.0
    """beta, alpha or w, where there is one: between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.parameter <= 1.0:
            raise ValueError(f"{self.name}: parameter={self.parameter}: must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class Clip:
    """Bounds on what each vocabulary entry may add to a row's divergence; None is no bound.

    An entry beyond a bound counts as the bound and has no gradient: it is gated, the divergence is not bounded.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"clip: low={self.low} must be below high={self.high}")
