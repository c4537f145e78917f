"""Cuts that only real Megatron can make: pipeline, context and sequence parallelism, its schedules, its optimizer.

The truth is a float64 chain: the same Hugging Face folders as `transformers` models in double precision, sequence by
sequence, nothing packed; the oracle; autograd back to the weights, by Hugging Face name. Megatron's gradient is read
off an update that is a smooth function of it: AdamW with lr = 1e6 and eps = 1 moves a weight by 1e6 g / (|g| + 1) in
its first step, next to which the rounding of the weight itself is nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.objectives.base import Scope
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import Runtime, start
from megatron_distill.teachers.frozen import FrozenPart
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.train.step import bind, token_stats
from megatron_distill.types import Scored, StepReport
from tests.certify.data import SEED, STEP, sequences, whole_step
from tests.certify.settings import Setting
from tests.certify.table import WHOLE, Errors, scaled_error

VOCABULARY = 200
STUDENT = "student"
LEARNING_RATE = 1e6


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One way to share the work."""

    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    tokens_per_micro_batch: int = 48
    chunk_rows: int = 16
    recompute: Literal["none", "full"] = "none"

    @property
    def ranks(self) -> int:
        """World size."""
        return self.sizes.world

    def suits(self, setting: Setting) -> bool:
        """Whether this cut is tried with the setting: one that speaks of one micro-batch is not cut further."""
        return not setting.one_micro_batch or (self.sizes.dp == 1 and self.tokens_per_micro_batch == WHOLE)


CUTS: Mapping[str, Cut] = {
    "one micro-batch": Cut(tokens_per_micro_batch=WHOLE, chunk_rows=1024),
    "a micro-batch per sequence": Cut(tokens_per_micro_batch=1),
    "recompute": Cut(recompute="full"),
    "tp=2 sp": Cut(sizes=ParallelSizes(tp=2, sequence_parallel=True)),
    "pp=2": Cut(sizes=ParallelSizes(pp=2)),
    "cp=2": Cut(sizes=ParallelSizes(cp=2)),
    "dp=2": Cut(sizes=ParallelSizes(dp=2)),
    "dp=4": Cut(sizes=ParallelSizes(dp=4), tokens_per_micro_batch=WHOLE),
    "tp=4 sp": Cut(sizes=ParallelSizes(tp=4, sequence_parallel=True)),
    "tp=2 pp=2 sp": Cut(sizes=ParallelSizes(tp=2, pp=2, sequence_parallel=True)),
    "tp=2 cp=2 sp": Cut(sizes=ParallelSizes(tp=2, cp=2, sequence_parallel=True)),
    "tp=2 dp=2": Cut(sizes=ParallelSizes(tp=2, dp=2)),
    "pp=2 cp=2": Cut(sizes=ParallelSizes(pp=2, cp=2)),
    "pp=2 dp=2": Cut(sizes=ParallelSizes(pp=2, dp=2)),
    "cp=2 dp=2": Cut(sizes=ParallelSizes(cp=2, dp=2)),
}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A setting, its data and the oracle's answer."""

    setting: Setting
    scored: list[Scored]
    loss: Tensor
    gradients: Mapping[str, Tensor]
    scale: float
    """What an error of the loss is relative to."""


def make_folders(root: Path) -> Path:
    """The student and all teachers that an oracle may name: other families, sizes and paddings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny_model(root / STUDENT, "qwen3", tied=True, vocab_size=VOCABULARY, hidden=32, heads=4, kv_heads=4)
    for seed, name in enumerate(("big", "reference"), start=1):
        tiny_model(root / name, "llama", vocab_size=VOCABULARY + 80, hidden=64, heads=8, kv_heads=4, seed=seed)
    for seed, name in enumerate(("small", "third"), start=3):
        tiny_model(root / name, "qwen2", vocab_size=VOCABULARY + 8, hidden=32, heads=4, kv_heads=4, seed=seed)
    return root


class Chain:
    """The float64 chain from weights to gradients."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(self._model)
        self.sequences = cache(self._sequences)
        self.rows = cache(self._rows)

    def _model(self, name: str) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(self.root / name, dtype=torch.float64, attn_implementation="eager")

    def _logits(self, name: str, tokens: Sequence[int], prompt: int) -> Tensor:
        logits: Tensor = self.model(name)(torch.tensor([tokens])).logits[0, prompt - 1 : -1, :VOCABULARY]
        return logits

    def _sequences(self, data: str) -> list[Scored]:
        @torch.no_grad()
        def logprobs(tokens: Sequence[int], prompt: int) -> Tensor:
            logp_RV = self._logits(STUDENT, tokens, prompt).log_softmax(-1)
            return logp_RV[torch.arange(len(logp_RV)), torch.tensor(tokens[prompt:])]

        return sequences(data, VOCABULARY, logprobs)

    def _rows(self, data: str, name: str) -> Tensor:
        """Of all sequences; the student's carry the graph back to its weights."""
        with torch.set_grad_enabled(name == STUDENT):
            rollouts = [one.rollout for one in self.sequences(data)]
            return torch.cat(
                [self._logits(name, (*one.prompt.tokens, *one.tokens), len(one.prompt.tokens)) for one in rollouts]
            )

    def expected(self, setting: Setting) -> Expected:
        """The oracle's loss and its gradient by Hugging Face name."""
        scored, rows_RV = self.sequences(setting.data), self.rows(setting.data, STUDENT)
        leaf_RV = rows_RV.detach().requires_grad_()
        teachers = {name: self.rows(setting.data, name) for name in setting.teachers}
        step = whole_step(scored, leaf_RV, teachers, setting.state)
        loss = setting.oracle(step)
        loss.backward()
        assert leaf_RV.grad is not None
        named = dict(self.model(STUDENT).named_parameters())
        gradients = torch.autograd.grad(rows_RV, list(named.values()), leaf_RV.grad, retain_graph=True)
        return Expected(
            setting=setting,
            scored=scored,
            loss=loss.detach(),
            gradients=dict(zip(named, gradients, strict=True)),
            scale=setting.scale(step, loss),
        )


def errors(root: Path, cut: Cut, answers: Sequence[Expected]) -> list[Errors]:
    """On each rank: of every setting under one cut."""
    with start(cut.sizes, Precision()) as runtime:
        student = Student.build(
            StudentSection(model=root / STUDENT, recompute=cut.recompute),
            OptimizerSection(lr=LEARNING_RATE, eps=1.0, clip_grad=0.0),
            runtime,
            steps=len(answers),
            chunk_rows=cut.chunk_rows,
        )
        teacher = cache(partial(_teacher, root, student))
        before = {name: tensor.clone() for name, tensor in student.weights()}
        found = []
        for answer in answers:
            if not cut.suits(answer.setting):
                continue
            with _restored(student):
                report = _step(student, teacher, cut, answer, runtime)
                found.append(_compare(answer, report, before, student))
                _check_teachers(teacher(name) for name in answer.setting.teachers)
        return found


def _check_teachers(teachers: Iterable[Any]) -> None:
    for teacher in teachers:
        assert not any(one.requires_grad or one.grad is not None for one in teacher.network.module.parameters())


def _teacher(root: Path, student: Student, name: str) -> Any:
    return FrozenPart(model=root / name).connect(student, tokenizer=None)


def _step(student: Student, teacher: Any, cut: Cut, answer: Expected, runtime: Runtime) -> StepReport:
    objective, mesh = answer.setting.objective, runtime.mesh
    batch = pack(
        answer.scored,
        dp_rank=mesh.dp_rank,
        dp_size=cut.sizes.dp,
        tokens_per_micro_batch=cut.tokens_per_micro_batch,
        sequence_multiple=cut.sizes.sequence_multiple,
        total_multiple=cut.sizes.total_multiple,
        device=torch.device("cpu"),
        version=0,
    )
    signals = {name: teacher(name).signal(batch) for name in answer.setting.teachers}
    stats = token_stats(student, batch, signals, objective.needs, objective.temperature)
    scope = Scope(seed=SEED, step=STEP, data_group=mesh.groups.dp)
    plan, _ = objective.prepare(stats, batch, scope, answer.setting.state)
    return student.step(batch, bind(objective, signals, plan, batch, student.partition))


def _compare(answer: Expected, report: StepReport, before: Mapping[str, Tensor], student: Student) -> Errors:
    largest = max(gradient.abs().max().item() for gradient in answer.gradients.values())
    norm = torch.stack([gradient.norm() for gradient in answer.gradients.values()]).norm().item()
    worst, names = abs(report.grad_norm - norm) / norm, set()
    for name, after in student.weights():
        moved = (after.double() - before[name].double()) / -LEARNING_RATE
        gradient = moved / (1 - moved.abs())
        worst = max(worst, (gradient - answer.gradients[name]).abs().max().item() / largest)
        names.add(name)
    assert names == set(answer.gradients), names ^ set(answer.gradients)
    return Errors(
        setting=str(answer.setting),
        fidelity="full" if answer.setting.teachers else "",
        loss=scaled_error(torch.tensor(report.loss), answer.loss, answer.scale),
        gradient=worst,
    )


@contextmanager
def _restored(student: Student) -> Iterator[None]:
    """Weights and moments afterwards as they were before, so that one model serves many first steps."""
    weights = [one.detach().clone() for one in student.network.module.parameters()]
    yield
    with torch.no_grad():
        for one, was in zip(student.network.module.parameters(), weights, strict=True):
            one.copy_(was)
        for chained in student.optimizer.chained_optimizers:
            if not chained.is_stub_optimizer:
                for state in chained.optimizer.state.values():
                    for value in state.values():
                        value.zero_()
                for group in chained.optimizer.param_groups:
                    group["step"] = 0
