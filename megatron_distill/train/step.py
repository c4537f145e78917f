"""Between an objective, which knows token arithmetic only, and the student's schedule, which knows logits only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_distill.errors import DataError
from megatron_distill.losses.reduce import reduce
from megatron_distill.losses.signal import teacher_logprob
from megatron_distill.models.student import Student
from megatron_distill.objectives._importance import Importance, sampled_tokens, weighted
from megatron_distill.objectives.base import Needs, Objective, Scope
from megatron_distill.train.mismatch import Mismatch
from megatron_distill.types import (
    Batch,
    MicroBatch,
    Plan,
    TeacherSignal,
    TokenStats,
    VocabPartition,
    VocabShard,
)

type Signals = Mapping[str, tuple[TeacherSignal, ...]]
"""By teacher name: one signal per micro-batch; empty on stages that see no logits."""


def token_stats(student: Student, batch: Batch, signals: Signals, needs: Needs, temperature: float) -> TokenStats:
    """The detached per-token numbers that an objective asked for, before the backward pass, equal on all its ranks."""
    student_logp = entropy = None
    if needs.entropy:
        student_logp, entropy = student.score_with_entropy(batch, temperature)
    elif needs.student_logprobs == "recompute":
        student_logp = student.score(batch, temperature)
    if needs.student_logprobs == "rollout":
        student_logp = tuple(micro.rollout_logp_R for micro in batch.micro)
    teacher_logp = {}
    if needs.teacher_logprobs:
        teacher_logp = {name: teacher_scores(student, batch, each, temperature) for name, each in signals.items()}
    return TokenStats(student_logp=student_logp, entropy=entropy, teacher_logp=teacher_logp)


def corrected(
    plan: Plan,
    importance: Importance,
    stats: TokenStats,
    objective: Objective,
    batch: Batch,
    scope: Scope,
    student: Student,
) -> Plan:
    """The plan for tokens that the engine sampled a little, or some updates, off the student; collective.

    Raises:
        DataError: importance weights are asked for, and the temperature of the engine's log-probs is not known.
    """
    if importance.weights == "none" or not sampled_tokens(batch, scope):
        return plan
    if batch.temperature is None:
        raise DataError(
            "train.importance.weights=truncated: the step's rollouts do not say at which temperature their log-probs "
            "were taken, or not all at the same: sample or record them anew, or set train.importance.weights=none"
        )
    recomputed = stats.student_logp if objective.needs.student_logprobs == "recompute" else None
    if recomputed is None or objective.temperature != batch.temperature:
        recomputed = student.score(batch, batch.temperature)
    return weighted(plan, batch, recomputed, importance.cap, scope)


@torch.no_grad()
def teacher_scores(
    student: Student, batch: Batch, signals: tuple[TeacherSignal, ...], temperature: float
) -> tuple[Tensor, ...]:
    """A teacher's log-probs of the response tokens: one [R] per micro-batch, on every model-parallel rank.

    Context-parallel ranks share the rows.
    """
    network, found = student.network, []
    for index, micro in enumerate(batch.micro):
        logp_R = torch.zeros(micro.rows, device=micro.target_R.device)
        if signals:
            mine = network.my_rows(micro.rows)
            starts = range(mine.start, max(mine.stop, mine.start + 1), student.chunk_rows)
            chunks = [slice(start, min(start + student.chunk_rows, mine.stop)) for start in starts]
            scores = [teacher_logprob(signals[index].rows(one), micro.target_R[one], temperature) for one in chunks]
            logp_R = network.all_rows(torch.cat(scores).float(), micro.rows)
        found.append(student.mesh.from_last_stage(logp_R))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundLoss:
    """An objective's loss with a step's signals and plan: raw logits of some rows in, their part of the loss out."""

    objective: Objective
    signals: Signals
    plan: Plan
    micro: tuple[MicroBatch, ...]
    partition: VocabPartition
    names: tuple[str, ...]
    mismatch: Mismatch | None = None
    """None where no token carries the engine's log-prob."""

    @property
    def figures(self) -> tuple[str, ...]:
        """See `models.schedule.MicroLoss`."""
        return () if self.mismatch is None else self.mismatch.names

    def __call__(self, logits_Cv: Tensor, micro: int, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """See `models.schedule.MicroLoss`."""
        responses = self.micro[micro].responses(rows)
        # before the loss, which may write its gradient over the logits
        figures = {} if self.mismatch is None else self.mismatch(logits_Cv, self.partition, responses)
        student = VocabShard.of(logits_Cv, self.partition, self.objective.temperature, disposable=True)
        teachers = {name: signals[micro].rows(rows) for name, signals in self.signals.items()}
        weights = self.plan.rows(micro, rows)
        terms = self.objective.loss(student, teachers, responses, weights)
        scalar, sums = reduce(terms, self.plan.denominators)
        return scalar, sums | figures


def bind(
    objective: Objective,
    signals: Signals,
    plan: Plan,
    batch: Batch,
    partition: VocabPartition,
    mismatch: Mismatch | None = None,
) -> BoundLoss:
    """Everything of a step but the logits."""
    return BoundLoss(
        objective=objective,
        signals=signals,
        plan=plan,
        micro=batch.micro,
        partition=partition,
        names=tuple(f"loss/{term}" for term in plan.denominators),
        mismatch=mismatch,
    )
