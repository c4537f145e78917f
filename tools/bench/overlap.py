"""`python -m tools.bench.overlap`: a step with rollouts written ahead, against the longer of its two halves.

A real SGLang server writes on one core while the trainer learns on another, with `rollout.prefetch.depth=1`: writing
the next batch and all the rest (teacher, training) should hide each other, and nothing can be faster than the longer of
them. The handing over of weights is hidden by neither, for both sides take part in it: a step is max(writing, the rest)
+ sync at best. Both halves and the step are of the same seconds, since these machines change their speed within them:

    share = seconds from one hand-over of weights to the next / max(writing, the rest), in the same step

What that cannot see is one side making the other slower. So the same run is made synchronous too, where a step is
rollout and then all the rest, in interleaved rounds, and a step with depth 1 is told as a share of its longer half as
well, under the same bar. That share also holds what cores take from each other's caches and memory: two programs that
have nothing to do with each other would not reach 1 either.

Both cores must be idle otherwise. `make sglang` sets up what runs the server.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from megatron_distill.rollout.servers import ServerGroup, ServerSettings
from megatron_distill.runtime.processes import cores
from tools.bench.machine import write_results
from tools.bench.rollout import forget_the_end
from tools.bench.step import WARM_UP, Case, Line, Size, prepare, summarise, train
from tools.bench.timing import order

BAR = 1.1
"""Most that a step with depth 1 may take, as a share of the longer of its halves, and of a synchronous step's."""
SIZE = Size(hidden=128, layers=4, teacher_hidden=512, teacher_layers=4, vocab=2048, prompts=16, new_tokens=128)
SAMPLES = 4
"""Responses to each prompt."""
WRITING = "engine/writing_s"
ROUNDS, STEPS = 5, 6
"""Runs of each way, and the steps of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON."""
    chosen = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    server, trainer = chosen.cores or (cores()[0], cores()[-1])
    if server == trainer:
        raise SystemExit("bench: server and trainer need a core each, this process may use one alone")
    with tempfile.TemporaryDirectory() as name:
        case = Case(name="overlap", size=SIZE, parallel={}, objective="opd")
        config = prepare(case, Path(name))
        forget_the_end(Path(name) / "student")
        settings, model = ServerSettings(max_total_tokens=65536), Path(name) / "student"
        with ExitStack() as stack:
            with pinned(server):
                group = stack.enter_context(ServerGroup(settings, model, "cpu", name="bench", logs=Path(name)))
            with pinned(trainer):
                found = compare(str(config), group.urls[0], chosen.rounds, chosen.steps, chosen.overrides)
    found = {"cores": {"server": server, "trainer": trainer}, "size": asdict(SIZE) | {"samples": SAMPLES}, **found}
    console.print(describe(found), highlight=False)
    if not chosen.no_write:
        path = write_results("overlap", found)
        console.print(f"written: {path.relative_to(Path(__file__).parents[2])}", highlight=False)
    return 0 if found["passed"] else 1


def compare(config: str, url: str, rounds: int, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Runs with rollouts ahead and without, and what a step of the first takes of the longer half of each."""
    served = [f"rollout.engine={{kind: sglang, urls: ['{url}']}}", f"rollout.samples_per_prompt={SAMPLES}", *overrides]
    found: dict[int, list[list[Line]]] = {0: [], 1: []}
    for number in range(rounds):
        for depth in order(list(found), number):
            found[depth].append(train(config, [*served, f"rollout.prefetch.depth={depth}"], steps))
    of_one = [median(shares(run)) for run in found[1]]
    # nothing is written beside the last step of a run
    alone, ahead = (summarise([line for run in runs for line in run[:-1]]) for runs in found.values())
    rollout = alone["phases_s"]["rollout"]
    rest = alone["step_s"] - rollout
    share = median([share for run in found[1] for share in shares(run)])
    alone_share = ahead["step_s"] / max(rollout, rest)
    return {
        "clock": f"wall, medians over {rounds} interleaved rounds of {steps - WARM_UP - 1} steps",
        "server": "one SGLang server on the same machine",
        "synchronous": alone,
        "depth_1": ahead | {"writing_s": median([line[WRITING] for run in found[1] for line in run])},
        "share_of_longer": round(share, 4),
        "share_of_longer_by_round": [round(one, 4) for one in of_one],
        "share_of_longer_alone": round(alone_share, 4),
        "bar": BAR,
        "passed": max(share, alone_share) <= BAR,
    }


def shares(run: Sequence[Line]) -> list[float]:
    """By step of a run with depth 1: from one hand-over of weights to the next, over the longer half."""
    return [_share(this, following) for this, following in pairwise(run)]


def _share(this: Line, following: Line) -> float:
    # the batch that is written beside a step is handed over, and waited for, at the beginning of the following one
    rest = this["time/step_s"] - this["time/rollout_s"]
    return (rest + following["time/rollout_s"]) / max(following[WRITING], rest)


def describe(found: dict[str, Any]) -> str:
    """The figures in words."""
    alone, ahead = found["synchronous"], found["depth_1"]
    rollout, waited = alone["phases_s"]["rollout"], ahead["phases_s"]["rollout"]
    verdicts = [
        "met" if found[name] <= found["bar"] else "MISSED" for name in ("share_of_longer", "share_of_longer_alone")
    ]
    return (
        f"with depth 1: writing {ahead['writing_s']:.2f} s, the rest {ahead['step_s'] - waited:.2f} s, a step "
        f"{ahead['step_s']:.2f} s: {found['share_of_longer']:.3f} of the longer (bar {found['bar']}): "
        f"{verdicts[0]}\n"
        f"synchronous: rollout {rollout:.2f} s, then the rest {alone['step_s'] - rollout:.2f} s: a step with depth 1 "
        f"takes {found['share_of_longer_alone']:.3f} of the longer, which had the machine to itself: {verdicts[1]}"
    )


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This process, and those that it starts here, run on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.overlap", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"default {STEPS}; the first {WARM_UP} and the last do not count"
    )
    parser.add_argument("--cores", type=int, nargs=2, metavar="CORE", help="the server's and the trainer's")
    parser.add_argument("--no-write", action="store_true", help="print, and leave the results file as it is")
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="such as rollout.sampling.max_new_tokens=64")
    return parser


if __name__ == "__main__":
    sys.exit(main())
