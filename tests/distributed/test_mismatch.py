"""What trainer and engine disagree about, and what is made of it, however the step is cut; the truth is float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.objectives._importance import Importance
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.sft import SFT
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import start
from megatron_distill.testing.world import Worlds
from megatron_distill.train.mismatch import FRESH, NAMES, mismatch_of
from megatron_distill.train.step import bind, corrected
from megatron_distill.types import Scored, TokenStats
from tests.certify.data import SEED, STEP, whole_step
from tests.certify.network import STUDENT, Chain, make_folders

DATA = "mixed_origins"
"""Of the teacher's and the student's tokens, and whole responses without any log-prob."""
SAMPLED_AT, CAP = 0.8, 1.05
CUTS = {
    "whole": ParallelSizes(),
    "tp=2 sp": ParallelSizes(tp=2, sequence_parallel=True),
    "pp=2": ParallelSizes(pp=2),
    "cp=2": ParallelSizes(cp=2),
    "dp=2": ParallelSizes(dp=2),
    "tp=2 dp=2": ParallelSizes(tp=2, dp=2),
    "pp=2 cp=2": ParallelSizes(pp=2, cp=2),
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(make_folders(tmp_path_factory.mktemp("mismatch")))


def sampled(chain: Chain) -> list[Scored]:
    """One token is far off: outside of [1/2, 2]."""
    found = []
    for place, one in enumerate(chain.sequences(DATA)):
        logprobs = one.rollout.logprobs
        if logprobs is not None and place == 0:
            logprobs = (*logprobs[:-1], logprobs[-1] - 1.5)
        count = len(one.rollout.tokens)
        versions = (STEP - 2,) * (count // 2) + (STEP,) * (count - count // 2)
        sampled = replace(
            one.rollout, logprobs=logprobs, temperature=SAMPLED_AT, version=min(versions), versions=versions
        )
        found.append(replace(one, rollout=sampled))
    return found


def expected(chain: Chain, scored: list[Scored]) -> dict[str, float]:
    """Dense, in float64, through `transformers`."""
    step = whole_step(scored, chain.rows(DATA, STUDENT), {}, {})
    logp_R = (step.student_RV / SAMPLED_AT).log_softmax(-1).gather(1, step.target_R[:, None]).squeeze(1)
    known_R = ~step.rollout_logp_R.isnan()
    apart_R = (logp_R.detach() - step.rollout_logp_R)[known_R]
    version_R = torch.tensor([version for one in scored for version in one.rollout.versions])
    weights_R = torch.ones(len(logp_R), dtype=torch.float64)
    weights_R[known_R] = apart_R.exp().clamp(max=CAP)
    likelihood_R = step.student_RV.log_softmax(-1).gather(1, step.target_R[:, None]).squeeze(1)
    loss = -(weights_R * likelihood_R).sum() / len(logp_R)
    gradients = torch.autograd.grad(loss, list(chain.model(STUDENT).parameters()), retain_graph=True)
    return {
        "mismatch/logp_abs_mean": apart_R.abs().mean().item(),
        "mismatch/kl": (apart_R.exp() - 1 - apart_R).mean().item(),
        "mismatch/outside": ((apart_R > 0.6931) | (apart_R < -0.6931)).double().mean().item(),
        "mismatch/fresh_logp_abs_mean": apart_R.abs()[version_R[known_R] == STEP].mean().item(),
        "importance/weight_mean": weights_R[known_R].mean().item(),
        "importance/capped": (apart_R.exp() >= CAP).double().mean().item(),
        "loss": loss.item(),
        "norm": torch.stack([one.norm() for one in gradients]).norm().item(),
    }


def figures(root: Path, sizes: ParallelSizes, scored: list[Scored]) -> dict[str, float]:
    with start(sizes, Precision()) as runtime:
        student = Student.build(
            StudentSection(model=root / STUDENT), OptimizerSection(lr=1e-6), runtime, steps=1, chunk_rows=8
        )
        batch = pack(
            scored,
            dp_rank=runtime.mesh.dp_rank,
            dp_size=sizes.dp,
            tokens_per_micro_batch=24,
            sequence_multiple=sizes.sequence_multiple,
            total_multiple=sizes.total_multiple,
            device=torch.device("cpu"),
            version=0,
        )
        scope = Scope(seed=SEED, step=STEP, data_group=runtime.mesh.groups.dp)
        objective, stats = SFT(), TokenStats()
        plan, _ = objective.prepare(stats, batch, scope, {})
        plan = corrected(plan, Importance(weights="truncated", cap=CAP), stats, objective, batch, scope, student)
        loss = bind(objective, {}, plan, batch, student.partition, mismatch_of(batch, scope))
        report = student.step(batch, loss)
        found = {one.name: one.value for one in (*plan.metrics, *report.metrics)}
        return found | {"loss": report.loss, "norm": report.grad_norm}


@pytest.mark.parametrize("name", CUTS)
def test_figures_and_weighted_steps_are_those_of_the_mathematics(worlds: Worlds, chain: Chain, name: str) -> None:
    scored = sampled(chain)
    wanted = expected(chain, scored)
    assert 0 < wanted["mismatch/outside"] < 1
    assert 0 < wanted["importance/capped"] < 1
    for found in worlds(CUTS[name].world).run(figures, chain.root, CUTS[name], scored, init=False):
        assert {*NAMES, FRESH} <= set(found)
        assert {one: found[one] for one in wanted} == pytest.approx(wanted, rel=2e-5, abs=1e-7)
