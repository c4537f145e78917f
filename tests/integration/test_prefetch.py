"""Rollouts written ahead of training on two real ranks: a rank is killed, the run goes on, and no prompt is missed.

Real processes through the command line, rollouts by the engine in process, a real SIGKILL; see `test_resume`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_distill.data.traces import read_traces
from megatron_distill.errors import DistillError
from megatron_distill.models import checkpoint
from megatron_distill.rollout.base import HoldsWeights
from megatron_distill.rollout.prefetch import GRACE_SECONDS, Prefetch, PrefetchSettings
from megatron_distill.runtime.mesh import Ranks, all_ranks
from megatron_distill.testing.world import Worlds
from megatron_distill.types import Scored
from tests.integration.test_resume import STEPS, command, kill_a_rank, root, steps_of, wait

__all__ = ["root"]
PROMPTS_PER_STEP = 8


@pytest.fixture(scope="module")
def config(root: Path) -> Path:
    """The run of `test_resume`, ahead of training by two batches."""
    text = (root / "run.yaml").read_text()
    changed = text.replace("rollout: {kind: generate,", "rollout: {kind: generate, record: true, prefetch: {depth: 2},")
    changed = changed.replace("train: {", "train: {importance: {weights: truncated}, ")
    assert changed.count("prefetch") == changed.count("importance") == 1
    (root / "run.yaml").write_text(changed)
    return root


@pytest.mark.slow
def test_a_killed_run_goes_on_and_asks_every_prompt_once(config: Path) -> None:
    run = config / "ahead"
    with command(config, "ahead") as process:
        kill_a_rank(process, run)
        assert wait(process).code != 0
    left_at = checkpoint.latest(run)
    assert left_at is not None
    with command(config, "ahead") as process:
        ended = wait(process)
    assert ended.code == 0, ended.err
    written = read_traces(run / "traces")
    groups = [group for step in range(STEPS) for group in dict.fromkeys(one.rollout.group for one in written[step])]
    assert groups == [f"{place:012d}" for place in range(STEPS * PROMPTS_PER_STEP)]
    lines = steps_of(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["rollout/staleness_max"] <= 2 for line in lines)
    assert any(line["rollout/staleness_mean"] > 0 for line in lines)
    resumed_at = int(left_at.name.removeprefix("step_"))
    fresh = lines[resumed_at]
    assert fresh["rollout/staleness_max"] == 0, "the first batch after a resume is written with the resumed weights"
    assert fresh["mismatch/logp_abs_mean"] < 5e-6
    for line in lines:
        stale = line["rollout/staleness_mean"] > 0
        assert (line["mismatch/logp_abs_mean"] > 5e-6) == stale, json.dumps(line)
        assert (abs(line["importance/weight_mean"] - 1) > 1e-6) == stale


class Failing:
    """A source that meets its end on the second rank, while the first one waits for that rank."""

    engine = None

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def next(self, step: int) -> list[Scored]:
        if step == 1 and self.ranks.rank == 1:
            raise OSError("disk full")
        self.ranks.gather_objects(step)
        return []

    def publish(self, student: HoldsWeights, version: int) -> None:
        """Nobody writes."""

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: object) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def ended(settings: PrefetchSettings) -> tuple[str, str, float]:
    ranks = all_ranks()
    source = Prefetch(Failing(ranks.apart()), settings, ranks, 5)
    source.next(0)
    try:
        source.next(1)
    except (DistillError, OSError) as error:
        begin = time.monotonic()
        source.close()
        dist.destroy_process_group()
        return type(error).__name__, str(error), time.monotonic() - begin
    raise AssertionError("no error")


def test_a_failure_of_one_rank_ends_all_with_its_message(worlds: Worlds) -> None:
    (first, text, seconds), (second, own, _) = worlds(2).run(ended, PrefetchSettings(depth=1), timeout=60)
    assert (first, text) == ("DistillError", "rank 1: OSError: disk full")
    assert (second, own) == ("OSError", "disk full")
    assert seconds < GRACE_SECONDS
