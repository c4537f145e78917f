"""SimPO: the mean over pairs of -log sigmoid(beta (difference of mean log-probs) - gamma)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense
from tests.oracles.redi import pair

DATA = "pairs"
FIELDS: list[dict[str, Any]] = [{}, {"temperature": 1.3}, {"beta": 10.0, "gamma": 5.0}, {"beta": 2.5, "gamma": 0.0}]
TEACHERS = (0,)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    mean_S = step.sums_S(dense.logprob(step.student_RV, step.target_R, fields["temperature"])) / step.lengths_S()
    losses = []
    for group in step.group_S.unique().tolist():
        chosen, rejected = pair(step, group)
        h = fields["beta"] * (mean_S[chosen] - mean_S[rejected]) - fields["gamma"]
        losses.append(torch.log1p(torch.exp(-h)))
    return torch.stack(losses).mean()
