"""Supervised fine-tuning: the mean of -log q(y)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles import dense

FIELDS: list[dict[str, Any]] = [
    {},
    {"reduction": "sequence_mean"},
    {"temperature": 1.3},
]
TEACHERS = (0,)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    value_R = -dense.logprob(step.student_RV, step.target_R, fields["temperature"])
    return step.mean(value_R, fields["reduction"])
