"""ReNIO (Lin, Chen and Zhang, arXiv 2606.23104): reweight negative trajectories of on-policy distillation.

Where a student is surer of what it wrote than its teacher is, it erred, and there is most to learn. With
d = log q(y) - log p(y) of the sampled tokens, tau < c, and S the tokens of a response with d > tau (its pivotal ones):

    w = exp(mean over S of min(d, c) / T_w), 1 if S is empty;      w^ = min(w / mean of w over responses, 10)
    loss = mean over responses of w^ (mean over their tokens of D)

No verifier is asked. The weights are constants. D is that of `opsd`, as in the released code, which bounds every
entry of its forward KL to [0, 0.05]; the teacher may be a larger model (the paper's OPD) or the student itself with
privileged context (its OPSD): that belongs to `teachers`. Weighting `divergence: sampled_token` is our extension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_distill.errors import ConfigError
from megatron_distill.objectives._compared import AnyDivergence
from megatron_distill.objectives.base import Needs, PerMicro, Reduction, Scope, State, sequence_sums
from megatron_distill.types import Batch, Metric, MicroBatch, Origin, Plan, TokenStats


@dataclass(frozen=True, kw_only=True)
class ReNIO(AnyDivergence):
    """A divergence of student and teacher, each response weighted by how much surer of it the student is."""

    threshold: float = 0.8
    """tau: nats by which the student must be surer of a token than the teacher to make it pivotal."""
    threshold_counts: bool = False
    """Whether a token of exactly `threshold` is pivotal: not in the paper, but in the released code."""
    ceiling: float = 3.0
    """c: most that a pivotal token counts, in nats; above `threshold`."""
    weight_temperature: float = 1.0
    """T_w: larger makes weights more equal."""
    normalise: Literal["mean", "clamped_mean", "running_mean", "none"] = "mean"
    """Divide weights by their mean, then bound them by `largest`; bound them to [0.1, 10], then divide by their mean;
    divide by a running mean of steps' means (0.1 of the new, 0.9 of the old); or leave them alone."""
    mean_over: Literal["step", "micro_batch"] = "step"
    """Whose mean: that of all responses of the step, or of the responses that share a micro-batch. The latter is the
    released code's and depends on how a step is cut; with one response in each it makes all weights 1. Without effect
    if `normalise` is `none`."""
    largest: float = 10.0
    """Bound of weights with `normalise: mean`. Their mean is then below 1."""
    clip_low: float | None = 0.0
    """Least that an id adds to the divergence, in nats; null: no bound, as in OPSD."""
    clip_high: float | None = 0.05
    """Most that an id adds to the divergence, in nats; null: no bound."""
    reduction: Reduction = "sequence_mean"
    """Average of the weighted divergence over responses of their mean per token (the released code), over all tokens of
    the step, or over responses of their sum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ceiling > self.threshold:
            raise ValueError(f"ceiling={self.ceiling}: must be above threshold={self.threshold}")
        for name in ("weight_temperature", "largest"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.normalise != "mean":
            self.refuse_idle(f"normalise={self.normalise}", "largest")
        if self.normalise == "running_mean" and self.mean_over == "micro_batch":
            raise ValueError("mean_over=micro_batch: a running mean is one of steps: set mean_over=step")

    @property
    def needs(self) -> Needs:
        return replace(
            super().needs,
            student_logprobs="recompute",
            teacher_logprobs=True,
            origins=frozenset({Origin.STUDENT}),
        )

    def prepare(self, stats: TokenStats, batch: Batch, scope: Scope, state: State) -> tuple[Plan, State]:
        plan, _ = super().prepare(stats, batch, scope, state)
        assert stats.student_logp is not None
        theirs = self.mean_teacher_logp(stats, batch)
        surer = [ours_R - theirs_R for ours_R, theirs_R in zip(stats.student_logp, theirs, strict=True)]
        pivotal = [surer_R > self.threshold for surer_R in surer]
        if self.threshold_counts:
            pivotal = [surer_R >= self.threshold for surer_R in surer]
        raw = tuple(
            self.raw_weights(micro, surer_R, pivotal_R)
            for micro, surer_R, pivotal_R in zip(batch.micro, surer, pivotal, strict=True)
        )
        normalised, state = self.normalised(raw, batch, scope, state)
        weights = tuple(
            base_R * weight_S.to(base_R)[micro.segment_R]
            for micro, base_R, weight_S in zip(batch.micro, plan.weights["divergence"], normalised, strict=True)
        )
        everywhere = scope.gather(torch.cat(normalised))
        metrics = (
            Metric("renio/pivotal", float(scope.total(torch.cat(pivotal).sum())), batch.counts.tokens),
            Metric("renio/weight_mean", float(everywhere.sum()), batch.counts.sequences),
            Metric("renio/weight_max", float(everywhere.max())),
        )
        return replace(plan, weights={**plan.weights, "divergence": weights}, metrics=metrics), state

    def raw_weights(self, micro: MicroBatch, surer_R: Tensor, pivotal_R: Tensor) -> Tensor:
        """w of each response: [S] in fp64."""
        total_S = sequence_sums(micro, torch.where(pivotal_R, surer_R.double().clamp(max=self.ceiling), 0.0))
        count_S = sequence_sums(micro, pivotal_R.double())
        return (total_S / count_S.clamp(min=1.0) / self.weight_temperature).exp()

    def normalised(self, raw: PerMicro, batch: Batch, scope: Scope, state: State) -> tuple[PerMicro, State]:
        """w^ of each response, [S] per micro-batch, and what to remember; collective.

        Raises:
            ConfigError: means over micro-batches of which none holds two responses.
        """
        if self.normalise == "none":
            return raw, state
        if self.normalise == "clamped_mean":
            raw = tuple(weight_S.clamp(0.1, 10.0) for weight_S in raw)
        if self.mean_over == "micro_batch":
            sizes = scope.gather(torch.tensor([len(weight_S) for weight_S in raw], device=raw[0].device))
            if sizes.max() < 2:
                raise ConfigError(
                    "objective.mean_over=micro_batch: no micro-batch of this step holds two responses, so that every "
                    "weight is 1 and nothing is reweighted: set objective.mean_over=step, or raise "
                    "train.tokens_per_micro_batch"
                )
            scaled = tuple(weight_S / weight_S.mean() for weight_S in raw)
        else:
            mean = float(scope.total(torch.cat(raw).sum())) / batch.counts.sequences
            if self.normalise == "running_mean":
                mean = 0.1 * mean + 0.9 * state.get("weight_mean", mean)
                state = {"weight_mean": mean}
            scaled = tuple(weight_S / mean for weight_S in raw)
        if self.normalise == "mean":
            scaled = tuple(weight_S.clamp(max=self.largest) for weight_S in scaled)
        return scaled, state
