"""SD-Zero: two records per trace in phase 1, scored one by one; a KL on the student's own tokens in phase 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dense

FIELDS: list[dict[str, Any]] = [
    {},
    {"support": "full", "reduction": "sequence_sum", "mask_truncated": False},  # the paper
    {"divergence": "mixed_kl", "outside": "renormalise", "mask_truncated": False, "top_k": 8},  # the released code
    {"temperature": 1.3, "top_k": 5, "reduction": "sequence_mean"},
    {"divergence": "forward_kl", "support": "full", "reduction": "sequence_sum", "temperature": 0.8},
    {"divergence": "mixed_kl", "forward_weight": 0.2, "top_k": 5, "outside": "truncate"},
    {"divergence": "mixed_kl", "forward_weight": 0.9, "support": "full", "teacher_weights": {"big": 1.0, "small": 2.0}},
    {"top_k": 5, "teacher_sources": {"math": "big", "code": "small"}},
    {"phase": "revision"},
    {"phase": "revision", "reduction": "sequence_sum", "temperature": 1.3},
    {"phase": "revision", "reduction": "sequence_mean"},
    {"phase": "revision", "revision_weight": 0.0, "init_weight": 0.25},
    {"phase": "revision", "generation_weight": 0.0, "reduction": "sequence_mean"},
]
TEACHERS = (1, 2)


def DATA(fields: Mapping[str, Any]) -> str:
    return "revisions" if fields["phase"] == "revision" else "sampled"


def oracle(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    return two_records(step, fields) if fields["phase"] == "revision" else distillation(step, fields)


def two_records(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    """The mean of the generation records plus the mean of the revision records."""
    value_R = -dense.logprob(step.student_RV, step.target_R, fields["temperature"])
    first_R, revised_R = torch.zeros_like(value_R), torch.zeros_like(value_R)
    for sequence in step.sequences:
        rows = step.rows(sequence)
        phrase = [place for place, row in enumerate(rows) if step.origin_R[row] == dense.CONSTRUCTED]
        first_R[rows[: phrase[0]]] = 1
        revised_R[rows[phrase[-1] + 1 :]] = 1
    learned_R = torch.where(first_R > 0, fields["init_weight"] * value_R, value_R)
    generation = step.mean(learned_R, fields["reduction"])
    revision = step.mean(value_R, fields["reduction"], revised_R)
    return fields["generation_weight"] * generation + fields["revision_weight"] * revision


def distillation(step: dense.Step, fields: Mapping[str, Any]) -> Tensor:
    parameter = fields["forward_weight"] if fields["divergence"] == "mixed_kl" else 0.0
    warmth, name = fields["temperature"], fields["divergence"]
    values = {}
    for teacher, teacher_RV in step.teachers_RV.items():
        if fields["support"] == "full":
            values[teacher] = dense.divergence(step.student_RV, teacher_RV, warmth, name, parameter)
        else:
            values[teacher] = dense.top_k_divergence(
                step.student_RV, teacher_RV, warmth, fields["top_k"], name, parameter, fields["outside"]
            )
    value_R = step.teacher_average(values, fields["teacher_weights"], fields["teacher_sources"])
    keep_S = step.stopped_S if fields["mask_truncated"] else torch.ones_like(step.stopped_S)
    keep_R = keep_S[step.sequence_R].double()
    if fields["reduction"] == "sequence_sum":
        return (value_R * keep_R).sum() / float(keep_S.sum())
    return step.mean(value_R, fields["reduction"], keep_R)
