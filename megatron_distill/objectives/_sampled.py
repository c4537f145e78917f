"""What objectives share that follow a policy gradient over the student's own tokens: whose log-probs they had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.losses.policy import policy_gradient
from megatron_distill.objectives._supervision import Supervised
from megatron_distill.objectives.base import PerMicro, Scope
from megatron_distill.types import Batch, Metric, Origin, Responses


@dataclass(frozen=True, kw_only=True)
class Sampled(Supervised):
    """A supervised objective that learns from tokens which the student sampled."""

    old_logprobs: Literal["current", "rollout"] = "current"
    """Log-probs of the policy that sampled the tokens. `current`: the student's as it stands, so that every importance
    ratio is 1; right where each step samples with the newest weights. `rollout`: those that the engine wrote down; the
    ratio then makes up for weights that have moved since, and for an engine that computes a little otherwise."""

    def old_logp(self, logp_R: Tensor, rows: Responses) -> Tensor:
        """log q_old(y), a constant: [R]. The student's own where somebody else wrote the token."""
        if self.old_logprobs == "current":
            return logp_R.detach()
        written_R = rows.origin_R == Origin.STUDENT
        return torch.where(written_R, rows.rollout_logp_R.to(logp_R.dtype), logp_R.detach())

    def check_samples(self, batch: Batch) -> None:
        """Refuse tokens of others than `needs.origins`, and samples without the log-probs that `old_logprobs` reads.

        Raises:
            ConfigError: tokens of an origin that the objective does not learn from.
            DataError: `old_logprobs: rollout`, and a sampled token has no log-prob.
        """
        self.check_origins(batch)
        if self.old_logprobs == "rollout":
            self.check_logprobs(batch)


@dataclass(frozen=True, kw_only=True)
class Weighted(Sampled):
    """One whose policy gradient weighs every token by its importance ratio, unclipped as published."""

    ratio_limit: float | None = None
    """With `old_logprobs: rollout`, most that an importance ratio counts, 1 or more; null: e^20, where sums would
    overflow. A token beyond it keeps its gradient, so limited (truncated importance sampling); TRL has 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio_limit is None:
            return
        if not self.ratio_limit >= 1:
            raise ValueError(f"ratio_limit={self.ratio_limit}: must be 1 or more, or null")
        if self.old_logprobs == "current":
            raise ValueError(
                f"ratio_limit={self.ratio_limit}: every ratio is 1 with old_logprobs=current; leave it null, or set "
                "old_logprobs=rollout"
            )

    def pull(self, logp_R: Tensor, advantage_R: Tensor, rows: Responses) -> Tensor:
        """-(q/q_old) A, the ratio limited: [R]."""
        return policy_gradient(logp_R, advantage_R, self.old_logp(logp_R, rows), self.ratio_limit)


def mean_over_tokens(name: str, values: PerMicro, counted: PerMicro, scope: Scope) -> Metric:
    """The mean of `values` over the tokens of the whole step that are `counted`; collective."""
    sums = [
        torch.stack([value_R.masked_fill(~counted_R, 0).double().sum(), counted_R.double().sum()])
        for value_R, counted_R in zip(values, counted, strict=True)
    ]
    total, count = scope.total(torch.stack(sums).sum(0)).tolist()
    return Metric(name, total, count)
