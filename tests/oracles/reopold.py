"""REOPOLD: - sum M (q/q_old) max(R, floor) / sum M; M from the reward before the switch, from entropy after it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense
from tests.oracles.opd import ratio, sampled_logprobs

FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "reduction": "sequence_mean"},
    {"mixture": 0.3, "floor_form": "odds", "switch_step": None},
    {"mixture": 0.3, "reduction": "sequence_sum", "old_logprobs": "rollout"},
    {"mixture": 0.3, "old_logprobs": "rollout", "ratio_limit": 1.02},
    {"switch_step": 7},
    {"switch_step": 0, "entropy_share": 0.5, "temperature": 1.3, "reduction": "sequence_mean"},
    {"switch_step": 8, "mixture": 0.2},
    {"switch_step": 0, "old_logprobs": "rollout", "reduction": "sequence_sum"},
    {"switch_step": 0, "mixture": 0.4, "teacher_weights": {"big": 1.0, "small": 3.0}},
    {"mixture": 0.4, "teacher_sources": {"math": "big", "code": "small"}},
]
"""The step is number 7: a switch at 8 has not come yet."""
TEACHERS = (1, 2)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    log_q, old, log_p = sampled_logprobs(step, fields)
    share = fields["mixture"]
    floor = (
        math.log(share) / (1 - share) if fields["floor_form"] == "mixture" else math.log(share) - math.log(1 - share)
    )
    reward = log_p - log_q.detach()
    if fields["switch_step"] is None or step.number < fields["switch_step"]:
        mask_R = reward >= floor
    else:
        entropy = dense.entropy(step.student_RV.detach(), fields["temperature"])
        kept = max(1, round(fields["entropy_share"] * len(entropy)))
        mask_R = torch.zeros_like(entropy, dtype=torch.bool)
        mask_R[entropy.argsort(descending=True)[:kept]] = True
    value_R = -ratio(log_q, old, fields) * torch.where(reward > floor, reward, floor)
    return step.mean(value_R, fields["reduction"], mask_R)
