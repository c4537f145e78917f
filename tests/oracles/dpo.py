"""DPO: the mean over pairs of -log sigmoid of beta times the difference of summed log-ratios to the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense
from tests.oracles.redi import pair

DATA = "pairs"
FIELDS: list[dict[str, Any]] = [{}, {"temperature": 1.3}, {"beta": 0.001}, {"beta": 2.0, "temperature": 1.3}]
TEACHERS = (("reference",),)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    temperature = fields["temperature"]
    ratio_S = step.sums_S(
        dense.logprob(step.student_RV, step.target_R, temperature)
        - dense.logprob(step.teachers_RV["reference"], step.target_R, temperature)
    )
    losses = []
    for group in step.group_S.unique().tolist():
        chosen, rejected = pair(step, group)
        losses.append(torch.log1p(torch.exp(-fields["beta"] * (ratio_S[chosen] - ratio_S[rejected]))))
    return torch.stack(losses).mean()
