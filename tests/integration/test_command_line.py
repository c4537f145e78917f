"""`train` and `eval` as a person runs them: their ranks, the run folder, exit codes, one line when it goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.train.metrics import comparable

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, data and a config."""
    root = tmp_path_factory.mktemp("command_line")
    tiny_tokenizer(tiny_model(root / "student", "qwen2", hidden=32))
    tiny_tokenizer(tiny_model(root / "teacher", "llama", hidden=64))
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(12)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "run.yaml").write_text("""
base: [base, objectives/opd]
student: {model: student}
teachers: {big: {kind: frozen, model: teacher}}
reward: {kind: exact}
rollout: {record: true, sampling: {max_new_tokens: 6}}
data: {prompts: data.jsonl}
eval: {data: {prompts: data.jsonl, limit: 5}, samples: 2, pass_at: [1, 2], sampling: {max_new_tokens: 6}}
train: {steps: 2, prompts_per_step: 4}
parallel: {tp: 2}
paths: {run: out}
""")
    return root


COMMAND = [sys.executable, "-m", "megatron_distill.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


def command(workplace: Path, *words: str) -> subprocess.CompletedProcess[str]:
    run = [*COMMAND, *words]
    return subprocess.run(run, capture_output=True, text=True, cwd=workplace, env=ENVIRONMENT, timeout=250)


def test_a_run_from_its_first_step_to_its_evaluation(workplace: Path) -> None:
    done = command(workplace, "train", "run.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 2/2  loss " in done.stdout
    run = workplace / "out"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "environment.json", "logs", "checkpoints"}
    before = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in before] == [1, 2]

    # the resolved config goes on with the run, on other parallel sizes
    more = command(workplace, "train", "out/config.yaml", "parallel.tp=1", "train.steps=3")
    assert more.returncode == 0, more.stderr
    assert "going on from out/checkpoints/step_000002" in more.stdout
    after = (run / "metrics.jsonl").read_text().splitlines()
    assert after[:2] == before
    assert [json.loads(line)["step"] for line in after] == [1, 2, 3]
    assert comparable(json.loads(after[2])).keys() == comparable(json.loads(after[0])).keys()

    evaluated = command(workplace, "eval", "out", "parallel.dp=2", "--output", "report.json", "--responses", "answers")
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    report = json.loads((workplace / "report.json").read_text())
    assert report["model"] == "out/checkpoints/step_000003"
    assert report["problems"] == 5
    assert 0 <= report["metrics"]["eval/avg_at_2"] <= report["metrics"]["eval/pass_at_2"] <= 1
    (answers,) = (workplace / "answers").iterdir()
    assert len(answers.read_text().splitlines()) == 10


@pytest.mark.slow
def test_what_only_a_rank_can_find_is_still_one_line(workplace: Path) -> None:
    traces = workplace / "two_steps"
    first = ["rollout.record=true", "paths.run=recorded", "parallel.tp=1"]
    assert command(workplace, "train", "run.yaml", *first).returncode == 0
    (workplace / "recorded" / "traces").rename(traces)
    replay = ["rollout={kind: replay, path: two_steps}", "paths.run=replayed"]
    done = command(workplace, "train", "run.yaml", *replay, "optimizer.lr=1e30", "optimizer.warmup_steps=0")
    assert done.returncode == 2
    (told,) = done.stderr.splitlines()
    assert told.startswith("error: loss nan, gradient norm nan: not finite, weights are left as they were")
    (line,) = (workplace / "replayed" / "metrics.jsonl").read_text().splitlines()
    recorded, _ = (workplace / "recorded" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss/total"] == pytest.approx(json.loads(recorded)["loss/total"], rel=1e-5)


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_run_is_one_word(workplace: Path) -> None:
    words = ["train", "run.yaml", "train.steps=100000", "paths.run=stopped"]
    run = subprocess.Popen(
        [*COMMAND, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=workplace,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    metrics = workplace / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: the command and all that it started
    _, told = run.communicate(timeout=60)
    assert (run.returncode, told) == (130, "stopped\n")
