"""OPD: the reverse KL; by the sampled token its value is log q(y) - log p(y), its gradient that of -A log q(y)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles import dense

FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "reduction": "sequence_mean"},
    {"divergence": "reverse_kl"},
    {"divergence": "reverse_kl", "temperature": 1.3, "reduction": "sequence_mean"},
    {"divergence": "sampled_token", "teacher_weights": {"big": 1.0, "small": 3.0}},
    {"divergence": "reverse_kl", "teacher_weights": {"big": 1.0, "small": 3.0}},
]
TEACHERS = (1, 2)


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    temperature = fields["temperature"]
    if fields["divergence"] == "reverse_kl":
        values = {
            name: dense.reverse_kl(step.student_RV, teacher_RV, temperature)
            for name, teacher_RV in step.teachers_RV.items()
        }
        value_R = step.teacher_average(values, fields["teacher_weights"])
    else:
        log_q = dense.logprob(step.student_RV, step.target_R, temperature)
        log_p = step.teacher_average(
            {
                name: dense.logprob(teacher_RV, step.target_R, temperature)
                for name, teacher_RV in step.teachers_RV.items()
            },
            fields["teacher_weights"],
        )
        advantage = (log_p - log_q).detach()
        surrogate = -advantage * log_q
        value_R = surrogate - surrogate.detach() - advantage
    return step.mean(value_R, fields["reduction"])
