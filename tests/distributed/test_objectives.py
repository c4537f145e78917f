"""Every objective against its float64 oracle, whole, and cut in every way a run may cut it.

The student is a table (an embedding of the input token and of its position, and an output layer), so that rows
only have the right logits if the shift, the packing and the partition are right. Sequences go through the real
`pack`, the real `bind` and the real `linear_loss`; a new objective is found by its file name and must bring an oracle.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.losses.chunk import linear_loss
from megatron_distill.losses.signal import teacher_logprob
from megatron_distill.losses.vocab import top_k
from megatron_distill.objectives.base import Objective, Scope
from megatron_distill.plugins import kinds, load
from megatron_distill.testing.assertions import TOLERANCE, relative_error
from megatron_distill.testing.world import Worlds
from megatron_distill.train.step import bind
from megatron_distill.types import (
    Batch,
    Fidelity,
    Full,
    MicroBatch,
    Origin,
    Prompt,
    Rollout,
    Scored,
    Stop,
    TeacherSignal,
    Token,
    TokenStats,
    TopK,
    VocabPartition,
)
from tests.oracles import dense

VALID, PADDED, HIDDEN = 50, 64, 8
LENGTHS = [(3, 5), (1, 1), (4, 9), (2, 7), (3, 2), (2, 4), (1, 8)]
"""Prompt and response tokens of each sequence."""
OBJECTIVES = "megatron_distill.objectives"


type Groups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]
"""Tensor-parallel and data-parallel group of this rank."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a step is cut."""

    tp: int = 1
    dp: int = 1
    tokens_per_micro_batch: int = 10_000
    chunk_rows: int = 1024
    fidelity: Fidelity = Fidelity.FULL


CUTS = {
    1: [
        Cut(),
        Cut(chunk_rows=4),
        Cut(tokens_per_micro_batch=12),
        Cut(tokens_per_micro_batch=1, chunk_rows=3),
        Cut(fidelity=Fidelity.TOP_K),
        Cut(fidelity=Fidelity.TOKEN),
    ],
    2: [Cut(tp=2), Cut(tp=2, chunk_rows=4, tokens_per_micro_batch=12), Cut(dp=2), Cut(tp=2, fidelity=Fidelity.TOKEN)],
    4: [
        Cut(tp=4),
        Cut(tp=4, chunk_rows=3, tokens_per_micro_batch=1),
        Cut(tp=4, fidelity=Fidelity.TOP_K),
        Cut(tp=2, dp=2, tokens_per_micro_batch=12, chunk_rows=4),
        Cut(dp=4, tokens_per_micro_batch=1),
    ],
}
"""By number of ranks. Seven sequences over four data-parallel ranks leave one with an empty micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A model without layers; its output layer is padded beyond the vocabulary."""

    token_VH: Tensor
    position_PH: Tensor
    head_pH: Tensor

    @staticmethod
    def draw(seed: int, padded: int, dtype: torch.dtype) -> Table:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            # Drawn in fp32, so that fp64 has the very same numbers.
            return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

        return Table(token_VH=normal(VALID, HIDDEN), position_PH=normal(16, HIDDEN), head_pH=normal(padded, HIDDEN))

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return torch.tanh(self.token_VH[tokens] + self.position_PH[positions])

    def gradients(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        return {"token": self.token_VH, "position": self.position_PH, "head": self.head_pH}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Loss of the whole step, `loss/<term>` of it, and gradients by parameter."""

    loss: Tensor
    sums: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


def _scored() -> list[Scored]:
    generator = torch.Generator().manual_seed(11)
    scored = []
    for index, (prompt, response) in enumerate(LENGTHS):
        tokens = tuple(torch.randint(VALID, (prompt + response,), generator=generator).tolist())
        rollout = Rollout(
            prompt=Prompt(id=str(index), messages=(), tokens=tokens[:prompt]),
            group=f"group_{index // 2}",
            sample=index % 2,
            tokens=tokens[prompt:],
            logprobs=(-1.0,) * response,
            origin=(Origin.STUDENT,) * response,
            stop=Stop.EOS,
            version=0,
        )
        scored.append(Scored(rollout=rollout, reward=float(index % 2)))
    return scored


def _teachers(names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Table]:
    """Teachers are padded otherwise than the student, and otherwise than each other."""
    return {name: Table.draw(100 + place, VALID + 3 + place, dtype) for place, name in enumerate(names)}


@cache
def _all_expected(kind: str) -> list[Found]:
    """The oracle's answer to every setting."""
    return [_expected(kind, _objective(kind, fields), teachers) for fields, teachers in _settings(kind)]


def _expected(kind: str, objective: Objective, teachers: tuple[str, ...]) -> Found:
    """What the oracle says: sequences one by one, nothing packed, nothing padded, float64."""
    student = Table.draw(1, PADDED, torch.float64)
    rows: dict[str, list[Tensor]] = {"student": [], **{name: [] for name in teachers}}
    models = {"student": student, **_teachers(teachers, torch.float64)}
    targets, sequences = [], []
    for index, scored in enumerate(_scored()):
        tokens = [*scored.rollout.prompt.tokens, *scored.rollout.tokens]
        for place in range(len(scored.rollout.prompt.tokens), len(tokens)):
            before = torch.tensor([tokens[place - 1]]), torch.tensor([place - 1])
            for name, model in models.items():
                rows[name].append(model.hidden(*before) @ model.head_pH[:VALID].T)
            targets.append(tokens[place])
            sequences.append(index)
    step = dense.Step(
        student_RV=torch.cat(rows["student"]),
        teachers_RV={name: torch.cat(rows[name]).detach() for name in teachers},
        target_R=torch.tensor(targets),
        sequence_R=torch.tensor(sequences),
    )
    loss = importlib.import_module(f"tests.oracles.{kind}").oracle(step, asdict(objective))
    loss.backward()
    return Found(loss=loss.detach(), sums={}, gradients=student.gradients())


def _cut_step(objective: Objective, teachers: tuple[str, ...], cut: Cut, groups: Groups) -> Found:
    """The same step as a training run would take it, in fp32, on this rank's part; summed over ranks at the end."""
    tp_group, dp_group = groups
    width = PADDED // cut.tp
    tp_rank, dp_rank = dist.get_rank() % cut.tp, dist.get_rank() // cut.tp
    partition = VocabPartition(start=tp_rank * width, width=width, valid=VALID, group=tp_group)
    batch = pack(
        _scored(),
        dp_rank=dp_rank,
        dp_size=cut.dp,
        tokens_per_micro_batch=cut.tokens_per_micro_batch,
        device=torch.device("cpu"),
        version=0,
    )
    student = Table.draw(1, PADDED, torch.float32)
    signals = {
        name: tuple(_signal(model, micro, partition, objective.temperature, cut) for micro in batch.micro)
        for name, model in _teachers(teachers, torch.float32).items()
    }
    scope = Scope(seed=0, step=0, data_group=dp_group)
    plan, _ = objective.prepare(TokenStats(), batch, scope, objective.initial())
    loss = bind(objective, signals, plan, batch, partition)
    total, sums = _backward(student, batch, loss, partition, cut)
    gradients = {name: scope.total(gradient) for name, gradient in student.gradients().items()}
    gradients["head"] = gradients["head"].clone()
    if cut.tp > 1:
        dist.all_reduce(gradients["head"], group=tp_group)
    return Found(
        loss=scope.total(total), sums={name: scope.total(one) for name, one in sums.items()}, gradients=gradients
    )


def _backward(
    student: Table,
    batch: Batch,
    loss: Callable[[Tensor, int, slice], tuple[Tensor, dict[str, Tensor]]],
    partition: VocabPartition,
    cut: Cut,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave gradients in `student`: whole ones for the embeddings, this rank's rows of the output layer's."""
    total, sums = torch.zeros(()), {}
    mine = slice(partition.start, partition.start + partition.width)
    for index, micro in enumerate(batch.micro):
        hidden_RH = student.hidden(micro.input_T, micro.position_T)[micro.response_R]
        leaf_RH = hidden_RH.detach().requires_grad_()
        scalar, parts = linear_loss(
            leaf_RH, student.head_pH[mine], lambda logits, rows, at=index: loss(logits, at, rows), cut.chunk_rows
        )
        scalar.backward()
        assert leaf_RH.grad is not None
        if cut.tp > 1 and micro.rows:
            dist.all_reduce(leaf_RH.grad, group=partition.group)
        hidden_RH.backward(leaf_RH.grad)
        total = total + scalar.detach()
        sums = {name: sums.get(name, 0.0) + part for name, part in parts.items()}
    return total, sums


def _signal(model: Table, micro: MicroBatch, partition: VocabPartition, temperature: float, cut: Cut) -> TeacherSignal:
    with torch.no_grad():
        hidden_RH = model.hidden(micro.input_T, micro.position_T)[micro.response_R]
        head_vH = torch.full((partition.width, HIDDEN), 40.0)
        theirs = model.head_pH[partition.start : partition.start + partition.width]
        head_vH[: len(theirs)] = theirs
        full = Full(hidden_RH=hidden_RH, head_vH=head_vH, partition=partition)
        logp_R = teacher_logprob(full, micro.target_R, temperature)
        if cut.fidelity == Fidelity.TOKEN:
            return Token(logp_R=logp_R)
        if cut.fidelity == Fidelity.TOP_K:
            ids_RK, top_logp_RK = top_k(full.shard(temperature), 4)
            return TopK(logp_R=logp_R, ids_RK=ids_RK, top_logp_RK=top_logp_RK)
    return full


def _groups(tp: int) -> Groups:
    """Tensor-parallel ranks are neighbours, data-parallel ranks `tp` apart."""
    size = dist.get_world_size()
    tensor = [dist.new_group(list(range(first, first + tp))) for first in range(0, size, tp)]
    data = [dist.new_group(list(range(first, size, tp))) for first in range(tp)]
    return tensor[dist.get_rank() // tp], data[dist.get_rank() % tp]


def _objective(kind: str, fields: Mapping[str, Any]) -> Objective:
    return load(OBJECTIVES, kind, Objective)(**fields)


def _settings(kind: str) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Fields and teachers to try, as the oracle's file lists them."""
    oracle = importlib.import_module(f"tests.oracles.{kind}")
    found = []
    for fields in oracle.FIELDS:
        named = tuple(fields.get("teacher_weights", ()))
        found += [(fields, named)] if named else [(fields, ("big", "small")[:count]) for count in oracle.TEACHERS]
    return found


def _errors(kind: str, cuts: list[Cut], answers: list[Found]) -> dict[str, float]:
    """The relative error of loss, logged sums and gradients, by setting and cut."""
    errors: dict[str, float] = {}
    groups = {tp: _groups(tp) for tp in sorted({cut.tp for cut in cuts})}
    for (fields, teachers), expected in zip(_settings(kind), answers, strict=True):
        objective = _objective(kind, fields)
        for cut in cuts:
            if (objective.needs.teacher or Fidelity.TOKEN) > cut.fidelity:
                continue
            found = _cut_step(objective, teachers, cut, groups[cut.tp])
            where = f"{kind} {fields} teachers={teachers} {cut}"
            errors[f"loss of {where}"] = relative_error(found.loss, expected.loss)
            errors[f"logged loss of {where}"] = relative_error(sum(found.sums.values()), expected.loss)
            for name, gradient in found.gradients.items():
                errors[f"gradient of {name}, {where}"] = relative_error(gradient, expected.gradients[name])
            padding = found.gradients["head"][VALID:]
            errors[f"gradient of padding, {where}"] = (
                padding.abs().max().item() * float("inf") if padding.any() else 0.0
            )
    return errors


@pytest.mark.parametrize("ranks", sorted(CUTS))
@pytest.mark.parametrize("kind", kinds(OBJECTIVES))
def test_loss_and_gradient_equal_the_oracle_under_every_cut(worlds: Worlds, kind: str, ranks: int) -> None:
    for errors in worlds(ranks).run(_errors, kind, CUTS[ranks], _all_expected(kind)):
        assert errors
        case, error = max(errors.items(), key=lambda item: item[1])
        assert error <= TOLERANCE[torch.float32], f"{case}: relative error {error:.3g}"
    print(f"{kind} on {ranks} ranks: worst relative error {error:.2e}")


def test_lengths_leave_a_rank_without_sequences() -> None:
    """What the cuts above are meant to cover really happens."""
    micro = [
        one.rows
        for rank in range(4)
        for one in pack(
            _scored(), dp_rank=rank, dp_size=4, tokens_per_micro_batch=1, device=torch.device("cpu"), version=0
        ).micro
    ]
    assert 0 in micro
    assert sum(micro) == list(accumulate(response for _, response in LENGTHS))[-1]


@pytest.mark.parametrize("kind", kinds(OBJECTIVES))
def test_every_objective_has_an_oracle(kind: str) -> None:
    oracle = importlib.import_module(f"tests.oracles.{kind}")
    assert callable(oracle.oracle)
    assert oracle.FIELDS
    temperatures = {_objective(kind, fields).temperature for fields in oracle.FIELDS}
    assert temperatures - {1.0}, f"tests/oracles/{kind}.py: try a temperature other than 1"
