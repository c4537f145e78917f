"""Supervised fine-tuning: the mean of -log q(y), over all responses or over those that were found right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense

FIELDS: list[dict[str, Any]] = [
    {},
    {"reduction": "sequence_mean"},
    {"temperature": 1.3},
    {"reduction": "sequence_sum"},
    {"keep": "correct"},
    {"keep": "correct", "reduction": "sequence_mean", "temperature": 1.3},
    {"keep": "correct", "reduction": "sequence_sum"},
]
TEACHERS = (0,)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    value_R = -dense.logprob(step.student_RV, step.target_R, fields["temperature"])
    if fields["keep"] == "all":
        return step.mean(value_R, fields["reduction"])
    right = [row for sequence in step.sequences if step.reward_S[sequence] == 1 for row in step.rows(sequence).tolist()]
    mask_R = torch.zeros(len(value_R), dtype=torch.float64)
    mask_R[right] = 1.0
    if fields["reduction"] == "sequence_sum":
        return (value_R * mask_R).sum() / int((step.reward_S == 1).sum())
    return step.mean(value_R, fields["reduction"], mask_R)
