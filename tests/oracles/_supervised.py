"""What the oracles of supervised objectives share: a divergence by `support`, averaged over teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.oracles import dense


def compared(
    step: dense.Step, fields: Mapping[str, Any], name: str, parameter: float = 0.0, clip: dense.Clip = (None, None)
) -> Tensor:
    """The teachers' average divergence of every token, over the vocabulary or the teacher's likeliest ids: [R]."""
    temperature = fields["temperature"]
    if fields["support"] == "full":
        values = {
            teacher: dense.divergence(step.student_RV, teacher_RV, temperature, name, parameter, clip)
            for teacher, teacher_RV in step.teachers_RV.items()
        }
    else:
        values = {
            teacher: dense.top_k_divergence(
                step.student_RV,
                teacher_RV,
                temperature,
                min(fields["top_k"], teacher_RV.shape[-1]),
                name,
                parameter,
                fields["outside"],
                clip,
            )
            for teacher, teacher_RV in step.teachers_RV.items()
        }
    return step.teacher_average(values, fields["teacher_weights"], fields["teacher_sources"])


def sampled(step: dense.Step, fields: Mapping[str, Any], name: str, parameter: float = 0.0) -> Tensor:
    """h(y) per sampled token, its gradient that of h(y) log q(y) with h constant; averaged over teachers: [R].

    h is the derivative of the divergence in q(y), at the token that was sampled, up to a constant: [R].
    """
    temperature = fields["temperature"]
    log_q = dense.logprob(step.student_RV, step.target_R, temperature)
    q = log_q.exp()

    def slope(teacher_RV: Tensor) -> Tensor:
        p = dense.logprob(teacher_RV, step.target_R, temperature).exp()
        if name == "reverse_kl" or (name == "jsd" and parameter == 1):
            return (q / p).log()
        if name == "jsd":
            return (1 - parameter) * (q / (parameter * p + (1 - parameter) * q)).log()
        if name == "skew_forward_kl":
            return -(1 - parameter) * p / (parameter * p + (1 - parameter) * q)
        assert name == "skew_reverse_kl", name
        mixture = parameter * q + (1 - parameter) * p
        # with alpha = 0 the constant alpha q/m is none, and this is the reverse KL
        return (q / mixture).log() - parameter * q / mixture

    slopes = {teacher: slope(teacher_RV) for teacher, teacher_RV in step.teachers_RV.items()}
    slope_R = step.teacher_average(slopes, fields["teacher_weights"], fields["teacher_sources"]).detach()
    return dense.with_value(slope_R * log_q, slope_R)


TOP_K: list[dict[str, Any]] = [
    {"support": "top_k", "top_k": 3, "temperature": 1.3},
    {"support": "top_k", "top_k": 2, "outside": "renormalise", "reduction": "sequence_mean"},
    {"support": "top_k", "top_k": 2, "outside": "renormalise_teacher"},
    {"support": "top_k", "top_k": 3, "outside": "truncate"},
]
"""Settings of every objective that compares a teacher's likeliest ids."""
BY_SOURCE: dict[str, Any] = {"teacher_sources": {"math": "big", "code": "small"}}
"""Each teacher judges the sequences of one data source."""
