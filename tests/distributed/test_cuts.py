"""However a step is cut over ranks and micro-batches, it is the same step: loss, gradient norm and gradient.

All through real Megatron: its schedules, its DistributedDataParallel, its distributed optimizer. The gradient is read
off an update that is a smooth function of it: AdamW with lr = 100 and eps = 1 moves a weight by 100 g / (|g| + 1) in
its first step. The teacher has another size, another family and another padded vocabulary than the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.objectives.base import Objective, Scope
from megatron_distill.objectives.gkd import GKD
from megatron_distill.objectives.opd import OPD
from megatron_distill.objectives.sft import SFT
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import Runtime, start
from megatron_distill.teachers.frozen import FrozenPart
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.testing.world import Worlds
from megatron_distill.train.step import bind, token_stats
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop

VOCAB_SIZE = 200
LENGTHS = ((5, 9), (3, 21), (11, 2), (4, 13), (6, 6), (2, 17), (9, 1))
"""(prompt, response) tokens of each sequence."""

OBJECTIVES: dict[str, Objective] = {
    "sft": SFT(reduction="sequence_mean"),
    "opd sampled": OPD(divergence="sampled_token", temperature=1.3),
    "opd full": OPD(divergence="reverse_kl"),
    "gkd": GKD(beta=0.3, temperature=1.3),
}


@dataclass(frozen=True)
class Cut:
    """One way to share the work."""

    sizes: ParallelSizes
    tokens_per_micro_batch: int = 48
    recompute: str = "none"
    chunk_rows: int = 16
    sequences: int = len(LENGTHS)
    """Of the step, from the first on."""


CUTS = {
    "one micro-batch": Cut(ParallelSizes(), 10_000, chunk_rows=1024),
    "one micro-batch per sequence": Cut(ParallelSizes(), 1),
    "recompute": Cut(ParallelSizes(), recompute="full"),
    "tp=2": Cut(ParallelSizes(tp=2)),
    "tp=2 sp": Cut(ParallelSizes(tp=2, sequence_parallel=True)),
    "tp=4": Cut(ParallelSizes(tp=4)),
    "pp=2": Cut(ParallelSizes(pp=2)),
    "cp=2": Cut(ParallelSizes(cp=2)),
    "dp=2": Cut(ParallelSizes(dp=2)),
    "dp=4": Cut(ParallelSizes(dp=4), 10_000),
    "tp=2 pp=2 sp": Cut(ParallelSizes(tp=2, pp=2, sequence_parallel=True)),
    "tp=2 cp=2 sp": Cut(ParallelSizes(tp=2, cp=2, sequence_parallel=True)),
    "pp=2 cp=2": Cut(ParallelSizes(pp=2, cp=2)),
    "cp=2 dp=2": Cut(ParallelSizes(cp=2, dp=2)),
}
ONE_SEQUENCE = {
    "tp=2 dp=2": Cut(ParallelSizes(tp=2, dp=2), sequences=1),
    "pp=2 dp=2": Cut(ParallelSizes(pp=2, dp=2), sequences=1),
    "cp=2 dp=2": Cut(ParallelSizes(cp=2, dp=2), sequences=1),
}
"""A data-parallel rank without a sequence: its micro-batch has no response tokens."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("cuts")
    student = tiny_model(root / "student", "qwen3", tied=True, vocab_size=VOCAB_SIZE, hidden=32, heads=4, kv_heads=4)
    teacher = tiny_model(root / "teacher", "llama", vocab_size=VOCAB_SIZE + 80, hidden=64, heads=8, kv_heads=4, seed=1)
    return student, teacher


@pytest.fixture(scope="module")
def expected(worlds: Worlds, folders: tuple[Path, Path]) -> dict[str, Any]:
    return worlds(1).run(steps_of, *folders, Cut(ParallelSizes()), init=False)[0]


@pytest.fixture(scope="module")
def expected_of_one(worlds: Worlds, folders: tuple[Path, Path]) -> dict[str, Any]:
    return worlds(1).run(steps_of, *folders, Cut(ParallelSizes(), sequences=1), init=False)[0]


def rollouts(sequences: int) -> list[Scored]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for sample, (prompt, response) in enumerate(LENGTHS[:sequences]):
        tokens = torch.randint(VOCAB_SIZE, (prompt + response,), generator=generator).tolist()
        rollout = Rollout(
            prompt=Prompt(id=str(sample // 2), messages=(), tokens=tuple(tokens[:prompt])),
            group=str(sample // 2),
            sample=sample,
            tokens=tuple(tokens[prompt:]),
            logprobs=(-1.5,) * response,
            origin=(Origin.STUDENT,) * response,
            stop=Stop.EOS,
            version=0,
        )
        made.append(Scored(rollout=rollout, reward=None))
    return made


def steps_of(student: Path, teacher: Path, cut: Cut) -> dict[str, Any]:
    """Loss, gradient norm and weight change of one step with each objective."""
    with start(cut.sizes, Precision()) as runtime:
        return {name: one_step(student, teacher, cut, objective, runtime) for name, objective in OBJECTIVES.items()}


def one_step(
    student_folder: Path, teacher_folder: Path, cut: Cut, objective: Objective, runtime: Runtime
) -> tuple[float, float, dict[str, np.ndarray]]:
    student = Student.build(
        StudentSection(model=student_folder, recompute=cut.recompute),  # type: ignore[arg-type]
        OptimizerSection(lr=100.0, eps=1.0, clip_grad=0.0),
        runtime,
        steps=1,
        chunk_rows=cut.chunk_rows,
    )
    teacher = FrozenPart(model=teacher_folder).connect(student, tokenizer=None)  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in student.weights()}
    batch = pack(
        rollouts(cut.sequences),
        dp_rank=runtime.mesh.dp_rank,
        dp_size=cut.sizes.dp,
        tokens_per_micro_batch=cut.tokens_per_micro_batch,
        sequence_multiple=cut.sizes.sequence_multiple,
        total_multiple=cut.sizes.total_multiple,
        device=torch.device("cpu"),
        version=0,
    )
    signals = {} if objective.needs.teacher is None else {"teacher": teacher.signal(batch)}
    stats = token_stats(student, batch, signals, objective.needs, objective.temperature)
    scope = Scope(seed=0, step=0, data_group=runtime.mesh.groups.dp)
    plan, _ = objective.prepare(stats, batch, scope, objective.initial())
    report = student.step(batch, bind(objective, signals, plan, batch, student.partition))
    change = {name: (tensor - before[name]).numpy() for name, tensor in student.weights()}
    return report.loss, report.grad_norm, change


@pytest.mark.parametrize("name", CUTS)
def test_same_step_at_every_cut(
    worlds: Worlds, folders: tuple[Path, Path], expected: dict[str, Any], name: str
) -> None:
    assert_same_step(worlds(CUTS[name].sizes.world).run(steps_of, *folders, CUTS[name], init=False), expected)


@pytest.mark.parametrize("name", ONE_SEQUENCE)
def test_same_step_where_a_rank_has_no_sequence(
    worlds: Worlds, folders: tuple[Path, Path], expected_of_one: dict[str, Any], name: str
) -> None:
    cut = ONE_SEQUENCE[name]
    assert_same_step(worlds(cut.sizes.world).run(steps_of, *folders, cut, init=False), expected_of_one)


def assert_same_step(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for rank in ranks:
        for objective, (loss, norm, change) in rank.items():
            expected_loss, expected_norm, expected_change = expected[objective]
            assert loss == pytest.approx(expected_loss, rel=5e-6), f"{objective}: loss"
            assert norm == pytest.approx(expected_norm, rel=5e-6), f"{objective}: gradient norm"
            largest = max(np.abs(moved).max() for moved in expected_change.values())
            for tensor_name, moved in expected_change.items():
                error = np.abs(change[tensor_name] - moved).max() / largest
                assert error <= 5e-6, f"{objective}: gradient of {tensor_name} is off by {error:.1e}"


def test_reference_moves_weights(expected: dict[str, Any]) -> None:
    for objective, (_, norm, change) in expected.items():
        assert norm > 1e-3, objective
        assert all(np.abs(moved).max() > 0 for moved in change.values()), objective
