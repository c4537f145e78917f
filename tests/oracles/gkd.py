"""GKD: the mean of the generalised Jensen-Shannon divergence, beta weighting the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles import dense
from tests.oracles._supervised import BY_SOURCE, TOP_K, compared, sampled

FIELDS: list[dict[str, Any]] = [
    {},
    {"beta": 0.1, "temperature": 1.3, "reduction": "sequence_mean"},
    {"beta": 0.0, "temperature": 1.3},
    {"beta": 1.0, "reduction": "sequence_sum"},
    {"beta": 0.9, "teacher_weights": {"big": 3.0, "small": 1.0}},
    {"beta": 0.3, **BY_SOURCE},
    *TOP_K,
    {"sampled_token": True, "beta": 0.4, "temperature": 1.3},
    {"sampled_token": True, "beta": 1.0, "reduction": "sequence_mean"},
]
TEACHERS = (1, 2)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    judged = sampled if fields["sampled_token"] else compared
    return step.mean(judged(step, fields, "jsd", fields["beta"]), fields["reduction"])
