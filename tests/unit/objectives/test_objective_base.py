"""What all objectives share: checked settings, plans over the whole step, keyed randomness, teachers' shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.errors import ConfigError
from megatron_distill.objectives.base import Objective, Scope, reduction_weights
from megatron_distill.objectives.gkd import GKD
from megatron_distill.objectives.opd import OPD
from megatron_distill.objectives.sft import SFT
from megatron_distill.plugins import kinds, load
from megatron_distill.types import Batch, Fidelity, Origin, Prompt, Rollout, Scored, Stop, TokenStats


def _batch(lengths: list[int], origin: Origin = Origin.STUDENT, budget: int = 100, dp_size: int = 1) -> Batch:
    scored = [
        Scored(
            rollout=Rollout(
                prompt=Prompt(id=str(index), messages=(), tokens=(1, 2)),
                group=str(index),
                sample=0,
                tokens=tuple(range(length)),
                logprobs=None,
                origin=(origin,) * length,
                stop=Stop.EOS,
                version=0,
            ),
            reward=None,
        )
        for index, length in enumerate(lengths)
    ]
    return pack(
        scored, dp_rank=0, dp_size=dp_size, tokens_per_micro_batch=budget, device=torch.device("cpu"), version=0
    )


def test_needs_follow_from_the_settings() -> None:
    assert SFT().needs.teacher is None
    assert GKD().needs.teacher == Fidelity.FULL
    assert OPD(divergence="sampled_token").needs.teacher == Fidelity.TOKEN
    assert OPD(divergence="sampled_token").needs.origins == {Origin.STUDENT}
    assert OPD(divergence="reverse_kl").needs.teacher == Fidelity.FULL
    assert OPD(divergence="reverse_kl").needs.origins == set(Origin)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        (SFT, {"temperature": 0.0}, "temperature=0.0: must be above 0"),
        (GKD, {"temperature": -1.0}, "temperature=-1.0"),
        (GKD, {"beta": 1.5}, "beta=1.5: must be between 0"),
        (GKD, {"teacher_weights": {"big": -1.0}}, "teacher_weights.big=-1.0: must be above 0"),
        (OPD, {"teacher_weights": {"big": 0.0}}, "teacher_weights.big=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(part: type[Objective], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part(**fields)


def test_every_objective_loads_by_its_file_name_with_defaults_alone() -> None:
    for kind in kinds("megatron_distill.objectives"):
        objective = load("megatron_distill.objectives", kind, Objective)()
        assert objective.initial() == {}
        assert objective.temperature == 1.0


def test_a_token_mean_counts_tokens_of_the_whole_step_not_of_this_rank() -> None:
    weights, denominator = reduction_weights(_batch([4, 3, 2], dp_size=2), Scope(seed=0, step=0), "token_mean")
    assert denominator == 9.0
    assert sum(weights_R.sum().item() for weights_R in weights) < 9.0


def test_a_sequence_mean_gives_every_sequence_one_vote() -> None:
    batch = _batch([4, 1, 5], budget=7)
    weights, denominator = reduction_weights(batch, Scope(seed=0, step=0), "sequence_mean")
    assert denominator == 3.0
    assert len(weights) > 1
    assert sorted(torch.cat(weights).tolist()) == pytest.approx([0.2] * 5 + [0.25] * 4 + [1.0])


def test_the_sampled_token_objective_refuses_tokens_the_student_did_not_sample() -> None:
    batch = _batch([3], origin=Origin.CONSTRUCTED)
    scope = Scope(seed=0, step=0)
    with pytest.raises(ConfigError, match="learns from student tokens, the batch holds constructed tokens"):
        OPD(divergence="sampled_token").prepare(TokenStats(), batch, scope, {})
    plan, _ = OPD(divergence="reverse_kl").prepare(TokenStats(), batch, scope, {})
    assert plan.denominators == {"reverse_kl": 3.0}


@pytest.mark.parametrize(
    ("reduction", "denominator", "weight"),
    [("token_mean", 5.0, [1.0, 1.0]), ("sequence_mean", 2.0, [0.5, 1 / 3]), ("sequence_sum", 2.0, [1.0, 1.0])],
)
def test_masked_tokens_count_neither_above_nor_below_the_line(
    reduction: Any, denominator: float, weight: list[float]
) -> None:
    """Sequences of 4, 3 and 2 tokens, of which 2, 3 and none count."""
    batch = _batch([4, 3, 2])
    (micro,) = batch.micro
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 1, 0, 0], dtype=torch.bool)
    (weights,), found = reduction_weights(batch, Scope(seed=0, step=0), reduction, (mask,))
    assert found == denominator
    assert weights.tolist() == pytest.approx([weight[0]] * 2 + [0.0] * 2 + [weight[1]] * 3 + [0.0] * 2)
    (nothing,), found = reduction_weights(batch, Scope(seed=0, step=0), reduction, (torch.zeros(micro.rows),))
    assert (found, nothing.sum()) == (1.0, 0.0), "a step in which nothing counts has loss 0, not 0/0"


def test_randomness_is_keyed_not_streamed() -> None:
    def draw(scope: Scope, *key: int | str) -> list[float]:
        return scope.uniform(4, *key).tolist()

    scope = Scope(seed=3, step=7)
    first = draw(scope, "trust", 5)
    draw(scope, "trust", 6)
    assert draw(scope, "trust", 5) == first
    assert draw(Scope(seed=3, step=7), "trust", 5) == first
    others = [draw(Scope(seed=3, step=8), "trust", 5), draw(Scope(seed=4, step=7), "trust", 5), draw(scope, "mask", 5)]
    assert all(other != first for other in others)


def test_totals_leave_their_argument_alone_without_a_group() -> None:
    value = torch.tensor(2.0)
    assert Scope(seed=0, step=0).total(value).item() == 2.0
