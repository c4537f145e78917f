"""`kill -9` of a rank, then the same command again: the run ends as if nothing had happened, bit for bit.

Real processes through the command line, rollouts by the engine in process, a real SIGKILL. Three commands: one that
nobody disturbs, one whose rank is killed, and the same one again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_distill.models import checkpoint
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.train.metrics import comparable

PROJECT = Path(__file__).parents[2]
STEPS, EVERY, KILL_AFTER = 6, 2, 3
SECONDS = 120.0
"""Patience with one command on a busy machine."""


@dataclass(frozen=True)
class Ended:
    """What a command left."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Killed:
    """A run that lost a rank, and the same command again."""

    first: Ended
    survivors: list[str]
    left_at: Path
    """The newest complete checkpoint at that time."""
    second: Ended


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, some prompts, and a run at tp=2."""
    root = tmp_path_factory.mktemp("resume")
    for name, hidden, seed in (("student", 32, 0), ("teacher", 64, 1)):
        tiny_tokenizer(tiny_model(root / name, "qwen3", hidden=hidden, kv_heads=2, seed=seed))
    rows = ({"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20))
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "run.yaml").write_text(f"""
student: {{model: student}}
teachers: {{main: {{kind: frozen, model: teacher}}}}
rollout: {{kind: generate, samples_per_prompt: 2, sampling: {{max_new_tokens: 24}}}}
reward: {{kind: exact}}
data: {{prompts: prompts.jsonl}}
objective: {{kind: opd, divergence: reverse_kl}}
optimizer: {{lr: 1e-3, schedule: cosine, warmup_steps: 2, weight_decay: 0.01}}
train: {{steps: {STEPS}, prompts_per_step: 8}}
checkpoint: {{every: {EVERY}, keep: 9}}
parallel: {{tp: 2}}
metrics: {{tensorboard: false}}
""")
    return root


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    with command(root, "undisturbed") as process:
        ended = wait(process)
    assert ended.code == 0, ended.err
    return root / "undisturbed"


@pytest.fixture(scope="module")
def killed(root: Path) -> Killed:
    run = root / "killed"
    with command(root, "killed") as process:
        kill_a_rank(process, run)
        first = wait(process)
        survivors = processes_of(process.pid)
    left_at = checkpoint.latest(run)
    assert left_at is not None
    cut_off_later_checkpoints(left_at)
    with command(root, "killed") as process:
        second = wait(process)
    return Killed(first=first, survivors=survivors, left_at=left_at, second=second)


def command(root: Path, run: str) -> subprocess.Popen[str]:
    """`megatron-distill train` in a session of its own, so that all its processes can be found."""
    words = [sys.executable, "-m", "megatron_distill.cli", "train", "run.yaml", f"paths.run={run}"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait(process: subprocess.Popen[str]) -> Ended:
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ended(process.returncode, out, err)


def kill_a_rank(process: subprocess.Popen[str], run: Path) -> None:
    """SIGKILL to the second rank as soon as the metrics of step `KILL_AFTER` are on disk."""
    deadline = time.monotonic() + SECONDS
    while len(steps_of(run)) < KILL_AFTER:
        assert process.poll() is None, wait(process).err
        assert time.monotonic() < deadline, f"step {KILL_AFTER} was not reached within {SECONDS:.0f} s"
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    (rank,) = [child for child in children if child.environ().get("RANK") == "1" and "train" in child.cmdline()]
    rank.send_signal(signal.SIGKILL)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [comparable(json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def processes_of(session: int) -> list[str]:
    """Command lines of what still lives of a session."""
    alive = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        try:
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                alive.append(" ".join(process.info["cmdline"]))
        except ProcessLookupError:
            continue
    return alive


def cut_off_later_checkpoints(newest: Path) -> None:
    """What a machine that loses power while it saves may leave: newer than the newest, and none of it whole."""
    unmarked, partial = newest.with_name("step_000007"), newest.with_name("step_000008.partial")
    shutil.copytree(newest, unmarked)
    (unmarked / checkpoint.COMPLETE).unlink()
    largest = max((unmarked / "model").iterdir(), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    shutil.copytree(newest, partial)


def test_a_killed_rank_ends_the_command_with_one_line(killed: Killed, root: Path) -> None:
    log = Path("killed") / "logs" / "rank_0001.log"
    assert killed.first.code == 128 + signal.SIGKILL
    assert killed.first.err == f"error: rank 1 was killed by SIGKILL: out of memory?; its log: {log}\n"
    assert killed.survivors == []


def test_the_same_command_goes_on_from_the_newest_complete_checkpoint(killed: Killed) -> None:
    assert killed.second.code == 0, killed.second.err
    assert killed.second.err == ""
    assert f"going on from {Path('killed', *killed.left_at.parts[-2:])}" in killed.second.out.splitlines()
    first_step = int(killed.left_at.name.removeprefix("step_")) + 1
    assert f"\nstep {first_step}/{STEPS}  " in killed.second.out
    assert f"\nstep {first_step - 1}/{STEPS}  " not in killed.second.out


def test_metrics_are_those_of_an_undisturbed_run(killed: Killed, undisturbed: Path, root: Path) -> None:
    assert steps_of(root / "killed") == steps_of(undisturbed)
    assert [line["step"] for line in steps_of(undisturbed)] == list(range(1, STEPS + 1))


def test_weights_and_optimizer_are_those_of_an_undisturbed_run(killed: Killed, undisturbed: Path, root: Path) -> None:
    expected, actual = (files_of(checkpoint.folder_of(run, STEPS)) for run in (undisturbed, root / "killed"))
    assert sorted(actual) == sorted(expected)
    assert sum(name.endswith(".distcp") for name in expected) == 4
    assert {name for name, content in expected.items() if actual[name] != content} == set()


def test_nothing_is_left_of_saves_that_were_cut_off(killed: Killed, undisturbed: Path, root: Path) -> None:
    kept, expected = (
        sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (root / "killed", undisturbed)
    )
    assert kept == expected


def files_of(folder: Path) -> dict[str, bytes]:
    """All but torch's `.metadata`, which holds a random number and the folder's name."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".metadata"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
