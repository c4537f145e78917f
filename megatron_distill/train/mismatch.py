"""How far trainer and engine are apart on the tokens that the engine sampled: measured in every training step.

Both were to compute log q(y) with the same weights. Where they differ, what is trained on was drawn from another
policy than the one that the loss believes in: kernels and number formats that differ, weights that went over
wrong, an engine that samples otherwise than it says, or rollouts that are simply older than the weights.

With d = log q_trainer(y) - log q_engine(y), over all such tokens of the step:

    mismatch/logp_abs_mean         mean |d|
    mismatch/kl                    mean (e^d - 1 - d), the k3 estimate of KL(engine || trainer); never negative
    mismatch/outside               share of tokens with e^d outside [1/2, 2]
    mismatch/fresh_logp_abs_mean   mean |d| over tokens that were sampled with the very weights that learn from them

The last one leaves staleness out: what remains is the engine's own doing.
It costs one more reading of logits that are there anyhow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_distill.losses.policy import k3
from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives.base import Scope
from megatron_distill.types import Batch, Responses, VocabPartition, VocabShard

NAMES = ("mismatch/logp_abs_mean", "mismatch/kl", "mismatch/outside")
FRESH = "mismatch/fresh_logp_abs_mean"
FAR = math.log(2.0)
"""A ratio of probabilities further from 1 than this, either way, counts as outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """What to compare a step's logits with."""

    temperature: float
    """Of the engine's log-probs: the objective may have another, and compares something else then."""
    tokens: float
    """Tokens of the whole step that carry the engine's log-prob: figures are means over them."""
    version: int
    """Of the weights that learn."""
    fresh: float
    """Tokens among them that were sampled with these weights."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all figures; `FRESH` where there are such tokens."""
        return (*NAMES, FRESH) if self.fresh else NAMES

    @torch.no_grad()
    def __call__(self, logits_Cv: Tensor, partition: VocabPartition, rows: Responses) -> dict[str, Tensor]:
        """These rows' part of each figure; leaves the logits as they are."""
        shard = VocabShard.of(logits_Cv.detach(), partition, self.temperature)
        sampled_C = rows.sampled_R
        engine_C = rows.rollout_logp_R.masked_fill(~sampled_C, 0.0)
        trainer_C = torch.where(sampled_C, logprob(shard, rows.target_R).to(engine_C.dtype), engine_C)
        apart_C = (trainer_C - engine_C).abs()
        parts = (apart_C, k3(engine_C, trainer_C), (apart_C > FAR).to(apart_C.dtype))
        found = {name: part_C.sum() / self.tokens for name, part_C in zip(NAMES, parts, strict=True)}
        if self.fresh:
            found[FRESH] = apart_C[rows.version_R == self.version].sum() / self.fresh
        return found


def mismatch_of(batch: Batch, scope: Scope) -> Mismatch | None:
    """None where no token carries the engine's log-prob, or nobody knows at which temperature; collective over data."""
    counts = []
    for micro in batch.micro:
        sampled_R = micro.responses(slice(None)).sampled_R
        counts.append(torch.stack([sampled_R.sum(), (sampled_R & (micro.version_R == scope.step)).sum()]))
    tokens, fresh = scope.total(torch.stack(counts).sum(0).double()).tolist()
    if not tokens or batch.temperature is None:
        return None
    return Mismatch(temperature=batch.temperature, tokens=tokens, version=scope.step, fresh=fresh)
