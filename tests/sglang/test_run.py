"""A distillation through the command line, its rollouts written by two servers that the run starts: it learns, a lost
server ends it with a checkpoint once its restarts are used up, and the same command goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1500)]

PROJECT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
STEPS, PROMPTS = 30, 40
COMMON = """
reward: {kind: exact}
data: {prompts: data.jsonl, answer_after: "####", solution_key: answer, max_prompt_tokens: 40}
optimizer: {lr: 3e-3, schedule: constant}
checkpoint: {every: 0}
metrics: {tensorboard: false}
"""
TAUGHT = """
objective: {kind: sft}
rollout: {kind: demonstrations}
optimizer: {lr: 5e-3}
"""
RUN = f"""
student: {{model: started}}
teachers: {{main: {{kind: frozen, model: teacher_trained}}}}
objective: {{kind: opd, divergence: reverse_kl}}
rollout:
  kind: generate
  record: true
  sampling: {{max_new_tokens: 10}}
  engine:
    kind: sglang
    servers: {{count: 2, context_length: 128}}
    probe_seconds: 3
    silent_seconds: 30
parallel: {{tp: 2}}
train: {{steps: {STEPS}, prompts_per_step: {PROMPTS}}}
eval:
  data: {{prompts: data.jsonl, answer_after: "####", max_prompt_tokens: 40}}
  every: 10
  sampling: {{temperature: 0, max_new_tokens: 10}}
paths: {{run: out}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A command that has ended."""

    code: int
    said: str
    left: tuple[int, ...] = ()
    """Those of its servers' processes that are still there."""


@pytest.fixture(scope="module")
def workplace(server_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows ten answers, and a student that knows how one looks."""
    root = tmp_path_factory.mktemp("served_run")
    rows = [{"question": f"say {n}", "answer": f"#### {n}"} for n in range(10)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "common.yaml").write_text(COMMON)
    (root / "run.yaml").write_text(f"base: common\n{RUN}")
    for name, hidden, steps, trained in (("teacher", 64, 40, "teacher_trained"), ("student", 48, 14, "started")):
        tiny_tokenizer(tiny_model(root / name, "qwen3", hidden=hidden, seed=hidden, max_position_embeddings=128))
        (root / f"{name}.yaml").write_text(
            f"base: common\n{TAUGHT}\nstudent: {{model: {name}}}\npaths: {{run: {name}_run}}\n"
            f"train: {{steps: {steps}, prompts_per_step: 20}}\n"
        )
        done = begin(root, "megatron_distill.cli", "train", f"{name}.yaml")
        assert ended(done).code == 0
        checkpoint = f"{name}_run/checkpoints/step_{steps:06d}"
        assert ended(begin(root, "tools.convert", "to-hf", checkpoint, trained)).code == 0
    return root


@pytest.fixture(scope="module")
def stopped(workplace: Path) -> Ended:
    """The run that loses a server while no restart is allowed."""
    process = begin(workplace, "megatron_distill.cli", "train", "run.yaml", "rollout.engine.most_restarts=0")
    try:
        while len(steps_of(workplace / "out")) < 5:
            assert process.poll() is None, ended(process).said
            time.sleep(0.1)
        servers = servers_of(process)
        assert len(servers) == 2
        os.kill(servers[0], signal.SIGKILL)
        done = ended(process)
    finally:
        process.kill()
    end = time.monotonic() + 20
    while any(map(runs, servers)) and time.monotonic() < end:
        time.sleep(0.1)
    return replace(done, left=tuple(filter(runs, servers)))


@pytest.fixture(scope="module")
def finished(workplace: Path, stopped: Ended) -> Ended:
    """The same command again, with restarts."""
    return ended(begin(workplace, "megatron_distill.cli", "train", "run.yaml"))


def test_a_lost_server_ends_the_run_with_a_message_and_a_checkpoint(workplace: Path, stopped: Ended) -> None:
    assert stopped.code == 2, stopped.said
    assert "most_restarts=0: see the server's log, then resume the run" in stopped.said
    assert "steps are saved in out: the same command goes on from there" in stopped.said
    assert "Traceback" not in stopped.said
    assert len(list((workplace / "out" / "checkpoints").glob("step_*/COMPLETE"))) == 1
    assert not stopped.left


def test_the_run_goes_on_without_a_lost_or_doubled_step_or_prompt(workplace: Path, finished: Ended) -> None:
    assert finished.code == 0, finished.said
    assert [line["step"] for line in steps_of(workplace / "out")] == list(range(1, STEPS + 1))
    assert all(line["rollout/staleness_max"] == 0 for line in steps_of(workplace / "out"))
    groups = [json.loads(line)["group"] for line in lines_of(workplace / "out" / "traces")]
    assert groups == [f"{place:012d}" for place in range(STEPS * PROMPTS)]


@pytest.mark.parametrize("on_update", ["wait", "continue"])
def test_rollouts_ahead_go_on_when_their_server_dies(workplace: Path, finished: Ended, on_update: str) -> None:
    name, steps = f"ahead_{on_update}", 10
    ahead = f"rollout.prefetch={{depth: 1, on_update: {on_update}}}"
    here = (f"train.steps={steps}", f"paths.run={name}")
    process = begin(workplace, "megatron_distill.cli", "train", "run.yaml", ahead, *here)
    try:
        while len(steps_of(workplace / name)) < 3:
            assert process.poll() is None, ended(process).said
            time.sleep(0.1)
        os.kill(servers_of(process)[0], signal.SIGKILL)
        done = ended(process)
    finally:
        process.kill()
    assert done.code == 0, done.said
    lines = steps_of(workplace / name)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[-1]["engine/restarts"] == 1
    assert all(line["rollout/staleness_max"] <= 1 for line in lines)
    groups = [json.loads(line)["group"] for line in lines_of(workplace / name / "traces")]
    assert groups == [f"{place:012d}" for place in range(steps * PROMPTS)]


def test_it_learns_and_tells_where_the_time_went(workplace: Path, finished: Ended) -> None:
    accuracy = {line["step"]: line["eval/avg_at_1"] for line in told_in(workplace / "out") if "eval/avg_at_1" in line}
    first, last = steps_of(workplace / "out")[0], steps_of(workplace / "out")[-1]
    print("accuracy by step:", accuracy)
    print(finished.said.splitlines()[-1])
    assert accuracy[STEPS] >= 0.9
    assert last["reward/mean"] > first["reward/mean"] + 0.3
    assert last["engine/serving"] == 2
    times = next(line for line in finished.said.splitlines() if line.startswith("time per step"))
    assert all(f"{phase} " in times for phase in ("rollout", "teacher", "train", "sync"))


def begin(workplace: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=workplace,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    said, _ = process.communicate(timeout=900)
    return Ended(code=process.returncode, said=said)


def servers_of(process: subprocess.Popen[str]) -> list[int]:
    """The first process of each server that a run has started."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [one.pid for one in below if one.cmdline()[1:3] == ["-m", "sglang.launch_server"]]


def runs(pid: int) -> bool:
    """Whether a process is there, and more than what nobody has waited for."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def told_in(run: Path) -> list[dict[str, Any]]:
    """Whole lines of the metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in told_in(run) if "loss/total" in line]


def lines_of(folder: Path) -> list[str]:
    return [line for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]
