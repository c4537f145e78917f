"""What must hold of every objective without an oracle: where student and teacher agree, and where nothing counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.objectives._supervision import Supervised
from megatron_distill.objectives.base import Scope, reduction_weights
from megatron_distill.testing.world import Worlds
from megatron_distill.types import Fidelity, Origin
from tests.certify.data import sequences
from tests.certify.settings import Setting, objectives, settings
from tests.certify.table import CUTS, ITSELF, VALID, Expected, Found, cut_step, table_sequences

REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")


def _agreeing(kind: str) -> list[Setting]:
    """Settings that are a divergence, with one teacher, which is the student itself."""
    found = []
    for one in settings(kind):
        values = vars(one.objective)
        if not isinstance(one.objective, Supervised) or len(one.teachers) != 1 or values["teacher_sources"]:
            continue
        estimate = values.get("sampled_token") or values.get("old_logprobs") == "rollout"
        # Sums over a part of the vocabulary have no minimum where models agree, and entries held above 0 have a kink.
        partial = values["outside"] not in ("tail", "renormalise")
        kink = values.get("clip_low") == 0.0
        if not (estimate or partial or kink):
            # what a teacher wrote is demonstrated, whoever agrees with it
            data = "sampled" if one.data == "mixed_origins" else one.data
            found.append(replace(one, teachers=(ITSELF,), data=data))
    return found


def _steps(asked: list[Setting]) -> list[list[Found]]:
    """At every fidelity that the objective accepts."""
    found = []
    for setting in asked:
        need = setting.objective.needs.teacher
        assert need is not None
        nothing = Found(loss=torch.zeros(()), logged=torch.zeros(()), gradients={})
        answer = Expected(setting=setting, scored=table_sequences(setting.data), found=nothing, scale=1.0)
        found.append([cut_step(answer, CUTS["whole"], one, (None, None)) for one in Fidelity if one >= need])
    return found


@pytest.mark.parametrize("kind", [kind for kind in objectives() if _agreeing(kind)])
def test_nothing_is_left_to_learn_from_an_identical_teacher(worlds: Worlds, kind: str) -> None:
    asked = _agreeing(kind)
    for setting, steps in zip(asked, worlds(1).run(_steps, asked)[0], strict=True):
        for found in steps:
            assert abs(found.loss.item()) < 2e-6, setting
            for name, gradient in found.gradients.items():
                assert gradient.abs().max() < 2e-6, f"{setting}: {name}"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [10_000, 24, 1])
def test_a_masked_sequence_weighs_nothing_however_it_is_packed(reduction: str, tokens: int) -> None:
    scored = sequences("constructed_groups", VALID, lambda ids, prompt: torch.full((len(ids) - prompt,), -1.0))
    batch = pack(
        scored,
        dp_rank=0,
        dp_size=1,
        tokens_per_micro_batch=tokens,
        device=torch.device("cpu"),
        version=0,
    )
    sampled = tuple(micro.origin_R == Origin.STUDENT for micro in batch.micro)
    scope = Scope(seed=0, step=0)
    weights, denominator = reduction_weights(batch, scope, reduction, sampled)
    total = sum(float(one.sum()) for one in weights) / denominator
    lengths = [len(one.rollout.tokens) for one in scored if Origin.STUDENT in one.rollout.origin]
    wanted = sum(lengths) / len(lengths) if reduction == "sequence_sum" else 1.0
    assert total == pytest.approx(wanted, rel=1e-6)
    for one, counted in zip(weights, sampled, strict=True):
        assert (one[~counted] == 0).all()
    nothing = tuple(torch.zeros_like(one) for one in sampled)
    weights, denominator = reduction_weights(batch, scope, reduction, nothing)
    assert denominator > 0
    assert not any(one.any() for one in weights)
