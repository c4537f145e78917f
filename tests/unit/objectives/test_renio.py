"""ReNIO: which tokens are pivotal, what a response weighs, and how the ways of normalising differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_distill.errors import ConfigError
from megatron_distill.objectives.base import Scope, State
from megatron_distill.objectives.opsd import OPSD
from megatron_distill.objectives.renio import ReNIO
from megatron_distill.types import Fidelity, Origin, Plan, TokenStats
from tests.unit.objectives.supervised import Answer, answers, golden, packed, run

# The second response is followed by padding in a padded batch, where log-ratios may be anything: it has no row here.
SURER = [[2.1, 0, 0, 4.2, 0.1, 0], [0.3, -1, 0.2, 0.7, 0.5], [1, 0.9, -5, 0.8], [0.0] * 6]
"""log q - log p of four responses."""


def _plan(
    objective: ReNIO, surer: Sequence[Sequence[float]], budget: int = 1000, state: State | None = None
) -> tuple[Plan, State]:
    zeros = torch.zeros(1, 4)
    held = [
        Answer(tokens=(0,) * len(one), student_RV=zeros.expand(len(one), 4), teacher_RV=zeros.expand(len(one), 4))
        for one in surer
    ]
    batch = packed(held, budget)
    logp = tuple(torch.tensor([one for index in m.index_S.tolist() for one in surer[index]]) for m in batch.micro)
    teacher = {"main": tuple(torch.zeros_like(one) for one in logp)}
    stats = TokenStats(student_logp=logp, teacher_logp=teacher)
    return objective.prepare(stats, batch, Scope(seed=0, step=0), state or objective.initial())


def _weights(
    objective: ReNIO, surer: Sequence[Sequence[float]], budget: int = 1000, state: State | None = None
) -> list[float]:
    """w^ of each response, in order."""
    plan, _ = _plan(objective, surer, budget, state)
    found: dict[int, Tensor] = {}
    held = [Answer(tokens=(0,) * len(one), student_RV=torch.zeros(1, 4), teacher_RV=torch.zeros(1, 4)) for one in surer]
    for micro, weight_R in zip(packed(held, budget).micro, plan.weights["divergence"], strict=True):
        for place, index in enumerate(micro.index_S.tolist()):
            found[index] = weight_R[micro.segment_R == place].sum()
    return [float(found[index]) for index in range(len(surer))]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"threshold_counts": True}, [2.9668897171, 0.2316596919, 0.5697908990, 0.2316596919]),
        ({}, [2.945378291, 0.229980044, 0.5946616211, 0.229980044]),
        ({"ceiling": 2.5, "threshold_counts": True}, [2.7641210019, 0.2771275756, 0.6816238470, 0.2771275756]),
        (
            {"threshold": 1.0, "ceiling": 2.0, "threshold_counts": True},
            [2.4411827417, 0.3303781578, 0.8980609428, 0.3303781578],
        ),
        (
            {"threshold": 0.01, "ceiling": 2.0, "threshold_counts": True},
            [1.760546478, 0.686573217, 1.1040194805, 0.4488608245],
        ),
    ],
)
def test_weights_worked_out_by_hand(fields: dict[str, Any], expected: list[float]) -> None:
    assert _weights(ReNIO(**fields), SURER) == pytest.approx(expected, rel=1e-6)


def test_the_figures_example_before_normalising() -> None:
    """d = 2.1 and 4.2, the latter bounded to 3: the geometric mean of the ratios."""
    assert _weights(ReNIO(normalise="none"), SURER)[0] == pytest.approx(math.exp(2.55), rel=1e-6)
    assert _weights(ReNIO(normalise="none", weight_temperature=2.0), SURER)[0] == pytest.approx(
        math.exp(1.275), rel=1e-6
    )


def test_a_response_without_pivotal_tokens_weighs_one_before_normalising() -> None:
    assert _weights(ReNIO(normalise="none"), SURER)[1] == 1.0
    assert _weights(ReNIO(threshold=9.0, ceiling=9.5), SURER) == [1.0] * 4


def test_a_ceiling_under_the_threshold_is_refused() -> None:
    """The released code bounds before it selects, and would then select nothing."""
    with pytest.raises(ValueError, match=r"ceiling=3\.0: must be above threshold=3\.5"):
        ReNIO(threshold=3.5)
    with pytest.raises(ValueError, match=r"ceiling=0\.8: must be above threshold=0\.8"):
        ReNIO(ceiling=0.8)


def test_weights_have_a_mean_of_one_and_grow_with_a_pivotal_token_up_to_the_ceiling() -> None:
    def weight(surer: float) -> float:
        return _weights(ReNIO(), [[surer, 0.0], *SURER[1:]])[0]

    assert sum(_weights(ReNIO(), SURER)) / 4 == pytest.approx(1.0)
    assert weight(0.7) < weight(0.9) < weight(2.0) < weight(3.0)
    assert weight(3.0) == pytest.approx(weight(50.0))
    assert weight(3.0) == pytest.approx(weight(float("inf")))
    assert weight(0.7) == pytest.approx(weight(-50.0))


def test_the_bound_of_weights_is_not_made_up_for() -> None:
    """One response of sixteen weighs e^5 and the others 1: 14.5 of the mean, bounded to 10."""
    surer = [[5.0], *[[0.0]] * 15]
    mean = (math.exp(5) + 15) / 16
    assert _weights(ReNIO(ceiling=5.0), surer) == pytest.approx([10.0, *[1 / mean] * 15])
    unbounded = _weights(ReNIO(ceiling=5.0, largest=100.0), surer)
    assert unbounded[0] == pytest.approx(math.exp(5) / mean)


def test_a_mean_over_the_step_does_not_depend_on_the_cut() -> None:
    for normalise in ("mean", "clamped_mean", "running_mean", "none"):
        objective = ReNIO(normalise=normalise)
        whole = _weights(objective, SURER)
        assert _weights(objective, SURER, budget=1) == pytest.approx(whole)
        assert _weights(objective, SURER, budget=14) == pytest.approx(whole)


def test_a_mean_over_micro_batches_does() -> None:
    objective = ReNIO(mean_over="micro_batch")
    assert _weights(objective, SURER) == pytest.approx(_weights(ReNIO(), SURER))
    halves = _weights(objective, SURER, budget=14)
    assert halves != pytest.approx(_weights(ReNIO(), SURER))
    assert sum(halves) == pytest.approx(4.0)


def test_a_micro_batch_of_one_response_reweights_nothing_and_is_refused() -> None:
    with pytest.raises(ConfigError, match="no micro-batch of this step holds two responses"):
        _plan(ReNIO(mean_over="micro_batch"), SURER, budget=1)


def test_a_running_mean_starts_with_the_first_step_and_includes_the_newest() -> None:
    objective = ReNIO(normalise="running_mean")
    raw = _weights(ReNIO(normalise="none"), SURER)
    mean = sum(raw) / 4
    _, state = _plan(objective, SURER)
    assert state == {"weight_mean": pytest.approx(mean)}
    assert _weights(objective, SURER) == pytest.approx([one / mean for one in raw])
    _, state = _plan(objective, SURER, state={"weight_mean": 2.0})
    assert state == {"weight_mean": pytest.approx(0.1 * mean + 1.8)}
    expected = [one / (0.1 * mean + 1.8) for one in raw]
    assert _weights(objective, SURER, state={"weight_mean": 2.0}) == pytest.approx(expected)
    with pytest.raises(ValueError, match="mean_over=micro_batch: a running mean is one of steps"):
        ReNIO(normalise="running_mean", mean_over="micro_batch")


def test_clamping_comes_before_the_mean_where_it_is_asked_for() -> None:
    surer = [[5.0], [0.0], [0.0]]
    found = _weights(ReNIO(normalise="clamped_mean", ceiling=5.0), surer)
    assert found == pytest.approx([10 / 4, 1 / 4, 1 / 4])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "sampled_token"])
def test_the_gradient_is_each_responses_own_times_its_weight(divergence: Any) -> None:
    """So weights are constants; also with the sampled token, where the released code leaves them out."""
    held = answers(3, 5, 1, 4)
    settings: dict[str, Any] = {"divergence": divergence, "clip_low": None, "clip_high": None}
    found, plain = run(ReNIO(threshold=0.1, **settings), held), run(OPSD(**settings), held)
    ratios = [
        (ours / theirs).masked_select(theirs.abs() > 1e-9)
        for ours, theirs in zip(found.gradients, plain.gradients, strict=True)
    ]
    weights = [float(ratio.mean()) for ratio in ratios]
    for ratio, weight in zip(ratios, weights, strict=True):
        torch.testing.assert_close(ratio, torch.full_like(ratio, weight), rtol=1e-8, atol=0)
    assert sum(weights) / 4 == pytest.approx(1.0)
    assert max(weights) > 1.1
    assert found.metrics["renio/weight_max"].value == pytest.approx(max(weights))


def test_the_divergence_is_the_forward_kl_of_entries_between_bounds() -> None:
    """As in the released code; without the lower one it is OPSD's."""
    assert run(ReNIO(), [golden()]).loss == pytest.approx(0.05)
    assert run(ReNIO(clip_low=None), [golden()]).loss == pytest.approx(-0.1777463682)


def test_models_that_agree_weigh_all_alike() -> None:
    held = [Answer(tokens=one.tokens, student_RV=one.student_RV, teacher_RV=one.student_RV) for one in answers(3, 5)]
    found = run(ReNIO(), held)
    assert found.loss == pytest.approx(0.0, abs=1e-12)
    assert [weight for one in found.plan.weights["divergence"] for weight in one.tolist()] == pytest.approx(
        [1 / 3] * 3 + [1 / 5] * 5
    )


def test_ratios_are_taken_at_the_losss_temperature() -> None:
    held = answers(3, 5, 4)
    cooler = [
        Answer(tokens=one.tokens, student_RV=one.student_RV / 1.1, teacher_RV=one.teacher_RV / 1.1) for one in held
    ]
    assert run(ReNIO(temperature=1.1), held).loss == pytest.approx(run(ReNIO(), cooler).loss)


@pytest.mark.parametrize("normalise", ["clamped_mean", "running_mean", "none"])
def test_a_bound_that_no_weight_is_put_under_is_refused(normalise: Any) -> None:
    with pytest.raises(ValueError, match=f"largest=5.0: normalise={normalise} does not read it; leave it 10.0"):
        ReNIO(normalise=normalise, largest=5.0)


def test_what_is_logged() -> None:
    plan, _ = _plan(ReNIO(), SURER, budget=14)
    metrics = {metric.name: metric.value for metric in plan.metrics}
    assert metrics["renio/pivotal"] == pytest.approx(4 / 21)
    assert metrics["renio/weight_mean"] == pytest.approx(1.0)
    assert metrics["renio/weight_max"] == pytest.approx(2.945378291)


def test_only_what_the_student_wrote_can_be_reweighted() -> None:
    assert ReNIO().needs.origins == {Origin.STUDENT}
    held = [
        Answer(tokens=one.tokens, student_RV=one.student_RV, teacher_RV=one.teacher_RV, origin=Origin.CONSTRUCTED)
        for one in answers(3)
    ]
    with pytest.raises(ConfigError, match="learns from student tokens, the batch holds constructed tokens"):
        run(ReNIO(), held)


def test_needs_log_probs_of_both_models_besides_the_signal() -> None:
    for objective, fidelity in (
        (ReNIO(), Fidelity.FULL),
        (ReNIO(support="top_k"), Fidelity.TOP_K),
        (ReNIO(divergence="sampled_token"), Fidelity.TOKEN),
    ):
        assert objective.needs.teacher == fidelity
        assert objective.needs.student_logprobs == "recompute"
        assert objective.needs.teacher_logprobs
