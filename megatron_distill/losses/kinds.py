"""Which divergence, clipped how, and what becomes of the ids that a teacher did not send: plain settings, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

type DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "mixed_kl", "total_variation"
]

type Outside = Literal["tail", "renormalise", "renormalise_teacher", "truncate"]
"""What stands for the ids outside a teacher's K. With q the student, p the teacher and S the K ids:

`tail`: one more category holds the rest of either model. A lower bound of the full divergence, of the same zero.
`renormalise`: both models are conditioned on S. Blind to what the student does outside S.
`renormalise_teacher`: the teacher is conditioned on S; the student is not.
`truncate`: the sum runs over S and nothing else is said. Negative where the student has more of S than the teacher.
"""

OUTSIDE: tuple[Outside, ...] = get_args(Outside.__value__)

_PARAMETER_OF: dict[str, str] = {
    "jsd": "weight of the teacher in the mixture",
    "skew_forward_kl": "weight of the teacher in the mixture",
    "skew_reverse_kl": "weight of the student in the mixture",
    "mixed_kl": "weight of the forward KL",
}


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence of the student q from the teacher p, with its one number where it has one.

    Raises:
        ValueError: no divergence of that name, or a number outside [0, 1].
    """

    name: DivergenceName
    parameter: float = 0.0
    """jsd: beta, skew_*: alpha, mixed_kl: weight of the forward KL; others have none."""

    def __post_init__(self) -> None:
        names = get_args(DivergenceName.__value__)
        if self.name not in names:
            raise ValueError(f"divergence={self.name}: must be one of {', '.join(names)}")
        if self.name in _PARAMETER_OF:
            if not 0.0 <= self.parameter <= 1.0:
                raise ValueError(f"parameter={self.parameter}: {_PARAMETER_OF[self.name]}, must be between 0 and 1")
        elif self.parameter != 0.0:
            raise ValueError(f"parameter={self.parameter}: {self.name} has none, leave it 0")


@dataclass(frozen=True, slots=True)
class Clip:
    """Bounds, in nats, of what each entry of the vocabulary adds to a divergence, before the sum over the vocabulary.

    An entry outside its bounds has no gradient, so that this gates entries rather than bounding the divergence: with
    a bound above, an id of which the teacher wants far more loses probability (OPSD, arXiv 2601.18734).

    Raises:
        ValueError: the lower bound is not below the upper one.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low={self.low}: must be below high={self.high}")
