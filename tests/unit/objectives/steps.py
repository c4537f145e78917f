"""A whole step with given logits, through the real packing, planning and reduction, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.losses.reduce import reduce
from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives.base import Objective, Scope
from megatron_distill.types import (
    Batch,
    Metric,
    Origin,
    Prompt,
    Rollout,
    Scored,
    Stop,
    TokenStats,
    VocabPartition,
    VocabShard,
)


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a response is made of, and the logits that the student has for its tokens."""

    group: str
    sample: int
    reward: float | None
    tokens: Sequence[int]
    logits_RV: Tensor
    reference_logp_R: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Loss of the whole step, and its gradient in each response's logits, by (group, sample)."""

    loss: float
    gradients: Mapping[tuple[str, int], Tensor]
    sums: Mapping[str, float]
    metrics: Mapping[str, Metric]


def response(group: str, sample: int, reward: float | None, tokens: Sequence[int], logits: Any = None) -> Response:
    """With random logits of four ids unless some are given: the same in every process, since modules draw them too."""
    seed = crc32(repr((group, sample, *tokens)).encode())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(tokens), 4, generator=generator) if logits is None else torch.tensor(logits)
    return Response(group=group, sample=sample, reward=reward, tokens=tokens, logits_RV=drawn.double())


def scored(one: Response) -> Scored:
    rollout = Rollout(
        prompt=Prompt(id=one.group, messages=(), tokens=(1, 2)),
        group=one.group,
        sample=one.sample,
        tokens=tuple(one.tokens),
        logprobs=None,
        origin=(Origin.CONSTRUCTED,) * len(one.tokens),
        stop=Stop.EOS,
        version=0,
    )
    return Scored(rollout=rollout, reward=one.reward)


def packed(responses: Sequence[Response], budget: int = 1000, dp_rank: int = 0, dp_size: int = 1) -> Batch:
    return pack(
        [scored(one) for one in responses],
        dp_rank=dp_rank,
        dp_size=dp_size,
        tokens_per_micro_batch=budget,
        device=torch.device("cpu"),
        version=0,
    )


def run(objective: Objective, responses: Sequence[Response], budget: int = 1000) -> Outcome:
    """One step of everything; `budget` cuts it into micro-batches."""
    batch = packed(responses, budget)
    by_name = {(one.group, one.sample): one for one in responses}
    rows = [[by_name[one.rollout.group, one.rollout.sample] for one in micro.sequences] for micro in batch.micro]
    logits = [torch.cat([one.logits_RV for one in held]).requires_grad_() for held in rows]
    partition = VocabPartition(start=0, width=logits[0].shape[1], valid=logits[0].shape[1], group=None)
    shards = [VocabShard.of(logits_RV, partition, objective.temperature) for logits_RV in logits]
    stats = TokenStats()
    if objective.needs.student_logprobs == "recompute":
        with torch.no_grad():
            before = tuple(logprob(shard, m.target_R) for shard, m in zip(shards, batch.micro, strict=True))
        stats = TokenStats(student_logp=before)
    if objective.needs.teacher_logprobs:
        known = tuple(torch.cat([one.reference_logp_R for one in held]) for held in rows)
        stats = TokenStats(student_logp=stats.student_logp, teacher_logp={"reference": known})
    plan, _ = objective.prepare(stats, batch, Scope(seed=0, step=0), objective.initial())
    total, sums = torch.zeros((), dtype=torch.float64), dict[str, float]()
    for index, (shard, micro) in enumerate(zip(shards, batch.micro, strict=True)):
        whole = slice(0, micro.rows)
        terms = objective.loss(shard, {}, micro.responses(whole), plan.rows(index, whole))
        scalar, parts = reduce(terms, plan.denominators)
        total = total + scalar
        sums = {name: sums.get(name, 0.0) + float(part) for name, part in parts.items()}
    total.backward()
    gradients = {}
    for held, leaf in zip(rows, logits, strict=True):
        assert leaf.grad is not None
        parts_RV = leaf.grad.split([len(one.tokens) for one in held])
        gradients |= {(one.group, one.sample): part for one, part in zip(held, parts_RV, strict=True)}
    metrics = {metric.name: metric for metric in plan.metrics}
    return Outcome(loss=float(total.detach()), gradients=gradients, sums=sums, metrics=metrics)


# The pair of docs/objectives: two chosen and three rejected tokens over four ids.
CHOSEN = response("a", 0, 1.0, (3, 2), [[1.0, 0, -1, 2], [0, 0, 1, -1]])
REJECTED = response("a", 1, 0.0, (1, 0, 3), [[0.0, 1, 0, 0], [2, 0, -1, 1], [-1, -1, 0, 1]])
