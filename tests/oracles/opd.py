"""OPD: the reverse KL; by the sampled token its value is -(q/q_old) A, its gradient that of it with A constant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles import dense

FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "reduction": "sequence_mean"},
    {"old_logprobs": "rollout", "reduction": "sequence_sum"},
    {"old_logprobs": "rollout", "ratio_limit": 1.02, "temperature": 1.3},
    {"divergence": "reverse_kl"},
    {"divergence": "reverse_kl", "temperature": 1.3, "reduction": "sequence_mean"},
    {"divergence": "reverse_kl", "support": "top_k", "top_k": 5},
    {"divergence": "reverse_kl", "support": "top_k", "top_k": 5, "outside": "renormalise", "temperature": 0.8},
    {"divergence": "reverse_kl", "support": "top_k", "top_k": 7, "outside": "truncate"},
    {"divergence": "sampled_token", "teacher_weights": {"big": 1.0, "small": 3.0}},
    {"divergence": "reverse_kl", "teacher_weights": {"big": 1.0, "small": 3.0}},
    {"divergence": "sampled_token", "teacher_sources": {"math": "big", "code": "small"}},
]
TEACHERS = (1, 2)


def sampled_logprobs(step: dense.Step, fields: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """log q with gradient, log q_old and log p of the response tokens, the teachers' averaged: [R] each."""
    log_q = dense.logprob(step.student_RV, step.target_R, fields["temperature"])
    log_p = step.teacher_average(
        {
            name: dense.logprob(teacher_RV, step.target_R, fields["temperature"])
            for name, teacher_RV in step.teachers_RV.items()
        },
        fields["teacher_weights"],
        fields["teacher_sources"],
    )
    old = log_q.detach()
    if fields["old_logprobs"] == "rollout":
        old = step.rollout_logp_R.where(step.origin_R == dense.STUDENT, old)
    return log_q, old, log_p


def ratio(log_q: Tensor, old: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """q/q_old; with a limit at most that, and then a constant factor of the gradient of log q."""
    if fields["ratio_limit"] is None:
        return (log_q - old).exp()
    limited = (log_q - old).detach().exp().clamp(max=fields["ratio_limit"])
    return limited * (1 + log_q - log_q.detach())


def compared(step: dense.Step, fields: Mapping[str, Any], name: str) -> Tensor:
    """A divergence from the teachers, averaged: [R]."""

    def value(teacher_RV: Tensor) -> Tensor:
        if fields["support"] == "full":
            return dense.divergence(step.student_RV, teacher_RV, fields["temperature"], name)
        return dense.top_k_divergence(
            step.student_RV,
            teacher_RV,
            fields["temperature"],
            fields["top_k"],
            name,
            outside=fields["outside"],
        )

    values = {teacher: value(teacher_RV) for teacher, teacher_RV in step.teachers_RV.items()}
    return step.teacher_average(values, fields["teacher_weights"], fields["teacher_sources"])


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    if fields["divergence"] == "reverse_kl":
        value_R = compared(step, fields, "reverse_kl")
    else:
        log_q, old, log_p = sampled_logprobs(step, fields)
        value_R = -ratio(log_q, old, fields) * (log_p - old)
    return step.mean(value_R, fields["reduction"])
