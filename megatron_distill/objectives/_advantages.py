"""What GRPO and its relatives share: rewards compared within groups, and the clipped surrogate that spends advantages.

Advantages are constants of the step. A group's rollouts may lie on several data-parallel ranks, so that all sums run
over the whole step (`group_sums`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.errors import DataError
from megatron_distill.losses.policy import clipped_surrogate, k3
from megatron_distill.losses.signal import teacher_logprob
from megatron_distill.objectives._trajectories import ended
from megatron_distill.objectives.base import Objective, PerMicro, Scope, group_sums, reduction_weights
from megatron_distill.types import Batch, Fidelity, MicroBatch, Responses, TeacherSignal

EPSILON = 1e-6
"""Added to the standard deviation that divides an advantage, as in verl and slime; TRL has 1e-4."""
EQUAL = 1e-8
"""Rewards whose standard deviation is no larger are equal: what is left of one is rounding."""
REFERENCE = "reference"
"""Name of the teacher that `kl_weight` holds the student to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Sequences compared with those of their group. [groups] is one entry where all groups were pooled."""

    advantage: PerMicro
    """[S]: 0 for sequences that were not compared, alone in their group, or all rewarded alike."""
    size_G: Tensor
    std_G: Tensor
    kept: PerMicro
    """[S], bool: whether the sequence's group has rewards that differ."""

    @property
    def uniform(self) -> tuple[float, float]:
        """How many groups have no gradient, for want of a difference, and how many groups there are."""
        exist_G = self.size_G > 0
        return float((exist_G & (self.std_G <= EQUAL)).sum()), float(exist_G.sum())


def compare(
    batch: Batch,
    scope: Scope,
    rewards: PerMicro,
    members: PerMicro,
    *,
    pooled: bool = False,
    divide_by_std: bool = True,
    leave_one_out: bool = False,
    lone_reward: bool = False,
) -> Compared:
    """A = (r - mean) / (std + 1e-6) within each group, std over n - 1; collective.

    Args:
        members: [S], bool: the sequences to compare; others neither count nor get an advantage.
        pooled: all members of the step are one group.
        divide_by_std: False leaves the division out (Dr.GRPO).
        leave_one_out: the mean is that of the other members: A is n / (n - 1) times as large.
        lone_reward: a member alone in its group has its reward for an advantage, not 0.
    """
    place = tuple(torch.zeros_like(micro.group_S) if pooled else micro.group_S for micro in batch.micro)

    def total(values: PerMicro) -> Tensor:
        chosen = tuple(torch.where(member, value.double(), 0.0) for member, value in zip(members, values, strict=True))
        sums_G = group_sums(batch, scope, chosen)
        return sums_G.sum(0, keepdim=True) if pooled else sums_G

    size_G = total(members)
    mean_G = total(rewards) / size_G.clamp(min=1)
    deviations = tuple(reward - mean_G[group_S] for reward, group_S in zip(rewards, place, strict=True))
    std_G = (total(tuple(one.square() for one in deviations)) / (size_G - 1).clamp(min=1)).sqrt()
    scale_G = 1 / (std_G + EPSILON) if divide_by_std else torch.ones_like(std_G)
    if leave_one_out:
        scale_G = scale_G * size_G / (size_G - 1).clamp(min=1)
    lone_G = (size_G == 1) & lone_reward
    kept = tuple(((std_G > EQUAL) | lone_G)[group_S] & member for group_S, member in zip(place, members, strict=True))
    advantage = tuple(
        torch.where(keep, torch.where(lone_G[group_S], reward, one * scale_G[group_S]), 0.0).to(
            torch.get_default_dtype()
        )
        for keep, reward, one, group_S in zip(kept, rewards, deviations, place, strict=True)
    )
    return Compared(advantage=advantage, size_G=size_G, std_G=std_G, kept=kept)


@dataclass(frozen=True, kw_only=True)
class GroupPolicy(Objective):
    """A clipped policy gradient whose advantages compare rollouts of one prompt; groups of one teach nothing."""

    divide_by_std: bool = True
    """Divide advantages by the standard deviation of the group's rewards; false in Dr.GRPO, which thereby does not
    favour prompts that are nearly always or nearly never solved."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a reward is compared with: the mean of its group, or of the others in it."""
    clip_low: float = 0.2
    """The ratio of new and old probability counts down to 1 - clip_low where the advantage is negative."""
    clip_high: float = 0.2
    """It counts up to 1 + clip_high where the advantage is positive; 0.28 is DAPO's clip-higher."""
    dual_clip: float | None = None
    """Bound of the ratio where the advantage is negative, above 1; none: unbounded."""
    reduction: Literal["token_mean", "sequence_mean", "constant"] = "sequence_mean"
    """Average over all tokens of the step (DAPO), over sequences of their mean per token (GRPO), or over sequences of
    their sum over tokens divided by `max_length` (Dr.GRPO)."""
    max_length: int | None = None
    """Longest response in tokens: rollout.sampling.max_new_tokens. Read by `reduction: constant` and by
    `overlong_buffer`, without effect otherwise."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """The old policy of the ratio: the engine as it wrote, or the trainer before the update, one more forward pass."""
    kl_weight: float = 0.0
    """Weight of KL(student || teacher `reference`), by the k3 estimator; 0 needs no teacher."""
    drop_uniform_groups: bool = False
    """Groups whose rewards are all equal leave the loss, and its denominators (DAPO's dynamic sampling, less the
    refill). Judged by rewards as the verifier gave them, before `overlong_buffer` shapes them."""
    mask_truncated: bool = False
    """Rollouts that did not end by themselves leave the loss; their rewards still count in their group."""
    overlong_buffer: int = 0
    """Tokens before `max_length` over which a response's reward falls by up to `overlong_penalty`; 0: none."""
    overlong_penalty: float = 1.0
    """What the longest responses lose, in units of the reward; without effect if `overlong_buffer` is 0. The paper's 1
    belongs to rewards of -1 and 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low}: must be above 0, up to 1")
        for name in ("clip_high", "overlong_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip}: must be above 1, or left out")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight={self.kl_weight}: must be 0 or more")
        if self.max_length is None and (self.reduction == "constant" or self.overlong_buffer):
            raise ValueError(
                "max_length: needed by reduction=constant and by overlong_buffer; set it to "
                "rollout.sampling.max_new_tokens"
            )
        if self.max_length is not None and not 0 <= self.overlong_buffer <= self.max_length > 0:
            raise ValueError(f"overlong_buffer={self.overlong_buffer}: must be from 0 to max_length={self.max_length}")

    @property
    def reference(self) -> tuple[Fidelity | None, frozenset[str]]:
        """What the KL asks of which teacher."""
        return (Fidelity.TOKEN, frozenset({REFERENCE})) if self.kl_weight else (None, frozenset())

    def scored(self, batch: Batch, scope: Scope) -> PerMicro:
        """[S], bool: rollouts with a verdict. One whose check failed or took too long belongs to no group; collective.

        Raises:
            DataError: no rollout of the step has one.
        """
        found = tuple(~micro.reward_S.isnan() for micro in batch.micro)
        if not scope.total(torch.stack([one.sum() for one in found]).sum()):
            raise DataError("no rollout of the step has a reward, nothing can be compared: check reward.kind")
        return found

    def compare(
        self, batch: Batch, scope: Scope, members: PerMicro, pooled: bool = False, lone_reward: bool = False
    ) -> Compared:
        """Advantages of `members` among each other, and which of them `drop_uniform_groups` would keep."""
        raw = tuple(micro.reward_S for micro in batch.micro)
        given = compare(batch, scope, raw, members, pooled=pooled, lone_reward=lone_reward)
        shaped = compare(
            batch,
            scope,
            tuple(self._shaped(micro) for micro in batch.micro),
            members,
            pooled=pooled,
            divide_by_std=self.divide_by_std,
            leave_one_out=self.baseline == "leave_one_out",
            lone_reward=lone_reward,
        )
        return Compared(advantage=shaped.advantage, size_G=given.size_G, std_G=given.std_G, kept=given.kept)

    def counted(self, batch: Batch, members: PerMicro, compared: Compared) -> PerMicro:
        """[R], bool: tokens of `members` that are in the loss."""
        counted = []
        for micro, member, kept in zip(batch.micro, members, compared.kept, strict=True):
            chosen = member & kept if self.drop_uniform_groups else member
            if self.mask_truncated:
                chosen = chosen & ended(micro)
            counted.append(chosen[micro.segment_R])
        return tuple(counted)

    def average(self, batch: Batch, scope: Scope, counted: PerMicro) -> tuple[PerMicro, float]:
        """Weights and denominator of the mean over `counted` tokens; collective."""
        if self.reduction != "constant":
            return reduction_weights(batch, scope, self.reduction, counted)
        assert self.max_length is not None
        weights, sequences = reduction_weights(batch, scope, "sequence_sum", counted)
        return weights, sequences * self.max_length

    def surrogate(self, logp_R: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What `old_logp` and `advantage` of the plan make of the student's log-probs: [R]."""
        return clipped_surrogate(
            logp_R, weights["old_logp"], weights["advantage"], self.clip_low, self.clip_high, self.dual_clip
        )

    def kl(self, logp_R: Tensor, teachers: Mapping[str, TeacherSignal], rows: Responses) -> Tensor:
        """The k3 estimate of KL(student || reference), differentiated through the student: [R]."""
        return k3(logp_R, teacher_logprob(teachers[REFERENCE], rows.target_R, self.temperature))

    def _shaped(self, micro: MicroBatch) -> Tensor:
        """[S]: rewards, less DAPO's soft punishment of the last `overlong_buffer` tokens before `max_length`."""
        if not self.overlong_buffer or self.max_length is None:
            return micro.reward_S
        over_S = micro.lengths_S() - (self.max_length - self.overlong_buffer)
        return micro.reward_S - self.overlong_penalty * (over_S / self.overlong_buffer).clamp(0.0, 1.0)


def by_token(batch: Batch, values: PerMicro) -> PerMicro:
    """Each sequence's value at each of its tokens: [S] -> [R] per micro-batch."""
    return tuple(value_S[micro.segment_R] for micro, value_S in zip(batch.micro, values, strict=True))
