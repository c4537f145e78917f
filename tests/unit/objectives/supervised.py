"""A whole step of student and teachers with given logits, through the real packing, planning and reduction, in fp64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.losses.reduce import reduce
from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives.base import Objective, Scope, State
from megatron_distill.types import (
    Batch,
    Full,
    Metric,
    Origin,
    Plan,
    Prompt,
    Rollout,
    Scored,
    Stop,
    TokenStats,
    VocabPartition,
    VocabShard,
)

GOLDEN_STUDENT, GOLDEN_TEACHER = (1.0, 0.5, -0.5, -2.0), (0.0, 2.0, -1.0, -3.0)
"""Logits of one token, for which divergences and gradients were worked out by hand."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response, with both models' logits for its tokens: [R, V], fp64."""

    tokens: Sequence[int]
    student_RV: Tensor
    teacher_RV: Tensor
    origin: Origin = Origin.STUDENT


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a step: its loss, gradients by answer, and what was planned."""

    loss: float
    gradients: list[Tensor]
    plan: Plan
    state: State
    teacher_gradient: Tensor | None

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {metric.name: metric for metric in self.plan.metrics}


def golden(token: int = 1) -> Answer:
    """One token."""
    student, teacher = (torch.tensor([one], dtype=torch.float64) for one in (GOLDEN_STUDENT, GOLDEN_TEACHER))
    return Answer(tokens=(token,), student_RV=student, teacher_RV=teacher)


def answers(*lengths: int, vocabulary: int = 7) -> list[Answer]:
    """Of these lengths, at random."""
    return [
        Answer(
            tokens=torch.randint(vocabulary, (length,)).tolist(),
            student_RV=2 * torch.randn(length, vocabulary, dtype=torch.float64),
            teacher_RV=2 * torch.randn(length, vocabulary, dtype=torch.float64),
        )
        for length in lengths
    ]


def packed(held: Sequence[Answer], budget: int = 1000) -> Batch:
    """On one rank; `budget` cuts it into micro-batches."""
    return pack(
        [_scored(index, one) for index, one in enumerate(held)],
        dp_rank=0,
        dp_size=1,
        tokens_per_micro_batch=budget,
        device=torch.device("cpu"),
        version=0,
    )


def _scored(index: int, one: Answer) -> Scored:
    rollout = Rollout(
        prompt=Prompt(id=str(index), messages=(), tokens=(1, 2)),
        group=f"{index:03}",
        sample=0,
        tokens=tuple(one.tokens),
        logprobs=None,
        origin=(one.origin,) * len(one.tokens),
        stop=Stop.EOS,
        version=0,
    )
    return Scored(rollout=rollout, reward=None)


def run(objective: Objective, held: Sequence[Answer], budget: int = 1000, state: State | None = None) -> Outcome:
    """One step of it."""
    batch = packed(held, budget)
    valid = held[0].student_RV.shape[1]
    partition = VocabPartition(start=0, width=valid, valid=valid, group=None)
    student, shards, signals = [], [], []
    for micro in batch.micro:
        mine = [held[index] for index in micro.index_S.tolist()]
        logits_RV = torch.cat([one.student_RV for one in mine]).requires_grad_()
        teacher_RV = torch.cat([one.teacher_RV for one in mine]).requires_grad_()
        student.append(logits_RV)
        shards.append(VocabShard.of(logits_RV, partition, objective.temperature))
        signals.append(Full(hidden_RH=teacher_RV, head_vH=torch.eye(valid, dtype=torch.float64), partition=partition))
    with torch.no_grad():
        ours = tuple(logprob(shard, m.target_R) for shard, m in zip(shards, batch.micro, strict=True))
        theirs = tuple(
            logprob(signal.shard(objective.temperature), m.target_R)
            for signal, m in zip(signals, batch.micro, strict=True)
        )
    stats = TokenStats(student_logp=ours, teacher_logp={"main": theirs})
    before = objective.initial() if state is None else state
    plan, after = objective.prepare(stats, batch, Scope(seed=0, step=0), before)
    total = torch.zeros((), dtype=torch.float64)
    for index, (shard, signal, micro) in enumerate(zip(shards, signals, batch.micro, strict=True)):
        whole = slice(0, micro.rows)
        terms = objective.loss(shard, {"main": signal}, micro.responses(whole), plan.rows(index, whole))
        total = total + reduce(terms, plan.denominators)[0]
    total.backward()
    gradients: dict[int, Tensor] = {}
    for leaf, micro in zip(student, batch.micro, strict=True):
        assert leaf.grad is not None
        gradients |= {index: leaf.grad[micro.segment_R == place] for place, index in enumerate(micro.index_S.tolist())}
    return Outcome(
        loss=float(total.detach()),
        gradients=[gradients[index] for index in range(len(held))],
        plan=plan,
        state=after,
        teacher_gradient=signals[0].hidden_RH.grad,
    )
