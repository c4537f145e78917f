"""Truncated importance weights against dense float64, for every objective, by what they do to its terms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.losses.reduce import reduce
from megatron_distill.objectives._importance import Importance, importance_weights, weighted
from megatron_distill.objectives.base import Scope
from megatron_distill.types import Batch, Full, Plan, Scored, TokenStats, VocabPartition, VocabShard
from tests.certify.data import SEED, STEP, sequences, whole_step
from tests.certify.settings import Setting, objectives, settings

VOCABULARY, SAMPLED_AT, CAP = 80, 1.3, 1.1
PARTITION = VocabPartition(start=0, width=VOCABULARY, valid=VOCABULARY, group=None)
SCOPE = Scope(seed=SEED, step=STEP)


@pytest.fixture(autouse=True)
def _float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def dense_logp(logits_RV: Tensor, ids_R: Tensor, temperature: float) -> Tensor:
    return (logits_RV / temperature).log_softmax(-1).gather(1, ids_R[:, None]).squeeze(1)


class Step:
    """A step of certified data over random logits; the engine's log-probs are off by noise of the size of `spread`."""

    def __init__(self, setting: Setting, spread: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(7)
        count = iter(range(10**6))
        logits = torch.randn(400, VOCABULARY, generator=generator)

        def logprobs(tokens: Any, prompt: int) -> Tensor:
            rows = [next(count) for _ in tokens[prompt:]]
            return dense_logp(logits[rows], torch.tensor(tokens[prompt:]), SAMPLED_AT)

        self.scored = [self.at_temperature(one) for one in sequences(setting.data, VOCABULARY, logprobs)]
        if spread != 0.1:
            self.scored = [self.off_by(one, spread / 0.1, logits) for one in self.scored]
        self.setting = setting
        self.logits_RV = logits[: next(count)].clone().requires_grad_()
        self.teachers = {
            name: torch.randn(len(self.logits_RV), VOCABULARY, generator=generator) for name in setting.teachers
        }

    @staticmethod
    def at_temperature(one: Scored) -> Scored:
        return replace(one, rollout=replace(one.rollout, temperature=SAMPLED_AT))

    @staticmethod
    def off_by(one: Scored, factor: float, logits: Tensor) -> Scored:
        if one.rollout.logprobs is None:
            return one
        far = tuple(value * factor for value in one.rollout.logprobs)
        return replace(one, rollout=replace(one.rollout, logprobs=far))

    def batch(self) -> Batch:
        return pack(
            self.scored, dp_rank=0, dp_size=1, tokens_per_micro_batch=10**6, device=torch.device("cpu"), version=0
        )

    def plan(self, batch: Batch) -> Plan:
        objective, (micro,) = self.setting.objective, batch.micro
        shard = VocabShard.of(self.logits_RV.detach(), PARTITION, objective.temperature)
        probability_RV = (shard.logits_Rv / objective.temperature).softmax(-1)
        recomputed = dense_logp(shard.logits_Rv, micro.target_R, objective.temperature)
        stats = TokenStats(
            student_logp=(micro.rollout_logp_R if objective.needs.student_logprobs == "rollout" else recomputed,),
            entropy=(-(probability_RV * probability_RV.log()).sum(-1),),
            teacher_logp={
                name: (dense_logp(rows, micro.target_R, objective.temperature),) for name, rows in self.teachers.items()
            },
        )
        return objective.prepare(stats, batch, SCOPE, self.setting.state)[0]

    def weighted(self, batch: Batch, plan: Plan) -> Plan:
        recomputed = dense_logp(self.logits_RV.detach(), batch.micro[0].target_R, SAMPLED_AT)
        return weighted(plan, batch, (recomputed,), CAP, SCOPE)

    def terms(self, batch: Batch, plan: Plan, logits_RV: Tensor) -> Any:
        shard = VocabShard.of(logits_RV, PARTITION, self.setting.objective.temperature)
        signals = {
            name: Full(hidden_RH=rows, head_vH=torch.eye(VOCABULARY), partition=PARTITION)
            for name, rows in self.teachers.items()
        }
        whole = slice(0, batch.micro[0].rows)
        return self.setting.objective.loss(shard, signals, batch.micro[0].responses(whole), plan.rows(0, whole))


def dense_weights(step: Step) -> Tensor:
    """min(q/mu, cap) token by token, from the definition; 1 where the student did not sample."""
    seen = whole_step(step.scored, step.logits_RV.detach(), {}, {})
    found = []
    for row, (target, engine) in enumerate(zip(seen.target_R.tolist(), seen.rollout_logp_R.tolist(), strict=True)):
        scaled = (step.logits_RV.detach()[row] / SAMPLED_AT).tolist()
        logp = scaled[target] - math.log(math.fsum(map(math.exp, scaled)))
        found.append(1.0 if math.isnan(engine) else min(math.exp(min(logp - engine, 50.0)), CAP))
    return torch.tensor(found)


@pytest.mark.parametrize("kind", objectives())
def test_every_term_of_every_objective_counts_a_token_by_its_weight(kind: str) -> None:
    for setting in settings(kind)[:6]:
        step = Step(setting)
        batch = step.batch()
        plan, weights = step.plan(batch), dense_weights(step)
        by_hand = torch.zeros(())
        for name, term in step.terms(batch, plan, step.logits_RV).items():
            by_hand = by_hand + (term.value_R * term.weight_R * weights).sum() / plan.denominators[name]
        (expected,) = torch.autograd.grad(by_hand, step.logits_RV)
        scalar, _ = reduce(step.terms(batch, step.weighted(batch, plan), step.logits_RV), plan.denominators)
        (gradient,) = torch.autograd.grad(scalar, step.logits_RV)
        assert scalar.item() == pytest.approx(by_hand.item(), rel=1e-6, abs=1e-9)  # log-probs travel in fp32
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_reverse_kl_of_opd_written_out() -> None:
    """sum of w KL(q || p) / tokens: nothing of the package in it."""
    setting = Setting(
        kind="opd",
        fields={"divergence": "reverse_kl", "temperature": 0.7},
        teachers=("big",),
        data="mixed_origins",
        state={},
    )
    step = Step(setting)
    batch = step.batch()
    logq, logp = ((rows / 0.7).log_softmax(-1) for rows in (step.logits_RV, step.teachers["big"]))
    loss = (dense_weights(step) * (logq.exp() * (logq - logp)).sum(-1)).sum() / len(logq)
    (expected,) = torch.autograd.grad(loss, step.logits_RV)
    plan = step.weighted(batch, step.plan(batch))
    scalar, _ = reduce(step.terms(batch, plan, step.logits_RV), plan.denominators)
    (gradient,) = torch.autograd.grad(scalar, step.logits_RV)
    assert scalar.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


def test_weights_are_capped_bounded_and_constant() -> None:
    step = Step(settings("sft")[0], spread=80.0)  # ratios far beyond what exp can hold in fp32
    batch = step.batch()
    recomputed = dense_logp(step.logits_RV, batch.micro[0].target_R, SAMPLED_AT)
    (weight_R,) = importance_weights(batch, (recomputed.float(),), cap=CAP)
    assert weight_R.isfinite().all()
    assert weight_R.max().item() == pytest.approx(CAP)
    assert not weight_R.requires_grad
    metrics = {one.name: one.value for one in step.weighted(batch, step.plan(batch)).metrics}
    assert metrics["importance/capped"] == pytest.approx((dense_weights(step) >= CAP).double().mean().item())
    assert metrics["importance/weight_mean"] == pytest.approx(dense_weights(step).mean().item(), rel=1e-5)


def test_tokens_that_nobody_sampled_count_once_and_other_constants_stay() -> None:
    setting = next(one for one in settings("tropd") if one.data == "mixed_origins")
    step = Step(setting)
    batch = step.batch()
    plan = step.plan(batch)
    after = step.weighted(batch, plan)
    unsampled_R = ~batch.micro[0].responses(slice(None)).sampled_R
    assert unsampled_R.any()
    assert not unsampled_R.all()
    for name, planned in plan.weights.items():
        same_R = torch.isclose(after.weights[name][0], planned[0], rtol=1e-12, equal_nan=True)
        assert same_R[unsampled_R].all()
        if name not in plan.denominators:
            assert same_R.all()
    assert after.denominators == plan.denominators


@pytest.mark.parametrize("cap", [0.5, float("inf"), float("nan")])
def test_a_cap_below_one_is_refused(cap: float) -> None:
    with pytest.raises(ValueError, match=r"cap=.*: must be 1 or more, and finite"):
        Importance(cap=cap)
