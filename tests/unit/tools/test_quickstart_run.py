"""The quickstart judges itself honestly, and its configs and commands fit the package as it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_distill.config import check, load
from megatron_distill.rollout.engines.embedded import Embedded
from megatron_distill.rollout.engines.sglang import SGLang
from megatron_distill.rollout.sources.generate import Generate
from megatron_distill.train.preflight import preflight
from tools.quickstart import reload, run, task

PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as the distillation finds it, with untrained models in the place of trained ones."""
    here = tmp_path_factory.mktemp("quickstart_run")
    folder = here / run.FOLDER
    task.make(folder, seed=1)
    for name, model in (("teacher", "teacher"), ("student_before", "student")):
        shutil.copytree(folder / "models" / model, folder / "exports" / name)
    return here


@pytest.mark.parametrize(
    ("before", "after", "passed"),
    [(0.2, 0.95, True), (0.2, 0.55, False), (0.75, 0.94, False), (0.75, 0.96, True)],
    ids=["far", "less than half of the gap", "less than 20 points", "just enough"],
)
def test_both_bars_must_be_cleared(before: float, after: float, passed: bool) -> None:
    accuracy = {"teacher": 1.0, "student_before": before, "student_after": after}
    assert run.Summary.of(accuracy, 500, {"total": 1.0}).passed is passed


def test_student_that_starts_beside_its_teacher_is_no_success() -> None:
    accuracy = {"teacher": 0.9, "student_before": 0.9, "student_after": 0.9}
    assert not run.Summary.of(accuracy, 500, {}).passed


@pytest.mark.parametrize("name", ["teacher", "student", "distill"])
def test_configs_pass_every_check_of_a_run(made: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    config = load(PROJECT / "configs" / "quickstart" / f"{name}.yaml")
    check(config)
    preflight(config)
    assert config.parallel.world == 2


def test_servers_write_for_the_same_distillation(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    served, embedded = (load(PROJECT / "configs" / "quickstart" / f"{name}.yaml") for name in ("sglang", "distill"))
    check(served)
    assert isinstance(served.rollout, Generate)
    assert isinstance(served.rollout.engine, SGLang)
    assert replace(served, rollout=replace(served.rollout, engine=Embedded())) == embedded


@pytest.mark.parametrize("engine", sorted(run.DISTILLATIONS))
def test_commands_are_the_public_ones_and_name_configs_that_exist(engine: str) -> None:
    for phase in run.phases(seed=1, engine=engine):
        program, *words = phase.command
        assert program == "megatron-distill" or words[1].startswith("tools."), phase
        configs = [word for word in words if word.endswith(".yaml")]
        assert all((PROJECT / config).is_file() for config in configs), phase


def test_export_answers_through_transformers_alone(made: Path) -> None:
    texts = reload.answers(made / run.FOLDER / "exports" / "student_before", reload.QUESTIONS[:1])
    assert len(texts) == 1
    assert "<|im_end|>" not in texts[0]
