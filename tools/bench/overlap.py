"""`python -m tools.bench.overlap`: a step with rollouts written ahead, against the longer half of a step without.

A real SGLang server writes on one core while the trainer learns on another. The same run is made twice by the ordinary
command: synchronous, where a step is rollout and then all the rest (teacher, training, weights to the server), and
with `rollout.prefetch.depth=1`, where the two should hide each other. Nothing can be faster than the longer of them.
The handing over of weights is hidden by neither, for both sides take part in it: a step is max(rollout, training) +
sync at best. So where rollouts are the longer half, sync must be short next to them; the built-in case has a teacher
larger than the student, as is usual, and training is meant to be the longer half. SETTINGs make other cases.

    share = seconds of a step with depth 1 / max(rollout, the rest) of a synchronous step

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
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_distill.rollout.servers import ServerGroup, ServerSettings
from megatron_distill.runtime.processes import cores
from tools.bench.machine import write_results
from tools.bench.rollout import forget_the_end
from tools.bench.step import WARM_UP, Case, Size, measure, prepare

BAR = 1.1
"""Most that a step with depth 1 may take, as a share of the longer half of a synchronous step."""
SIZE = Size(hidden=128, layers=4, teacher_hidden=512, teacher_layers=4, vocab=2048, prompts=16, new_tokens=128)
SAMPLES = 4
"""Responses to each prompt."""


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
                found = compare(str(config), group.urls[0], chosen.steps, chosen.overrides)
    found = {"cores": {"server": server, "trainer": trainer}, "size": asdict(SIZE) | {"samples": SAMPLES}, **found}
    console.print(describe(found), highlight=False)
    if not chosen.no_write:
        path = write_results("overlap", found)
        console.print(f"written: {path.relative_to(Path(__file__).parents[2])}", highlight=False)
    return 0 if found["passed"] else 1


def compare(config: str, url: str, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The run without and with rollouts ahead, and what a step of the second takes of the longer half of the first."""
    served = [f"rollout.engine={{kind: sglang, urls: ['{url}']}}", f"rollout.samples_per_prompt={SAMPLES}", *overrides]
    synchronous = measure(config, [*served, "rollout.prefetch.depth=0"], steps)
    ahead = measure(config, [*served, "rollout.prefetch.depth=1"], steps)
    rollout = synchronous["phases_s"]["rollout"]
    longer = max(rollout, synchronous["step_s"] - rollout)
    share = ahead["step_s"] / longer
    return {
        "clock": f"wall, medians over {steps - WARM_UP} steps",
        "server": "one SGLang server on the same machine",
        "synchronous": synchronous,
        "depth_1": ahead,
        "rollout_s": round(rollout, 4),
        "rest_s": round(synchronous["step_s"] - rollout, 4),
        "step_s_with_depth_1": round(ahead["step_s"], 4),
        "share_of_longer": round(share, 4),
        "bar": BAR,
        "passed": share <= BAR,
    }


def describe(found: dict[str, Any]) -> str:
    """The figures in words."""
    return (
        f"a synchronous step: rollout {found['rollout_s']:.2f} s, the rest {found['rest_s']:.2f} s; with depth 1: "
        f"{found['step_s_with_depth_1']:.2f} s, {found['share_of_longer']:.3f} of the longer (bar {found['bar']}): "
        f"{'met' if found['passed'] else 'MISSED'}"
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
    parser.add_argument("--steps", type=int, default=10, help=f"default 10; the first {WARM_UP} do not count")
    parser.add_argument("--cores", type=int, nargs=2, metavar="CORE", help="the server's and the trainer's")
    parser.add_argument("--no-write", action="store_true", help="print, and leave the results file as it is")
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="such as rollout.sampling.max_new_tokens=64")
    return parser


if __name__ == "__main__":
    sys.exit(main())
