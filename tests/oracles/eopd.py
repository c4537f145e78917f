"""EOPD: clipped policy gradient of the sampled reverse KL, plus alpha 1[H(p) >= tau] forward KL of the top-k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense
from tests.oracles.opd import sampled_logprobs

FIELDS: list[dict[str, Any]] = [
    {},
    {"entropy_threshold": 3.0},
    {"entropy_threshold": 3.0, "top_k": 5, "temperature": 1.3, "reduction": "sequence_mean", "alpha": 0.5},
    {"entropy_threshold": 2.5, "top_k": 5, "temperature": 0.8, "outside": "tail"},
    {"entropy_threshold": 3.0, "support": "full", "reduction": "sequence_sum"},
    {"entropy_threshold": 3.0, "top_k": 5, "old_logprobs": "rollout", "clip_ratio": 0.1},
    {"entropy_threshold": float("inf")},
    {"entropy_threshold": 1.5, "entropy_of": "top_k", "top_k": 5, "temperature": 1.3},
    {"entropy_threshold": 3.0, "top_k": 5, "teacher_weights": {"big": 1.0, "small": 3.0}},
    {"entropy_threshold": 3.0, "top_k": 5, "teacher_sources": {"math": "big", "code": "small"}},
]
TEACHERS = (1, 2)


def forward_kl(step: dense.Step, teacher_RV: Tensor, fields: Mapping[str, Any]) -> Tensor:
    temperature = fields["temperature"]
    entropy = dense.entropy(teacher_RV, temperature)
    if fields["entropy_of"] == "top_k":
        log_p = dense.log_softmax(teacher_RV, temperature)
        named = torch.zeros_like(log_p).scatter(-1, dense.top_ids(teacher_RV, fields["top_k"]), 1.0) > 0
        others = (log_p.exp() * ~named).sum(-1)
        entropy = -(log_p.exp() * log_p * named).sum(-1) - others * others.log()
    undecided = entropy >= fields["entropy_threshold"]
    if fields["support"] == "full":
        value_R = dense.forward_kl(step.student_RV, teacher_RV, temperature)
    else:
        value_R = dense.top_k_divergence(
            step.student_RV, teacher_RV, temperature, fields["top_k"], "forward_kl", outside=fields["outside"]
        )
    return torch.where(undecided, value_R, 0.0)


def parts(step: dense.Step, fields: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What each token adds: by the policy gradient, which has either sign, and by the forward KL."""
    log_q, old, log_p = sampled_logprobs(step, fields)
    advantage, ratio = log_p - old, (log_q - old).exp()
    clipped = ratio.clamp(1 - fields["clip_ratio"], 1 + fields["clip_ratio"])
    reverse = -torch.minimum(ratio * advantage, clipped * advantage)
    forward = step.teacher_average(
        {name: forward_kl(step, teacher_RV, fields) for name, teacher_RV in step.teachers_RV.items()},
        fields["teacher_weights"],
        fields["teacher_sources"],
    )
    return reverse, fields["alpha"] * forward


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    reverse, forward = parts(step, fields)
    return step.mean(reverse + forward, fields["reduction"])


def scale(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    reverse, forward = parts(step, fields)
    return step.mean(reverse.abs() + forward.abs(), fields["reduction"])
