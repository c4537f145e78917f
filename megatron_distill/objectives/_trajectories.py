"""What a response is made of: whether it ended by itself, what was copied into it, where a revision in it begins.

Most speak of one micro-batch, [S] or [R], and read what the rollout source left in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_distill.errors import DataError
from megatron_distill.objectives.base import PerMicro, Scope, sequence_sums
from megatron_distill.types import Batch, Metric, MicroBatch, Origin, Stop

PREFIX = "prefix_tokens"
"""Fact of a constructed trajectory: how many tokens at its beginning are copied from a wrong rollout."""
ENDED = "ended_before_cut"
"""Fact of a response that was cut to fit a teacher: 1 if the whole of it had ended by itself."""


def ended(micro: MicroBatch) -> Tensor:
    """[S], bool: whether the student ended a response by itself, rather than for want of room.

    One that was cut only so that a teacher can read it counts as the student left it.
    """
    stops = [one.rollout.stop is Stop.EOS or one.facts.get(ENDED) == 1 for one in micro.sequences]
    return torch.tensor(stops, dtype=torch.bool, device=micro.target_R.device)


def constructed(micro: MicroBatch) -> Tensor:
    """[S], bool: whether a response holds constructed tokens."""
    return sequence_sums(micro, micro.origin_R == Origin.CONSTRUCTED) > 0


def beyond_prefix(micro: MicroBatch) -> Tensor:
    """[R], bool: false for the copied beginning of a constructed trajectory.

    Raises:
        DataError: the rollout source does not say how long it is.
    """
    beyond: list[bool] = []
    for one in micro.sequences:
        copied = 0.0
        if Origin.CONSTRUCTED in one.rollout.origin:
            if PREFIX not in one.facts:
                raise DataError(
                    f"rollout {one.rollout.sample} of group {one.rollout.group}: has no fact {PREFIX}, which "
                    "objective.mask_prefix reads: use a rollout source that gives it, or mask_prefix=false"
                )
            copied = one.facts[PREFIX]
        beyond += [place >= copied for place in range(len(one.rollout.tokens))]
    return torch.tensor(beyond, dtype=torch.bool, device=micro.target_R.device)


def after_constructed(micro: MicroBatch) -> Tensor:
    """[R], bool: tokens that follow the last constructed one of their response; all, where it has none."""
    return _row(micro) > _edge(micro, "amax", -1)


def before_constructed(micro: MicroBatch) -> Tensor:
    """[R], bool: tokens that precede the first constructed one of their response; all, where it has none."""
    return _row(micro) < _edge(micro, "amin", micro.rows)


def describe_constructed(batch: Batch, scope: Scope, weights: PerMicro) -> tuple[Metric, ...]:
    """How many trajectories of the step were constructed, how many are right, and their tokens' weights; collective."""
    built = [constructed(micro) for micro in batch.micro]
    reward = scope.gather(torch.cat([micro.reward_S[one] for micro, one in zip(batch.micro, built, strict=True)]))
    chosen = zip(batch.micro, built, weights, strict=True)
    w = scope.gather(torch.cat([weight_R[one[micro.segment_R]] for micro, one, weight_R in chosen]))
    some = float(len(w) > 0)
    return (
        Metric("tapo/constructed", float(len(reward))),
        Metric("tapo/constructed_reward", float(reward.sum()), float(len(reward))),
        Metric("tapo/weight_mean", float(w.sum()), float(len(w))),
        Metric("tapo/weight_min", float(w.min()) if some else 0.0, some),
        Metric("tapo/weight_max", float(w.max()) if some else 0.0, some),
    )


def _row(micro: MicroBatch) -> Tensor:
    return torch.arange(micro.rows, device=micro.target_R.device)


def _edge(micro: MicroBatch, which: str, otherwise: int) -> Tensor:
    """[R]: the first or last row with a constructed token of the response that a token belongs to."""
    row_R = torch.where(micro.origin_R == Origin.CONSTRUCTED, _row(micro), otherwise)
    edge_S = row_R.new_full((len(micro.sequences),), otherwise).scatter_reduce(0, micro.segment_R, row_R, which)
    return edge_S[micro.segment_R]
