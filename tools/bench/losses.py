"""`python -m tools.bench.losses`: our losses against other people's, as ratios, and against the bars they have to meet.

Each loss of a shape has a process of its own for times (heap retained, methods interleaved), and each shape one for
memory. The exit status is 0 if every bar was met, 1 if not; `--no-gate` only prints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.bench import report
from tools.bench.machine import facts, one_thread, read_results, retain_heap, write_results
from tools.bench.work import Hidden, Logits, Shape

SMALL = [
    Shape(rows=512, vocab=32768),
    Shape(rows=512, vocab=32768, dtype="bfloat16"),
    Shape(rows=1024, vocab=32768, hidden=512, teacher_hidden=1024, chunk=128),
    Shape(rows=1024, vocab=32768, hidden=512, teacher_hidden=1024, chunk=1024),
]
LARGE = [
    Shape(rows=1024, vocab=151936),
    Shape(rows=1024, vocab=151936, hidden=512, teacher_hidden=1024, chunk=128),
]
SETS = {
    "quick": SMALL[:1],
    "logits": SMALL[:2],
    "linear": SMALL[2:],
    "large-logits": LARGE[:1],
    "large-linear": LARGE[1:],
    "full": SMALL + LARGE,
}
ROUNDS = 5
_TIMEOUT_S = 3600
_PROJECT = Path(__file__).parents[2]
_SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compilers beside what is measured
    "MALLOC_MMAP_THRESHOLD_": str(2**20),  # freed tensors go back to the system, where the heap is not retained
    "KINETO_LOG_LEVEL": "99",
    # ranks that counted collectives are killed when they are done, and said to have leaked what they held
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON."""
    chosen = _parser().parse_args(argv)
    if chosen.child:
        return _child(chosen.child)
    console = Console(width=None if sys.stdout.isatty() else 160)
    os.environ |= _SURROUNDINGS
    from tools.bench.collectives import count

    comparisons, counts = [], count()
    for shape in SETS[chosen.set]:
        console.print(f"measuring {shape.name}", style="dim")
        found = measure(shape, chosen.rounds, chosen.losses)
        report.show_methods(found, console)
        comparisons += found
        if not chosen.no_write:  # after each shape: what was measured is kept, whatever happens later
            # what was measured before on this kind of machine stays, where it was not measured again
            write_results("losses", report.assemble(report.merged(read_results("losses"), found), counts))
    whole = report.assemble(comparisons, counts)
    report.show_bars(whole, console)
    return 0 if whole["passed"] or chosen.no_gate else 1


def measure(shape: Shape, rounds: int, losses: list[str] | None) -> list[dict[str, Any]]:
    """Times, each loss in a process of its own, then memory in another; one entry per loss."""
    from tools.bench.comparisons import LINEAR_LOSSES, LOGIT_LOSSES

    timed: dict[str, Any] = {}
    for loss in LINEAR_LOSSES if shape.hidden else LOGIT_LOSSES:
        # the heap is retained, and one loss leaves it in pieces that are no use to the next
        if not losses or loss in losses:
            timed |= _spawn({"measure": "time", "shape": asdict(shape), "rounds": rounds, "losses": [loss]})
    admitted = {loss: [name for name, told in of.items() if not told["refused"]] for loss, of in timed.items()}
    weighed = _spawn({"measure": "memory", "shape": asdict(shape), "admitted": admitted})
    for loss, of in weighed.items():
        for name, told in of.items():
            timed[loss][name] |= told
    known = facts()
    when = {name: known[name] for name in ("date", "git_revision", "git_changed")} | {"rounds": rounds}
    return [{"shape": asdict(shape), "loss": loss, "measured": when, "methods": of} for loss, of in timed.items()]


def _spawn(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a fresh process.

    Raises:
        SystemExit: it failed; its own message is above.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        words = [sys.executable, "-m", "tools.bench.losses", "--child", json.dumps(job | {"output": str(output)})]
        done = subprocess.run(words, cwd=_PROJECT, timeout=_TIMEOUT_S)
        if done.returncode != 0:
            raise SystemExit(f"bench: measuring {job['measure']} of {job['shape']} failed with {done.returncode}")
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found


def _child(text: str) -> int:
    """One job: a shape's times, or its memory."""
    job = json.loads(text)
    one_thread()
    if job["measure"] == "time":
        retain_heap()
    from tools.bench import comparisons

    shape = Shape(**job["shape"])
    inputs = Hidden(shape) if shape.hidden else Logits(shape)
    losses = comparisons.LINEAR_LOSSES if shape.hidden else comparisons.LOGIT_LOSSES
    found = {}
    with comparisons.alone():
        for loss in losses:
            if job["measure"] == "memory":
                if loss in job["admitted"]:
                    found[loss] = comparisons.weigh(shape, loss, inputs, set(job["admitted"][loss]))
            elif loss in job["losses"]:
                found[loss] = comparisons.compare(shape, loss, inputs, job["rounds"])
    Path(job["output"]).write_text(json.dumps(found), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.losses", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--set", choices=list(SETS), default="full", help="which shapes (default full: half an hour)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--losses", nargs="*", help="only these")
    parser.add_argument("--no-write", action="store_true", help="print, and leave the results file as it is")
    parser.add_argument("--no-gate", action="store_true", help="exit status 0 whatever was measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
