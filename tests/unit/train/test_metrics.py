"""Metrics on disk: exact, cut off on resume, and comparable between runs."""

import io
import json
import math

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_distill.config import MetricsSection
from megatron_distill.errors import EngineStopped
from megatron_distill.train.environment import write_environment
from megatron_distill.train.metrics import Metrics, comparable, cut
from megatron_distill.train.progress import progress
from megatron_distill.types import Metric

QUIET = MetricsSection(tensorboard=False, console=False)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder, first, last, section=QUIET, steps=9):
    with Metrics.open(folder, section, rank=0, done=first - 1, steps=steps) as metrics:
        for number in range(first, last + 1):
            with metrics.step(number) as clock:
                with clock("rollout"):
                    pass
                metrics.add(Metric("loss/total", number / 3), Metric("batch/tokens", 100.0))


def test_a_step_is_one_line_with_every_digit(tmp_path):
    run(tmp_path, 1, 2)
    first, second = lines(tmp_path)
    assert first["step"] == 1
    assert second["loss/total"] == 2 / 3
    assert first["time/step_s"] >= first["time/rollout_s"] >= 0
    assert first["perf/tokens_per_s"] > 0


def test_the_same_name_twice_is_pooled_over_its_counts(tmp_path):
    with Metrics.open(tmp_path, QUIET, rank=0, done=0, steps=1) as metrics, metrics.step(1):
        metrics.add(Metric("reward/mean", 3.0, 4.0))
        metrics.add(Metric("reward/mean", 1.0, 12.0))
    assert lines(tmp_path)[0]["reward/mean"] == 0.25


def test_not_a_number_stays_readable_json(tmp_path):
    with Metrics.open(tmp_path, QUIET, rank=0, done=0, steps=1) as metrics:
        metrics.write(1, Metric("a/nan", 0.0, 0.0), Metric("a/inf", math.inf))
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda word: 1 / 0)
    assert math.isnan(float(line["a/nan"]))
    assert float(line["a/inf"]) == math.inf


def test_resume_replaces_what_a_lost_run_wrote(tmp_path):
    run(tmp_path / "whole", 1, 5)
    run(tmp_path / "killed", 1, 4)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/to')
    run(tmp_path / "killed", 3, 5)
    whole, killed = ([comparable(line) for line in lines(tmp_path / name)] for name in ("whole", "killed"))
    assert killed == whole
    assert list(whole[0]) == ["step", "loss/total", "batch/tokens"]


def test_cut_leaves_a_file_that_needs_no_cut_alone(tmp_path):
    run(tmp_path, 1, 2)
    file = tmp_path / "metrics.jsonl"
    before = file.stat().st_ino
    cut(file, 2)
    assert file.stat().st_ino == before
    cut(file, 1)
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert not list(tmp_path.glob("*.partial"))


def test_a_step_that_fails_leaves_no_line(tmp_path):
    with Metrics.open(tmp_path, QUIET, rank=0, done=0, steps=2) as metrics:
        try:
            with metrics.step(1):
                metrics.add(Metric("loss/total", 1.0))
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        with metrics.step(1):
            metrics.add(Metric("loss/total", 2.0))
    assert [line["loss/total"] for line in lines(tmp_path)] == [2.0]


def test_only_the_first_rank_writes(tmp_path):
    metrics = Metrics.open(tmp_path / "run", MetricsSection(), rank=1, done=0, steps=1)
    with metrics, metrics.step(1) as clock, clock("train"):
        metrics.add(Metric("loss/total", 1.0))
    assert not (tmp_path / "run").exists()


def test_tensorboard_forgets_lost_steps_too(tmp_path):
    section = MetricsSection(tensorboard=True, console=False)
    run(tmp_path, 1, 3, section)
    run(tmp_path, 2, 2, section)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2]


def test_a_log_gets_plain_lines_every_so_many_steps():
    out = io.StringIO()
    sink = progress(0, 5, 2, Console(file=out, force_terminal=False, width=20))
    for step in range(1, 6):
        sink.write(step, {"loss/total": 0.5, "optim/grad_norm": 2.0})
    sink.close()
    shown = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in shown] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "loss 0.5  grad norm 2  left 0:00:0" in shown[0]


def test_a_terminal_gets_one_live_line():
    out = io.StringIO()
    sink = progress(0, 5, 1, Console(file=out, force_terminal=True, width=200))
    sink.write(1, {"loss/total": 0.5, "reward/mean": 0.25})
    sink.close()
    assert "1/5" in out.getvalue()
    assert "reward 0.250" in out.getvalue()


def test_a_step_whose_weights_do_not_reach_the_engine_is_told(tmp_path):
    metrics = Metrics.open(tmp_path, QUIET, rank=0, done=0, steps=9)

    def step():
        with metrics.step(1):
            metrics.add(Metric("loss/total", 1.0))
            raise EngineStopped("all servers are gone")

    with metrics, pytest.raises(EngineStopped):
        step()
    assert [line["loss/total"] for line in lines(tmp_path)] == [1.0]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_ends_with_where_its_time_went(terminal):
    out = io.StringIO()
    sink = progress(0, 2, 1, Console(file=out, force_terminal=terminal, width=200))
    for step in (1, 2):
        sink.write(step, {"time/step_s": 2.0, "time/rollout_s": 1.0, "time/train_s": 0.5, "time/sync_s": 0.1 * step})
    sink.write(2, {"eval/avg_at_1": 0.5})
    sink.close()
    told = "time per step 2.00 s: rollout 1.00 s (50%), train 0.50 s (25%), other 0.35 s (18%), sync 0.15 s (8%)"
    assert out.getvalue().splitlines()[-1].endswith(told)


def test_environment_names_versions(tmp_path):
    write_environment(tmp_path)
    told = json.loads((tmp_path / "environment.json").read_text())
    assert told["packages"]["torch"]
    assert set(told) >= {"git_sha", "python", "platform"}
