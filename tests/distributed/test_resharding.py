"""A checkpoint goes on at any layout: saved by two tensor-parallel ranks, read by one, two or four of any kind.

Each test saves after two steps, goes on for two more, and then goes on from the checkpoint in other worlds. The next
step must be the same step: its loss and gradient norm depend on the weights alone, which must be the same bits. The one
after it depends on the optimizer's moments and on the schedule too, and at the end every weight is compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.errors import CheckpointError
from megatron_distill.models import checkpoint
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.sft import SFT
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import Runtime, start
from megatron_distill.testing.tiny import Family, tiny_model
from megatron_distill.testing.world import Worlds
from megatron_distill.train.step import bind, token_stats
from megatron_distill.types import Batch, Origin, Prompt, Rollout, Scored, Stop

VOCAB_SIZE = 200
SAVED_AT = 2
STEPS = 4
RELATIVE = 1e-5
"""Bar of losses and gradient norms."""
WEIGHTS = 1e-4
"""Bar of weights after two steps, relative to the largest change of any; Adam divides small gradients by their size."""

SAVING = ParallelSizes(tp=2)
LAYOUTS = {
    "tp=1": ParallelSizes(),
    "tp=2 sp": ParallelSizes(tp=2, sequence_parallel=True),
    "pp=2": ParallelSizes(pp=2),
    "dp=2": ParallelSizes(dp=2),
    "cp=2": ParallelSizes(cp=2),
    "tp=4": ParallelSizes(tp=4),
    "tp=2 pp=2": ParallelSizes(tp=2, pp=2),
}
MODELS: dict[str, tuple[Family, bool]] = {"qwen3 tied": ("qwen3", True), "qwen2 untied": ("qwen2", False)}

OPTIMIZER = OptimizerSection(lr=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.1)


@dataclass(frozen=True)
class Trained:
    """What one rank saw of some steps."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    rates: tuple[float, ...]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A model folder, the run folder with its checkpoint, and how the run went on from there."""

    model: Path
    run: Path
    onward: Trained


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("resharding")
    family, tied = MODELS[request.param]
    model = tiny_model(root / "model", family, tied=tied, vocab_size=VOCAB_SIZE, hidden=32, heads=4, kv_heads=4)
    first, second = worlds(2).run(train_and_save, model, root / "run", SAVING, init=False)
    assert first.losses == second.losses
    return Saved(model, root / "run", first)


def train_and_save(model: Path, run: Path, sizes: ParallelSizes) -> Trained:
    with start(sizes, Precision()) as runtime:
        student = new_student(model, runtime)
        take_steps(student, 0, SAVED_AT)
        checkpoint.save(run, SAVED_AT, student, {"source": {"position": 16}}, keep=2)
        return take_steps(student, SAVED_AT, STEPS)


def resume(model: Path, run: Path, sizes: ParallelSizes, optimizer: OptimizerSection, steps: int) -> Trained:
    with start(sizes, Precision()) as runtime:
        student = new_student(model, runtime, optimizer, steps)
        found = checkpoint.latest(run)
        assert found is not None
        kept = checkpoint.load(found, student)
        return take_steps(student, kept["step"], steps, kept)


def new_student(model: Path, runtime: Runtime, optimizer: OptimizerSection = OPTIMIZER, steps: int = STEPS) -> Student:
    return Student.build(StudentSection(model=model), optimizer, runtime, steps=steps, chunk_rows=16)


def take_steps(student: Student, begin: int, end: int, kept: dict[str, Any] | None = None) -> Trained:
    objective, runtime = SFT(), student.network.runtime
    reports, before = [], weights_of(student)
    for step in range(begin, end):
        batch = batch_of(step, runtime)
        stats = token_stats(student, batch, {}, objective.needs, objective.temperature)
        scope = Scope(seed=0, step=step, data_group=runtime.mesh.groups.dp)
        plan, _ = objective.prepare(stats, batch, scope, objective.initial())
        reports.append(student.step(batch, bind(objective, {}, plan, batch, student.partition)))
    return Trained(
        losses=tuple(report.loss for report in reports),
        norms=tuple(report.grad_norm for report in reports),
        rates=tuple(report.lr for report in reports),
        before=before,
        after=weights_of(student),
        kept=kept or {},
    )


def weights_of(student: Student) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy().copy() for name, tensor in student.weights()}


def batch_of(step: int, runtime: Runtime) -> Batch:
    sizes = runtime.mesh.sizes
    return pack(
        list(demonstrations(step)),
        dp_rank=runtime.mesh.dp_rank,
        dp_size=sizes.dp,
        tokens_per_micro_batch=48,
        sequence_multiple=sizes.sequence_multiple,
        total_multiple=sizes.total_multiple,
        device=runtime.backend.device,
        version=0,
    )


def demonstrations(step: int) -> Iterator[Scored]:
    generator = torch.Generator().manual_seed(step)
    for sample, (prompt, response) in enumerate(((5, 9), (3, 21), (4, 13), (6, 6), (2, 17))):
        tokens = torch.randint(VOCAB_SIZE, (prompt + response,), generator=generator).tolist()
        rollout = Rollout(
            prompt=Prompt(id=str(sample), messages=(), tokens=tuple(tokens[:prompt])),
            group=str(sample),
            sample=0,
            tokens=tuple(tokens[prompt:]),
            logprobs=None,
            origin=(Origin.CONSTRUCTED,) * response,
            stop=Stop.EOS,
            version=0,
        )
        yield Scored(rollout=rollout, reward=None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_takes_the_same_steps(worlds: Worlds, saved: Saved, name: str) -> None:
    sizes, expected = LAYOUTS[name], saved.onward
    largest_change = max(np.abs(tensor - expected.before[key]).max() for key, tensor in expected.after.items())
    for rank in worlds(sizes.world).run(resume, saved.model, saved.run, sizes, OPTIMIZER, STEPS, init=False):
        assert rank.kept["source"] == {"position": 16}
        assert_equal(rank.before, expected.before)
        assert rank.losses == pytest.approx(expected.losses, rel=RELATIVE)
        assert rank.norms == pytest.approx(expected.norms, rel=RELATIVE)
        assert rank.rates == expected.rates
        for key, tensor in expected.after.items():
            assert np.abs(rank.after[key] - tensor).max() <= WEIGHTS * largest_change, key


def test_the_same_layout_takes_the_same_steps_bit_for_bit(worlds: Worlds, saved: Saved) -> None:
    for rank in worlds(2).run(resume, saved.model, saved.run, SAVING, OPTIMIZER, STEPS, init=False):
        assert rank.losses == saved.onward.losses
        assert rank.norms == saved.onward.norms
        assert_equal(rank.after, saved.onward.after)


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert np.array_equal(actual[name], tensor), name


def test_bf16_goes_on_from_its_fp32_weights_bit_for_bit(worlds: Worlds, saved: Saved, tmp_path: Path) -> None:
    straight, resumed = worlds(1).run(in_bf16, saved.model, tmp_path, init=False)[0]
    assert resumed.losses == straight.losses
    assert resumed.norms == straight.norms
    assert all(np.array_equal(resumed.after[name], weight) for name, weight in straight.after.items())


def in_bf16(model: Path, run: Path) -> tuple[Trained, Trained]:
    with start(ParallelSizes(), Precision(dtype="bf16")) as runtime:
        student = new_student(model, runtime)
        take_steps(student, 0, SAVED_AT)
        found = checkpoint.save(run, SAVED_AT, student, {}, keep=2)
        straight = take_steps(student, SAVED_AT, STEPS)
        student = new_student(model, runtime)
        checkpoint.load(found, student)
        return straight, take_steps(student, SAVED_AT, STEPS)


def test_settings_are_those_of_now_and_not_of_the_checkpoint(worlds: Worlds, saved: Saved) -> None:
    longer = OptimizerSection(lr=4e-3, schedule="linear", warmup_steps=2)
    (rank,) = worlds(1).run(resume, saved.model, saved.run, ParallelSizes(), longer, 10, init=False)
    assert rank.rates == pytest.approx([4e-3 * (1 - done / 8) for done in range(1, 9)])


@pytest.fixture
def run(saved: Saved, tmp_path: Path) -> Path:
    """A copy of the run, to add to."""
    shutil.copytree(saved.run, tmp_path / "run")
    return tmp_path / "run"


def test_what_was_cut_off_is_never_picked_up(run: Path) -> None:
    whole, unmarked, partial = checkpoint.folder_of(run, SAVED_AT), checkpoint.folder_of(run, 4), "step_000006.partial"
    shutil.copytree(whole, unmarked)
    (unmarked / checkpoint.COMPLETE).unlink()
    shutil.copytree(whole, unmarked.with_name(partial))
    largest = max((unmarked / "model").iterdir(), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    assert checkpoint.latest(run) == whole
    with pytest.raises(CheckpointError, match="no complete checkpoint there"):
        checkpoint.read_state(unmarked)
    (whole / checkpoint.COMPLETE).unlink()
    assert checkpoint.latest(run) is None


def test_the_newest_are_kept_and_leftovers_go(worlds: Worlds, saved: Saved, run: Path) -> None:
    for name in ("step_000004.partial", "step_000003", "step_000001.partial"):
        (run / "checkpoints" / name / "model").mkdir(parents=True)
    worlds(2).run(save_three, saved.model, run, init=False)
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["step_000004", "step_000005"]
    assert checkpoint.latest(run) == checkpoint.folder_of(run, 5)


def save_three(model: Path, run: Path) -> None:
    with start(SAVING, Precision()) as runtime:
        student = new_student(model, runtime)
        for step in (3, 4, 5):
            # the first before any update, as when every step so far was skipped
            checkpoint.save(run, step, student, {}, keep=2)
            take_steps(student, step, step + 1)


def test_a_checkpoint_of_another_model_is_refused(worlds: Worlds, saved: Saved, tmp_path: Path) -> None:
    family, tied = MODELS["qwen3 tied"]
    wider = tiny_model(tmp_path, family, tied=tied, vocab_size=VOCAB_SIZE, hidden=64, layers=4, heads=4, kv_heads=4)
    with pytest.raises(CheckpointError) as caught:
        worlds(2).run(resume, wider, saved.run, SAVING, OPTIMIZER, STEPS, init=False)
    line = str(caught.value)
    assert "checkpoint of another model (" in line
    assert "num_layers 2 there, 4 here" in line
    assert "hidden_size 32 there, 64 here" in line
    assert "\n" not in line
