"""MiniLLM: a clipped policy gradient of discounted later rewards, token by token, plus the exact reverse KL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense
from tests.oracles.opd import compared, sampled_logprobs

FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "reduction": "sequence_mean"},
    {"discount": 0.95, "own_reward": True, "reward_scale": 2.0, "reward_limit": 3.0},
    {"whiten": False, "discount": 0.5, "temperature": 0.8},
    {"whiten": False, "length_normalise": False, "reduction": "sequence_sum"},
    {"single_step": False, "own_reward": True, "discount": 0.9},
    {"old_logprobs": "rollout", "clip_ratio": 0.1},
    {"support": "top_k", "top_k": 5, "whiten": False},
    {"teacher_weights": {"big": 1.0, "small": 3.0}},
    {"teacher_sources": {"math": "big", "code": "small"}, "own_reward": True},
]
TEACHERS = (1, 2)


def advantages(step: dense.Step, reward_R: Tensor, fields: Mapping[str, Any]) -> Tensor:
    advantage_R = torch.zeros_like(reward_R)
    for sequence in step.sequences:
        rows = step.rows(sequence).tolist()
        for place, row in enumerate(rows):
            later = range(place if fields["own_reward"] else place + 1, len(rows))
            total = sum((fields["discount"] ** (one - place) * reward_R[rows[one]] for one in later), torch.tensor(0.0))
            advantage_R[row] = total / max(len(later), 1) if fields["length_normalise"] else total
    if fields["whiten"]:
        advantage_R = (advantage_R - advantage_R.mean()) / advantage_R.std(unbiased=False)
    return advantage_R


def parts(step: dense.Step, fields: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What each token adds: by the policy gradient, which has either sign, and by the exact divergence."""
    log_q, old, log_p = sampled_logprobs(step, fields)
    reward_R = fields["reward_scale"] * (log_p - old)
    if fields["reward_limit"] is not None:
        reward_R = reward_R.clamp(-fields["reward_limit"], fields["reward_limit"])
    advantage, ratio = advantages(step, reward_R, fields), (log_q - old).exp()
    clipped = ratio.clamp(1 - fields["clip_ratio"], 1 + fields["clip_ratio"])
    long_term = -torch.minimum(ratio * advantage, clipped * advantage)
    single_step = compared(step, fields, "reverse_kl") if fields["single_step"] else torch.zeros_like(long_term)
    return long_term, single_step


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    long_term, single_step = parts(step, fields)
    return step.mean(long_term + single_step, fields["reduction"])


def scale(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    long_term, single_step = parts(step, fields)
    return step.mean(long_term.abs() + single_step.abs(), fields["reduction"])
