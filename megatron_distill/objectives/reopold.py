"""REOPOLD (arXiv 2603.11137): on-policy distillation with a bounded reward and, later, only where the student wavers.

    R  = log p(y) - log q(y)                 reward of a sampled token, a constant
    R^ = max(R, floor)
    loss = - sum M (q/q_old) R^ / sum M      M decides which tokens count, and is known before the backward pass

    stage 1, exploration  M = 1 where R >= floor: tokens on which the teacher is far below the student are left out
    stage 2, refinement   M = 1 where H(q) is among the highest share of the step's tokens, on all ranks together

The sources disagree on the floor, and no code is released: docs/objectives/reopold.md says what was chosen and why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives._sampled import Weighted, mean_over_tokens
from megatron_distill.objectives.base import Needs, PerMicro, Scope, State, reduction_weights
from megatron_distill.types import (
    Batch,
    Fidelity,
    Metric,
    Origin,
    Plan,
    Responses,
    TeacherSignal,
    Term,
    TokenStats,
    VocabShard,
)


@dataclass(frozen=True, kw_only=True)
class REOPOLD(Weighted):
    """Sampled reverse KL with a floor under the reward, over chosen tokens."""

    mixture: float = 0.1
    """lambda: how much of the student is mixed into the teacher in the argument that bounds the reward."""
    floor_form: Literal["mixture", "odds"] = "mixture"
    """The floor is log(lambda) / (1 - lambda), which the mixture argument gives, or log(lambda / (1 - lambda))."""
    switch_step: int | None = 150
    """The step at which stage 2 begins; null: never."""
    entropy_share: float = 0.2
    """Stage 2: how much of the step's tokens counts, from the highest entropy of the student down."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_support("reopold")
        largest = 1.0 if self.floor_form == "mixture" else 0.5
        if not 0 < self.mixture < largest:
            raise ValueError(
                f"mixture={self.mixture}: must be between 0 and {largest} with floor_form={self.floor_form}"
            )
        if self.switch_step is not None and self.switch_step < 0:
            raise ValueError(f"switch_step={self.switch_step}: must be 0 or more, or null for never")
        if not 0 < self.entropy_share <= 1:
            raise ValueError(f"entropy_share={self.entropy_share}: must be above 0 and at most 1")

    @property
    def floor(self) -> float:
        """The least reward, in nats."""
        if self.floor_form == "mixture":
            return math.log(self.mixture) / (1.0 - self.mixture)
        return math.log(self.mixture / (1.0 - self.mixture))

    @property
    def needs(self) -> Needs:
        return Needs(
            teacher=Fidelity.TOKEN,
            student_logprobs="recompute",
            entropy=self.switch_step is not None,
            teacher_logprobs=True,
            origins=frozenset({Origin.STUDENT}),
            unfiltered_samples=True,
            teacher_names=self.named_teachers,
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        self.check_samples(batch)
        assert stats.student_logp is not None
        teacher_logp = self.mean_teacher_logp(stats, batch)
        rewards = tuple(p_R - q_R for p_R, q_R in zip(teacher_logp, stats.student_logp, strict=True))
        above = tuple(reward_R >= self.floor for reward_R in rewards)
        metrics = []
        if self.switch_step is None or scope.step < self.switch_step:
            mask: PerMicro = above
        else:
            assert stats.entropy is not None
            threshold = _top_quantile(torch.cat(stats.entropy), self.entropy_share, scope)
            mask = tuple(entropy_R >= threshold for entropy_R in stats.entropy)
            metrics.append(Metric("objective/entropy_threshold", threshold))
        everywhere = tuple(torch.ones_like(mask_R) for mask_R in mask)
        metrics += [
            mean_over_tokens("objective/kept", mask, everywhere, scope),
            mean_over_tokens("objective/above_floor", above, everywhere, scope),
        ]
        weights, denominator = reduction_weights(batch, scope, self.reduction, mask)
        plan = Plan(
            weights={"reverse_kl": weights, "reward": tuple(one_R.clamp(min=self.floor) for one_R in rewards)},
            denominators={"reverse_kl": denominator},
            metrics=tuple(metrics),
        )
        return plan, state

    def loss(
        self,
        student: VocabShard,
        teachers: Mapping[str, TeacherSignal],
        rows: Responses,
        weights: Mapping[str, Tensor],
    ) -> dict[str, Term]:
        logp_R = logprob(student, rows.target_R)
        value_R = self.pull(logp_R, weights["reward"], rows)
        return {"reverse_kl": Term(value_R=value_R, weight_R=weights["reverse_kl"])}


def _top_quantile(entropy_R: Tensor, share: float, scope: Scope) -> float:
    """The least entropy among the `share` of the step's tokens that have most of it; collective."""
    everybody = scope.gather(entropy_R)
    count = max(1, round(share * len(everybody)))
    return everybody.topk(count).values[-1].item()
