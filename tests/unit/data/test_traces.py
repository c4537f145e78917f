import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_distill.data.traces import read_traces, write_traces
from megatron_distill.errors import DataError
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop


def example(sample: int, reward: float | None, logprobs: tuple[float, ...] | None) -> Scored:
    prompt = Prompt(
        id="0-abc",
        messages=({"role": "user", "content": "wie weit? ≥ 5 ≤ x"},),
        tokens=(1, 2, 3),
        answer="5",
        hints={"solution": "line\nline"},
        source="train",
    )
    origin = (Origin.TEACHER, Origin.STUDENT, Origin.STUDENT) if sample else (Origin.STUDENT,) * 3
    rollout = Rollout(
        prompt=prompt,
        group="000000000001",
        sample=sample,
        tokens=(4, 5, 6),
        logprobs=logprobs,
        temperature=None if logprobs is None else 0.7,
        origin=origin,
        stop=Stop.LENGTH,
        version=7,
        text="\u2028 text",
    )
    return Scored(rollout=rollout, reward=reward, facts={"reward/answered": 1.0})


STEP = [example(0, 1 / 3, (-math.pi, -1e-300, -0.1)), example(1, None, None)]


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = write_traces(tmp_path / "traces", 3, STEP)
    write_traces(tmp_path / "traces", 12, STEP[:1])
    assert read_traces(tmp_path / "traces") == {3: STEP, 12: STEP[:1]}
    assert read_traces(path) == {3: STEP}


def test_versions_are_kept_per_token_and_written_in_runs(tmp_path: Path) -> None:
    first = STEP[0].rollout
    mixed = replace(STEP[0], rollout=replace(first, version=6, versions=(6, 7, 7)))
    path = write_traces(tmp_path, 3, [mixed, STEP[1]])
    assert [json.loads(line)["version"] for line in path.read_text().split("\n")[:-1]] == [[[6, 1], [7, 2]], 7]
    assert read_traces(path) == {3: [mixed, STEP[1]]}
    assert [one.rollout.versions for one in read_traces(path)[3]] == [(6, 7, 7), (7, 7, 7)]


def test_traces_of_before_say_no_temperature(tmp_path: Path) -> None:
    path = write_traces(tmp_path, 3, STEP[:1])
    path.write_text(path.read_text().replace('"temperature": 0.7, ', ""))
    assert read_traces(path) == {3: [replace(STEP[0], rollout=replace(STEP[0].rollout, temperature=None))]}


def test_version_is_the_oldest_of_the_tokens() -> None:
    first = STEP[0].rollout
    with pytest.raises(AssertionError, match="version=7: must be the oldest"):
        replace(first, versions=(6, 7, 7))
    with pytest.raises(AssertionError, match="2 versions for 3 tokens"):
        replace(first, versions=(7, 7))


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    write_traces(tmp_path, 3, STEP)
    write_traces(tmp_path, 3, STEP[1:])
    assert read_traces(tmp_path) == {3: STEP[1:]}


def test_half_written_step_of_a_killed_run_is_not_read(tmp_path: Path) -> None:
    write_traces(tmp_path, 3, STEP)
    (tmp_path / "step_000004.jsonl.partial").write_text('{"step": 4, "tok')
    assert list(read_traces(tmp_path)) == [3]
    write_traces(tmp_path, 4, STEP)
    assert list(read_traces(tmp_path)) == [3, 4]


def test_broken_traces_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no recorded rollouts"):
        read_traces(tmp_path)
    path = write_traces(tmp_path, 3, STEP)
    text = path.read_text()
    path.write_text(text[:-40])
    with pytest.raises(DataError, match=r"step_000003\.jsonl:2: not valid JSON"):
        read_traces(path)
    path.write_text(text.replace('"tokens": [4, 5, 6], ', ""))
    with pytest.raises(DataError, match=r"step_000003\.jsonl:1: not a recorded rollout: 'tokens' is missing"):
        read_traces(path)
    path.write_text(text.replace('"stop": "length"', '"stop": "tired"'))
    with pytest.raises(DataError, match=r":1: not a recorded rollout: 'tired' is not a valid Stop"):
        read_traces(path)
