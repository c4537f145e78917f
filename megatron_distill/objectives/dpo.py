"""Direct preference optimisation (arXiv 2305.18290, equation 7): a logistic loss on how far the student has moved.

    L = -mean over pairs of log sigmoid(h)
    h = beta [ (log q(y_w) - log ref(y_w)) - (log q(y_l) - log ref(y_l)) ],   log-probs summed over whole responses

The reference model is the teacher named `reference`. The sigmoid joins all tokens of two responses, which may lie in
different micro-batches and on different ranks; `prepare` computes h from log-probs before the update and fixes one
weight per token, with which the loss has exactly DPO's value and gradient (see `_pairs.logistic_plan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_distill.objectives._pairs import logistic_plan, logistic_term
from megatron_distill.objectives.base import Needs, Objective, Scope, State
from megatron_distill.types import Batch, Fidelity, Plan, Responses, TeacherSignal, Term, TokenStats, VocabShard

REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """-log sigmoid of the difference of two implicit rewards, beta log(q/ref) of the whole response."""

    beta: float = 0.1
    """How much a nat of difference to the reference counts. On long reasoning traces far less does better: 0.001 was
    the best of 0.001, 0.01 and 0.1 in the REDI paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta}: must be above 0")

    @property
    def needs(self) -> Needs:
        return Needs(
            pairs=True,
            teacher=Fidelity.TOKEN,
            teacher_names=frozenset({REFERENCE}),
            teacher_logprobs=True,
            student_logprobs="recompute",
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        assert stats.student_logp is not None
        slopes = tuple(torch.full_like(logp_R, self.beta) for logp_R in stats.student_logp)
        offset = stats.teacher_logp[REFERENCE]
        return logistic_plan("dpo", batch, scope, stats.student_logp, slopes, offset=offset), state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        return logistic_term("dpo", student, rows, weights)
