"""GSM8K as the guide says it: five steps on the same recorded rollouts are the same steps at every layout.

The models come from the documented command, the config is the YAML of docs/guides/train-on-gsm8k.md. The real GSM8K is
used where it lies beside the checkout, and problems of the same form where it does not. One run goes through the
command line, as a person starts it; the others call the same `train` in processes that have imported everything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_distill.config import load
from megatron_distill.testing.world import Worlds
from megatron_distill.train.loop import train
from megatron_distill.train.metrics import comparable
from tools import tiny_models

PROJECT = Path(__file__).parents[2]
GUIDE = PROJECT / "docs" / "guides" / "train-on-gsm8k.md"
GSM8K = PROJECT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
STEPS = 5
RELATIVE = 1e-5
"""Largest relative difference between two layouts, of any step's loss and gradient norm, in fp32."""

LAYOUTS = {"tp=1": {}, "pp=2": {"pp": 2}, "dp=2": {"dp": 2}, "cp=2": {"cp": 2}, "tp=2 dp=2": {"tp": 2, "dp": 2}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the guide's commands run: data, models, gsm8k.yaml."""
    root = tmp_path_factory.mktemp("gsm8k")
    data = root / "gsm8k" / "train.jsonl"
    data.parent.mkdir()
    if GSM8K.is_file():
        data.symlink_to(GSM8K)
    else:
        data.write_text("".join(json.dumps(problem) + "\n" for problem in made_up()))
    (config,) = re.findall(r"^```yaml\n(# gsm8k\.yaml\n.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    (root / "gsm8k.yaml").write_text(config)
    assert tiny_models.main([str(data), str(root / "models" / "gsm8k")]) == 0
    return root


def made_up() -> Iterator[dict[str, str]]:
    for index in range(300):
        boxes, apples = 2 + index % 17, 3 + index % 23
        yield {
            "question": f"A farmer packs {boxes} boxes with {apples} apples each. How many apples does he pack?",
            "answer": f"He packs {boxes}*{apples} = <<{boxes}*{apples}={boxes * apples}>>{boxes * apples} apples.\n"
            f"#### {boxes * apples:,}",
        }


@pytest.fixture(scope="module")
def recorded(worlds: Worlds, root: Path) -> list[dict[str, Any]]:
    """Metrics of the run that generates, at tp=2."""
    return in_process(worlds, root, "gsm8k", {"tp": 2})


@pytest.fixture(scope="module")
def begun(worlds: Worlds, root: Path, recorded: list[dict[str, Any]]) -> Path:
    """A run that replayed two steps at tp=2."""
    in_process(worlds, root, "begun", {"tp": 2}, replay(), "train.steps=2")
    return root / "runs" / "begun"


def in_process(worlds: Worlds, root: Path, name: str, sizes: dict[str, int], *overrides: str) -> list[dict[str, Any]]:
    parallel = [f"parallel.{axis}={size}" for axis, size in sizes.items()]
    world = 1
    for size in sizes.values():
        world *= size
    worlds(world).run(train_in, root, [f"paths.run=runs/{name}", *parallel, *overrides], init=False)
    return metrics(root / "runs" / name)


def train_in(root: Path, overrides: list[str]) -> None:
    """Paths of the guide are relative to the folder where one works."""
    before = Path.cwd()
    os.chdir(root)
    try:
        train(load("gsm8k.yaml", ["data.limit=200", "metrics={tensorboard: false, console: false}", *overrides]))
    finally:
        os.chdir(before)


def replay() -> str:
    """The override of the guide."""
    (word,) = re.findall(r"^replay='(.*)'$", GUIDE.read_text(), re.MULTILINE)
    return word


def metrics(run: Path) -> list[dict[str, Any]]:
    return [comparable(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_steps(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        for name in ("loss/total", "optim/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=RELATIVE), f"step {theirs['step']}: {name}"


def test_the_recorded_run_learns(recorded: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in recorded] == list(range(1, STEPS + 1))
    assert recorded[-1]["loss/total"] < recorded[0]["loss/total"]
    assert all(0 < line["optim/grad_norm"] < 10 for line in recorded)


def test_the_command_replays_it_bit_for_bit(root: Path, recorded: list[dict[str, Any]]) -> None:
    overrides = [replay(), "paths.run=runs/gsm8k-tp2", "parallel.tp=2", "data.limit=200"]
    ended = subprocess.run(
        [sys.executable, "-m", "megatron_distill.cli", "train", "gsm8k.yaml", *overrides],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert metrics(root / "runs" / "gsm8k-tp2") == recorded


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_steps(
    worlds: Worlds, root: Path, recorded: list[dict[str, Any]], name: str
) -> None:
    run = f"replayed-{name}".replace(" ", "-")
    assert_same_steps(in_process(worlds, root, run, LAYOUTS[name], replay()), recorded)


@pytest.mark.parametrize("sizes", [{}, {"pp": 2}], ids=["tp=1", "pp=2"])
def test_a_run_goes_on_at_another_layout(
    worlds: Worlds, root: Path, recorded: list[dict[str, Any]], begun: Path, sizes: dict[str, int]
) -> None:
    """Two steps at tp=2 with a checkpoint, the rest elsewhere: by the loop, with everything that it keeps."""
    moved = begun.with_name(f"moved-{len(sizes)}")
    shutil.copytree(begun, moved)
    assert_same_steps(in_process(worlds, root, moved.name, sizes, replay()), recorded)
