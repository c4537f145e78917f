"""A disk is full when a run must save: all ranks say so in the same words, and what was saved before is whole.

The real loop on real ranks, whose run folder is a small file system, or whose files may not grow. Only who stops the
run is made up: a source that writes demonstrations until its end.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_distill.config import load
from megatron_distill.errors import DistillError, EngineStopped
from megatron_distill.models import checkpoint
from megatron_distill.rollout.base import HoldsWeights
from megatron_distill.rollout.sources.base import Surroundings
from megatron_distill.rollout.sources.demonstrations import Demonstrating, Demonstrations
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.testing.world import Worlds
from megatron_distill.train.loop import train

STOPPED = "every server is gone"
UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping(Demonstrations):
    """Demonstrations until the weights of step `at` are published; from then on a disk is full."""

    at: int
    stops: bool = True
    """Whether the run is also stopped for good then."""
    most_bytes: int | None = None
    """No file of the second rank grows larger."""
    room: int | None = None
    """Bytes that are left in the run folder's file system."""

    def connect(self, surroundings: Surroundings) -> Stops:
        return Stops(self, surroundings)


class Stops(Demonstrating):
    """The live source."""

    def __init__(self, part: Stopping, surroundings: Surroundings) -> None:
        super().__init__(part, surroundings)
        self._end = part

    def publish(self, student: HoldsWeights, version: int) -> None:
        super().publish(student, version)
        if version != self._end.at:
            return
        if self._end.most_bytes is not None and self._run.ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._end.most_bytes, UNLIMITED[1]))
        if self._end.room is not None and self._run.ranks.rank == 0:
            leave(self._run.run_folder, self._end.room)
        if self._end.stops:
            raise EngineStopped(STOPPED)


def leave(folder: Path, room: int) -> None:
    """So much room on a file system."""
    system = os.statvfs(folder)
    with (folder / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, system.f_bavail * system.f_frsize - room)


def ended(config: Path, end: dict[str, Any]) -> tuple[str, str]:
    """How the run ended on this rank: the error's type and its text."""
    try:
        train(replace(load(config), rollout=Stopping(**end)))
    except DistillError as error:
        return type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
    return "", ""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Four steps on two ranks, saved after the second and the fourth."""
    tiny_tokenizer(tiny_model(tmp_path / "student", "qwen3", hidden=32, kv_heads=2))
    rows = ({"question": f"{n} + {n}?", "answer": str(2 * n), "solution": f"It is {2 * n}."} for n in range(16))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(f"""
base: [base, objectives/sft]
student: {{model: {tmp_path / "student"}}}
data: {{prompts: {tmp_path / "data.jsonl"}, solution_key: solution}}
train: {{steps: 4, prompts_per_step: 4}}
checkpoint: {{every: 2, keep: 1}}
parallel: {{tp: 2}}
metrics: {{tensorboard: false, console: false}}
paths: {{run: {tmp_path / "run"}}}
""")
    return tmp_path / "run.yaml"


@pytest.fixture
def small_disk(config: Path) -> Iterator[Path]:
    """The run folder, a file system of its own."""
    run = config.parent / "run"
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(run)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        yield run
    finally:
        subprocess.run(["umount", str(run)], check=True)


MEBIBYTE = 2**20


@pytest.mark.parametrize("room", [0, MEBIBYTE], ids=["not a byte is left", "too little is left"])
def test_a_stopped_run_says_what_it_could_not_save_and_goes_on_once_there_is_room(
    worlds: Worlds, config: Path, small_disk: Path, room: int
) -> None:
    first, second = worlds(2).run(ended, config, {"at": 3, "room": room}, init=False, timeout=120)
    assert first == second
    kind, text = first
    assert kind == "EngineStopped"
    stopped, unsaved, saved = text.splitlines()
    assert stopped == STOPPED
    assert unsaved.startswith(
        f"the checkpoint of step 3 could not be saved: {small_disk}/checkpoints/step_000003.partial"
    )
    assert unsaved.endswith("make room there")
    assert saved == f"2 steps are saved in {small_disk}: the same command goes on from there"
    assert [folder.name for folder in (small_disk / "checkpoints").iterdir()] == ["step_000002"]

    (small_disk / "filler").unlink()
    assert worlds(2).run(ended, config, {"at": 5}, init=False, timeout=120) == [("", "")] * 2
    lines = [json.loads(line) for line in (small_disk / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert checkpoint.complete(small_disk) == [checkpoint.folder_of(small_disk, 4)]


def test_a_stopped_run_says_that_nothing_is_saved(worlds: Worlds, config: Path) -> None:
    run = config.parent / "run"
    run.mkdir()
    (run / "checkpoints").write_text("where a folder should be")
    first, second = worlds(2).run(ended, config, {"at": 1}, init=False)
    assert first == second
    stopped, unsaved, saved = first[1].splitlines()
    assert stopped == STOPPED
    assert "the checkpoint of step 1 could not be saved: " in unsaved
    assert "Not a directory" in unsaved
    assert saved == "no step is saved: the same command begins anew"


@pytest.mark.parametrize("stops", [False, True], ids=["at a save", "when it is stopped"])
def test_a_rank_that_cannot_write_is_told_on_all_of_them(worlds: Worlds, config: Path, stops: bool) -> None:
    end = {"at": 3 if stops else 2, "stops": stops, "most_bytes": 20_000}
    first, second = worlds(2).run(ended, config, end, init=False, timeout=120)
    assert first == second
    kind, text = first
    assert kind == ("EngineStopped" if stops else "CheckpointError")
    assert ".partial/model: a rank could not write its part; make room there" in text
    kept = ["step_000002"] if stops else []
    assert [folder.name for folder in (config.parent / "run" / "checkpoints").iterdir()] == kept
