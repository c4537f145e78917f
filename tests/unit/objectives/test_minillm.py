"""MiniLLM: later rewards as advantages, and how they go wrong: double counting, padding, lengths, rounding errors."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.minillm import MiniLLM, suffix_sums
from megatron_distill.types import Fidelity, TokenStats
from tests.oracles import dense
from tests.unit.objectives.judged import STUDENT, TEACHER, packed, run

PLAIN = {"whiten": False, "length_normalise": False, "reduction": "sequence_sum"}
"""Nothing but the gradient of the reverse KL of whole responses."""


def _advantages(objective: MiniLLM, rewards: list[list[float]], multiple: int = 1) -> list[list[float]]:
    """By response, from the rewards of its tokens."""
    batch = packed([(1,) * len(one) for one in rewards], multiple=multiple)
    (micro,) = batch.micro
    reward_R = torch.tensor([one for each in rewards for one in each], dtype=torch.float64)
    stats = TokenStats(student_logp=(torch.zeros_like(reward_R),), teacher_logp={"teacher": (reward_R,)})
    plan, _ = objective.prepare(stats, batch, Scope(seed=0, step=0), {})
    advantage_R = plan.weights["advantage"][0]
    return [advantage_R[micro.segment_R == place].tolist() for place in range(len(rewards))]


def _objective(**settings: object) -> MiniLLM:
    return MiniLLM(**{"whiten": False, "length_normalise": False, **settings})


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.95, 1.0])
def test_suffix_sums_stay_within_their_sequence(discount: float) -> None:
    lengths = [1, 5, 2, 9, 1, 17]
    segment_R = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    value_R = torch.randn(len(segment_R), dtype=torch.float64)
    found = suffix_sums(value_R, segment_R, discount)
    for row in range(len(value_R)):
        later = [one for one in range(row, len(value_R)) if segment_R[one] == segment_R[row]]
        expected = sum(discount ** (one - row) * value_R[one].item() for one in later)
        assert found[row].item() == pytest.approx(expected, abs=1e-12)
    assert suffix_sums(value_R[:0], segment_R[:0]).numel() == 0


def test_a_long_response_neither_overflows_nor_loses_its_late_rewards() -> None:
    """Cumulative sums divided by powers of the discount would: 0.95^-20000 is infinite."""
    length = 20_000
    found = suffix_sums(torch.ones(length).double(), torch.zeros(length).long(), 0.95)
    assert found[0].item() == pytest.approx(20.0)
    assert found[-3:].tolist() == pytest.approx([2.8525, 1.95, 1.0])


def _gradients(objective: MiniLLM) -> tuple[Tensor, Tensor]:
    """Expected over all nine responses of two tokens over three ids, in the logits of a table: the first token's [V],
    the second's by the first [V, V]. With it, that of the reverse KL of whole responses."""
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(3, generator=generator).double(), torch.randn(3, 3, generator=generator).double()
    teacher, later = torch.randn(3, generator=generator).double(), torch.randn(3, 3, generator=generator).double()
    responses = list(product(range(3), repeat=2))
    rows = torch.cat([torch.stack([first, second[one]]) for one, _ in responses])
    theirs = torch.cat([torch.stack([teacher, later[one]]) for one, _ in responses])
    gradient = run(objective, packed(responses), rows, theirs).gradient_RV.view(9, 2, 3)
    found = torch.zeros(4, 3, dtype=torch.float64)
    for place, (one, two) in enumerate(responses):
        probability = first.softmax(-1)[one] * second[one].softmax(-1)[two]
        found[0] += 9 * probability * gradient[place, 0]
        found[1 + one] += 9 * probability * gradient[place, 1]
    table = torch.cat([first[None], second]).requires_grad_()
    log_q, log_p = table.log_softmax(-1), torch.cat([teacher[None], later]).log_softmax(-1)
    joint_q = (log_q[0][:, None] + log_q[1:]).flatten()
    joint_p = (log_p[0][:, None] + log_p[1:]).flatten()
    (joint_q.exp() * (joint_q - joint_p)).sum().backward()
    assert table.grad is not None
    return found, table.grad


@pytest.mark.parametrize(
    "settings", [{}, {"own_reward": True, "single_step": False}], ids=["decomposed", "policy gradient alone"]
)
def test_in_expectation_it_is_the_reverse_kl_of_whole_responses(settings: dict[str, bool]) -> None:
    found, exact = _gradients(MiniLLM(**PLAIN, **settings))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-7)


def test_own_reward_and_single_step_together_count_the_next_token_twice() -> None:
    """As the released code does."""
    found, exact = _gradients(MiniLLM(**PLAIN, own_reward=True))
    assert (found - exact).abs().max() > 0.05


def test_advantages_are_what_later_tokens_bring() -> None:
    rewards = [[1.0, 2.0, 4.0], [8.0]]
    assert _advantages(_objective(), rewards) == [[6.0, 4.0, 0.0], [0.0]]
    assert _advantages(_objective(own_reward=True), rewards) == [[7.0, 6.0, 4.0], [8.0]]
    assert _advantages(_objective(discount=0.5), rewards) == [[2.0, 2.0, 0.0], [0.0]]
    assert _advantages(_objective(length_normalise=True), rewards) == [[3.0, 4.0, 0.0], [0.0]]
    normalised = _advantages(_objective(length_normalise=True, own_reward=True), rewards)
    assert normalised == [pytest.approx([7 / 3, 3.0, 4.0]), [8.0]]
    assert _advantages(_objective(reward_scale=2.0, reward_limit=5.0), rewards) == [[9.0, 5.0, 0.0], [0.0]]


def test_the_discount_counts_from_the_token_and_not_from_the_start() -> None:
    later = _advantages(_objective(discount=0.5, own_reward=True), [[1.0, 2.0, 4.0]])[0]
    assert _advantages(_objective(discount=0.5, own_reward=True), [[9.0, 9.0, 1.0, 2.0, 4.0]])[0][2:] == later


def test_padding_and_neighbours_count_nothing() -> None:
    rewards = [[1.0, 2.0, 4.0], [8.0], [-1.0, 0.5]]
    for objective in (_objective(), MiniLLM()):
        assert _advantages(objective, rewards, multiple=8) == _advantages(objective, rewards)
    together = _advantages(_objective(length_normalise=True), rewards)
    assert together == [_advantages(_objective(length_normalise=True), [one])[0] for one in rewards]


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_step() -> None:
    found = torch.tensor([one for each in _advantages(MiniLLM(), [[1.0, 2.0, 4.0], [8.0, 1.0]]) for one in each])
    assert found.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert found.var(unbiased=False).item() == pytest.approx(1.0, rel=1e-6)


def test_whitening_does_not_blow_up_rounding_errors() -> None:
    """A student that equals its teacher has rewards of 1e-7 in fp32, of which nothing is to be learnt."""
    noise = (1e-8 * torch.randn(50)).tolist()
    assert max(map(abs, _advantages(MiniLLM(), [noise])[0])) < 1e-3
    assert _advantages(MiniLLM(), [[0.0, 0.0]]) == [[0.0, 0.0]]
    logits = torch.randn(3, 4)
    found = run(MiniLLM(), packed([(1, 2), (0,)]), logits, logits)
    assert found.gradient_RV.abs().max() < 1e-6


def test_the_single_step_part_is_the_exact_reverse_kl() -> None:
    batch = packed([(1,), (2,)])
    found = run(MiniLLM(whiten=False), batch, STUDENT.expand(2, 4), TEACHER.expand(2, 4))
    assert found.loss == pytest.approx(0.6783830802, abs=1e-8), "one token has nothing after it"
    logits = STUDENT.clone().requires_grad_()
    dense.reverse_kl(logits[None], TEACHER[None], 1.0).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(found.gradient_RV, logits.grad.expand(2, 4) / 2, rtol=0, atol=1e-8)


def test_the_ratio_is_clipped_with_the_engines_log_probs() -> None:
    logp = STUDENT.log_softmax(-1)
    for moved, pulls in ((0.1, True), (0.3, False)):
        batch = packed([(1, 1)], logprobs=[(logp[1].item() - moved, logp[1].item())])
        objective = MiniLLM(whiten=False, single_step=False, old_logprobs="rollout")
        gradient = run(objective, batch, STUDENT.expand(2, 4), TEACHER.expand(2, 4)).gradient_RV
        assert bool(gradient[0].any()) is pulls
        assert not gradient[1].any()


def test_tokens_300_nats_apart_are_finite() -> None:
    apart = torch.tensor([[0.0, -300.0, 0.0, 0.0]]).expand(2, 4)
    for student, teacher in ((apart, -apart), (-apart, apart)):
        for objective in (MiniLLM(), MiniLLM(whiten=False)):
            found = run(objective, packed([(1, 1)]), student, teacher)
            assert math.isfinite(found.loss)
            assert found.gradient_RV.isfinite().all()


def test_needs_and_settings() -> None:
    assert MiniLLM().needs.teacher == Fidelity.FULL
    assert MiniLLM(support="top_k").needs.teacher == Fidelity.TOP_K
    assert MiniLLM(single_step=False).needs.teacher == Fidelity.TOKEN
    assert MiniLLM().needs.student_logprobs == "recompute"
    with pytest.raises(ValueError, match="support=top_k: single_step=false compares single log-probs"):
        MiniLLM(single_step=False, support="top_k")
    for field, value in (("discount", 1.5), ("clip_ratio", 0.0), ("reward_scale", 0.0), ("reward_limit", -1.0)):
        with pytest.raises(ValueError, match=f"{field}={value}: must be"):
            MiniLLM(**{field: value})
