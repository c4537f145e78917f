"""GKD: the mean of the generalised Jensen-Shannon divergence, beta weighting the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles import dense

FIELDS: list[dict[str, Any]] = [
    {},
    {"beta": 0.1, "temperature": 1.3, "reduction": "sequence_mean"},
    {"beta": 0.0, "temperature": 1.3},
    {"beta": 1.0, "reduction": "sequence_mean"},
    {"beta": 0.9, "teacher_weights": {"big": 3.0, "small": 1.0}},
]
TEACHERS = (1, 2)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    values = {
        name: dense.jsd(step.student_RV, teacher_RV, fields["temperature"], fields["beta"])
        for name, teacher_RV in step.teachers_RV.items()
    }
    return step.mean(step.teacher_average(values, fields["teacher_weights"]), fields["reduction"])
