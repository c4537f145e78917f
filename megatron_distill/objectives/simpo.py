"""SimPO (arXiv 2405.14734, equation 6): preference by mean log-prob per token, with a margin and no reference model.

    L = -mean over pairs of log sigmoid( beta (log q(y_w)/|y_w| - log q(y_l)/|y_l|) - gamma )

As with DPO, `prepare` computes the argument of the sigmoid from log-probs before the update and fixes one weight per
token, with which value and gradient are exact. Some implementations add a likelihood term on y_w by default; that is
another loss, and is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_distill.objectives._pairs import logistic_plan, logistic_term
from megatron_distill.objectives.base import Needs, Objective, Scope, State
from megatron_distill.types import Batch, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard


@dataclass(frozen=True, kw_only=True)
class SimPO(Objective):
    """-log sigmoid of the difference of two mean log-probs, beyond a margin."""

    beta: float = 2.0
    """How much a nat per token counts."""
    gamma: float = 1.0
    """The margin that the difference has to exceed, in the units of beta times nats per token; 0 or more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta}: must be above 0")
        if not self.gamma >= 0:
            raise ValueError(f"gamma={self.gamma}: must be 0 or more")

    @property
    def needs(self) -> Needs:
        return Needs(pairs=True, student_logprobs="recompute")

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        assert stats.student_logp is not None
        slopes = tuple((self.beta / micro.lengths_S())[micro.segment_R] for micro in batch.micro)
        return logistic_plan("simpo", batch, scope, stats.student_logp, slopes, margin=self.gamma), state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        return logistic_term("simpo", student, rows, weights)
