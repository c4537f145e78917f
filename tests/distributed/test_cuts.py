"""However a step is cut over ranks and micro-batches, it is the step that the mathematics asks for.

All through real Megatron: its schedules, its DistributedDataParallel, its distributed optimizer; see
`tests.certify.network` for the float64 chain that says what loss, gradient norm and gradient should be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.testing.assertions import TOLERANCE
from megatron_distill.testing.world import Worlds
from tests.certify.network import CUTS, Chain, Cut, Expected, errors, make_folders
from tests.certify.settings import Setting, objectives, settings

BAR = TOLERANCE[torch.float32]
FEW = [
    Setting(kind="sft", fields={"reduction": "sequence_mean"}, teachers=(), data="sampled", state={}),
    Setting(
        kind="opd",
        fields={"divergence": "sampled_token", "temperature": 1.3},
        teachers=("big",),
        data="sampled",
        state={},
    ),
    Setting(kind="gkd", fields={"beta": 0.3, "temperature": 1.3}, teachers=("big",), data="sampled", state={}),
]
"""One without a teacher, one that asks it for a token's log-prob, one for its whole distribution."""
CUTS_OF_ALL = ("tp=2 cp=2 sp", "pp=2 dp=2")
"""Cuts at which every objective's default is tried; `make certify` tries all at all."""
NO_SEQUENCE = {
    "tp=2 dp=2": Cut(sizes=ParallelSizes(tp=2, dp=2)),
    "pp=2 dp=2": Cut(sizes=ParallelSizes(pp=2, dp=2)),
    "cp=2 dp=2": Cut(sizes=ParallelSizes(cp=2, dp=2)),
}
"""With one sequence in the step, a data-parallel rank has none: its micro-batch has no response tokens."""

type Answers = Callable[[Sequence[Setting]], list[Expected]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("cuts"))


@pytest.fixture(scope="module")
def answers(folders: Path) -> Answers:
    chain = Chain(folders)
    return lambda asked: [chain.expected(setting) for setting in asked]


@pytest.mark.parametrize("name", CUTS)
def test_a_step_at_every_cut(worlds: Worlds, folders: Path, answers: Answers, name: str) -> None:
    check(worlds, folders, CUTS[name], answers(FEW))


@pytest.mark.parametrize("name", NO_SEQUENCE)
def test_a_step_where_a_rank_has_no_sequence(worlds: Worlds, folders: Path, answers: Answers, name: str) -> None:
    check(worlds, folders, NO_SEQUENCE[name], answers([replace(one, data="single") for one in FEW]))


@pytest.mark.parametrize("name", CUTS_OF_ALL)
def test_every_objective(worlds: Worlds, folders: Path, answers: Answers, name: str) -> None:
    check(worlds, folders, CUTS[name], answers([settings(kind)[0] for kind in objectives()]))


def check(worlds: Worlds, folders: Path, cut: Cut, expected: list[Expected]) -> None:
    for found in worlds(cut.ranks).run(errors, folders, cut, expected, init=False):
        broken = [one for one in found if not (one.loss <= BAR and one.gradient <= BAR)]
        assert not broken


def test_gradients_are_not_nothing(answers: Answers) -> None:
    """Or errors next to them would say little."""
    for answer in answers([settings(kind)[0] for kind in objectives()]):
        assert max(gradient.abs().max().item() for gradient in answer.gradients.values()) > 1e-3, answer.setting
