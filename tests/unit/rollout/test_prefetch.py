"""Rollouts written ahead, by real sources with the engine in this process; a world of threads stands for the ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from megatron_distill.errors import ConfigError, DataError, DistillError, EngineError, EngineStopped
from megatron_distill.rewards.base import Judge, Verdict, Verifier
from megatron_distill.rollout.base import Request, Sampling
from megatron_distill.rollout.prefetch import GRACE_SECONDS, Prefetch, PrefetchSettings
from megatron_distill.rollout.sources.base import Source, Surroundings
from megatron_distill.rollout.sources.generate import Generate
from megatron_distill.types import Scored
from tests.unit.rollout.test_sources import BUILDING, Student, Threads, alone, folder, in_world, surroundings

__all__ = ["folder"]
PART = Generate(samples_per_prompt=2, sampling=Sampling(max_new_tokens=8))
LONG = replace(PART, samples_per_prompt=64, sampling=Sampling(max_new_tokens=200))
"""Takes many seconds to write."""


def ahead(around: Surroundings, ranks: Threads, depth: int = 1, part: Generate = PART) -> tuple[Prefetch, Student]:
    with BUILDING:
        inner, student = part.connect(around), Student(around.student_folder)
    return Prefetch(inner, PrefetchSettings(depth=depth), ranks, around.steps), student


def trained(source: Source, student: Student, steps: range) -> list[list[Scored]]:
    """As the loop does: rollouts, an update, new weights."""
    source.publish(student, steps.start)
    found = []
    for step in steps:
        found.append(source.next(step))
        source.publish(student, step + 1)
    return found


@pytest.mark.parametrize("depth", [1, 2, 20])
def test_batches_are_those_of_a_synchronous_source_with_older_versions(
    folder: Path, tmp_path: Path, depth: int
) -> None:
    around = surroundings(folder, tmp_path, steps=5)
    synchronous = PART.connect(around)
    source, student = ahead(around, alone(), depth)
    expected, actual = trained(synchronous, student, range(5)), trained(source, student, range(5))
    source.close()
    for step, (wanted, found) in enumerate(zip(expected, actual, strict=True)):
        assert [one.rollout.tokens for one in found] == [one.rollout.tokens for one in wanted]
        assert [one.rollout.group for one in found] == [one.rollout.group for one in wanted]
        versions = {version for one in found for version in one.rollout.versions}
        assert len(versions) == 1, "weights change between batches only"
        (version,) = versions
        assert max(step - depth, 0) <= version <= step
        if depth == 1:
            assert version == max(step - 1, 0)


def test_the_state_is_that_of_the_last_batch_handed_over(folder: Path, tmp_path: Path) -> None:
    around = surroundings(folder, tmp_path, steps=6)
    source, student = ahead(around, alone(), depth=3)
    begun = trained(source, student, range(2))
    written_ahead(source)
    state = source.state()
    source.close()
    assert state["position"] == 2 * around.prompts_per_step
    again, student = ahead(around, alone(), depth=3)
    again.restore(state)
    rest = trained(again, student, range(2, 6))
    again.close()
    groups = [group for step in begun + rest for group in dict.fromkeys(one.rollout.group for one in step)]
    assert groups == [f"{place:012d}" for place in range(6 * around.prompts_per_step)], "none lost, none twice"


def written_ahead(source: Prefetch) -> None:
    source.rest()


def test_nothing_is_written_beyond_the_run(folder: Path, tmp_path: Path) -> None:
    around = surroundings(folder, tmp_path, steps=3)
    source, student = ahead(around, alone(), depth=10, part=replace(PART, record=True))
    trained(source, student, range(3))
    source.close()
    assert sorted(file.name for file in (tmp_path / "traces").iterdir()) == [f"step_{n:06d}.jsonl" for n in range(3)]


def test_others_use_the_engine_between_batches_with_the_newest_weights(folder: Path, tmp_path: Path) -> None:
    around = surroundings(folder, tmp_path, steps=4)
    source, student = ahead(around, alone(), depth=2)
    trained(source, student, range(1))
    assert source.engine is not None
    request = Request(tokens=(5, 6), sampling=Sampling(max_new_tokens=4), key=(1,))
    (done,) = source.engine.generate([request])
    assert (done.version, source.engine.version) == (1, 1)
    assert [one.rollout.version for one in source.next(1)] == [0] * 6
    source.close()


def test_the_engine_tells_how_long_a_batch_was_written(folder: Path, tmp_path: Path) -> None:
    source, student = ahead(surroundings(folder, tmp_path, steps=2), alone())
    assert source.engine is not None
    source.publish(student, 0)
    begun = time.perf_counter()
    source.next(0)
    waited = time.perf_counter() - begun
    assert 0.2 * waited < source.engine.figures["writing_s"] < waited
    first = source.engine.figures["writing_s"]
    source.rest()  # the next one is written, and not handed over
    assert source.engine.figures["writing_s"] == first
    source.close()


def test_the_embedded_engine_takes_no_weights_while_it_writes(folder: Path, tmp_path: Path) -> None:
    with BUILDING:
        inner = PART.connect(surroundings(folder, tmp_path))
    with pytest.raises(ConfigError, match=r"on_update=continue: this engine cannot take weights while it writes"):
        Prefetch(inner, PrefetchSettings(depth=1, on_update="continue"), alone(), 3)


@pytest.mark.parametrize(
    ("fields", "message"), [({"depth": -1}, "depth=-1: must be 0"), ({"on_update": "continue"}, "with depth=0 nothing")]
)
def test_settings_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefetchSettings(**fields)


def test_an_error_of_the_thread_is_raised_by_next(folder: Path, tmp_path: Path) -> None:
    """Every reward is 0, so no group is mixed: the source gives up."""
    around = surroundings(folder, tmp_path)
    source, student = ahead(around, alone(), part=replace(PART, keep_groups="mixed", most_rounds=1))
    source.publish(student, 0)
    with pytest.raises(DataError, match=r"step 0: after rollout\.most_rounds=1"):
        source.next(0)
    source.close()


@dataclass(frozen=True, kw_only=True)
class Breaking(Verifier):
    """Breaks on one rank when it is asked for the second time."""

    here: bool
    error: type[Exception]
    needs_answers = False

    def connect(self) -> Judge:
        return Broken(self.here, self.error)


class Broken:
    def __init__(self, here: bool, error: type[Exception]) -> None:
        self.here, self.error, self.asked = here, error, 0

    def score(self, pairs: Any) -> list[Verdict]:
        self.asked += 1
        if self.here and self.asked == 2:
            raise self.error("no verdict")
        return [Verdict(0.0, {}) for _ in pairs]

    def close(self) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("error", "told", "own", "own_text"),
    [
        (ZeroDivisionError, "DistillError", "ZeroDivisionError", "no verdict"),
        (EngineError, "EngineStopped", "EngineStopped", "rank 1: no verdict"),
        (EngineStopped, "EngineStopped", "EngineStopped", "no verdict"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all_and_close_returns(
    folder: Path, tmp_path: Path, error: type[Exception], told: str, own: str, own_text: str
) -> None:
    """The other ranks' threads wait for one that does not come; all agree on whether an engine has stopped."""
    boards: tuple[list[Any], Barrier] = [None, None], Barrier(2, timeout=60)

    def rank(main: Threads) -> tuple[str, str, float]:
        around = surroundings(
            folder, tmp_path, Threads(main.rank, *boards), verifier=Breaking(here=main.rank == 1, error=error)
        )
        source, student = ahead(around, main)
        source.publish(student, 0)
        source.next(0)
        source.publish(student, 1)
        try:
            source.next(1)
        except (DistillError, ZeroDivisionError) as caught:
            begin = time.monotonic()
            source.close()
            return type(caught).__name__, str(caught), time.monotonic() - begin
        raise AssertionError("no error")

    (first, text, seconds), (second, second_text, _) = in_world(2, rank)
    name = f"{error.__name__}: " if error is ZeroDivisionError else ""
    assert (first, text) == (told, f"rank 1: {name}no verdict")
    assert (second, second_text) == (own, own_text)
    assert seconds < GRACE_SECONDS
    boards[1].abort()


def test_close_in_the_middle_of_a_batch_returns_soon(folder: Path, tmp_path: Path) -> None:
    around = surroundings(folder, tmp_path, prompts_per_step=5)
    source, student = ahead(around, alone(), part=replace(LONG, samples_per_prompt=1))
    source.publish(student, 0)
    source.next(0)
    begin = time.monotonic()
    source.close()
    assert time.monotonic() - begin < GRACE_SECONDS


def test_ranks_agree_on_the_batch_behind_which_weights_change(folder: Path, tmp_path: Path) -> None:
    boards: tuple[list[Any], Barrier] = [None, None], Barrier(2, timeout=60)

    def rank(main: Threads) -> list[list[tuple[int, int]]]:
        around = surroundings(folder, tmp_path, Threads(main.rank, *boards), steps=6)
        source, student = ahead(around, main, depth=3)
        found = trained(source, student, range(6))
        source.close()
        return [[(one.rollout.version, len(one.rollout.tokens)) for one in step] for step in found]

    first, second = in_world(2, rank)
    assert first == second
    for step, written in enumerate(first):
        versions: Mapping[int, int] = {version: 1 for version, _ in written}
        assert len(versions) == 1, "one version on all ranks"
        assert step - 3 <= min(versions) <= step
