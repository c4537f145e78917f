"""`make quickstart`: make a task, then call on it the commands that anybody calls, and see whether it worked.

Every phase is a command that is printed before it runs, so that it can be repeated by hand. The folder is emptied
first: each call starts afresh. Nothing of the package is imported here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

PROJECT = Path(__file__).parents[2]
FOLDER = Path("runs/quickstart")
"""The configs name it, so it is fixed."""
NEEDED_GAIN = 0.20
NEEDED_SHARE_OF_GAP = 0.5
MODELS = {"teacher": "teacher", "student_before": "student", "student_after": "distilled"}
"""Exported model folder, and the run that it comes from."""

DISTILLATIONS = {"embedded": "distill", "sglang": "sglang"}
"""By engine: the config of the distillation."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One command and what it is for."""

    title: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What summary.json holds."""

    accuracy: Mapping[str, float]
    """By exported model: the share of held-out problems that it solves, greedily."""
    held_out_problems: int
    gain: float
    gap_closed: float
    """Share of the way from student to teacher."""
    passed: bool
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase, and `total`."""

    @staticmethod
    def of(accuracy: Mapping[str, float], problems: int, seconds: Mapping[str, float]) -> Summary:
        """Hold the accuracies against what the quickstart promises."""
        gain = accuracy["student_after"] - accuracy["student_before"]
        gap = accuracy["teacher"] - accuracy["student_before"]
        closed = gain / gap if gap > 0 else 0.0
        return Summary(
            accuracy=dict(accuracy),
            held_out_problems=problems,
            gain=gain,
            gap_closed=closed,
            passed=gain >= NEEDED_GAIN and closed >= NEEDED_SHARE_OF_GAP,
            seconds=dict(seconds),
        )


def phases(seed: int, engine: str = "embedded") -> list[Phase]:
    """All commands in order; `engine` writes the distillation's rollouts."""
    return [
        Phase("make task", _python("tools.quickstart.task", str(FOLDER), "--seed", str(seed))),
        *_model("train teacher", "teacher", "teacher", seed),
        *_model("train student", "student", "student_before", seed),
        *_model("distill", DISTILLATIONS[engine], "student_after", seed),
        Phase("reload with transformers", _python("tools.quickstart.reload", str(_export("student_after")))),
    ]


def _model(title: str, config: str, name: str, seed: int) -> list[Phase]:
    """Train by configs/quickstart/`config`.yaml, export as `name`, evaluate."""
    path = f"configs/quickstart/{config}.yaml"
    run, output = FOLDER / MODELS[name], FOLDER / "eval" / f"{name}.json"
    shown = name.replace("_", " ")
    return [
        Phase(title, _distill("train", path, f"train.seed={seed}")),
        Phase(f"export {shown}", _python("tools.convert", "to-hf", f"{run}/checkpoints/latest", str(_export(name)))),
        Phase(f"evaluate {shown}", _distill("eval", str(_export(name)), "--config", path, "--output", str(output))),
    ]


def _export(name: str) -> Path:
    return FOLDER / "exports" / name


def _python(module: str, *words: str) -> tuple[str, ...]:
    return ("python", "-m", module, *words)


def _distill(*words: str) -> tuple[str, ...]:
    return ("megatron-distill", *words)


def perform(phase: Phase, console: Console) -> float:
    """Run a phase; the seconds it took.

    Raises:
        SystemExit: the command failed; with its exit code.
    """
    words = [_newest(word) if word.endswith("/checkpoints/latest") else word for word in phase.command]
    beside = Path(sys.executable).parent
    console.rule(phase.title, align="left")
    console.print(
        f"$ {shlex.join([f'.venv/bin/{words[0]}', *words[1:]])}", style="bold", highlight=False, soft_wrap=True
    )
    started = time.monotonic()
    code = subprocess.run([str(beside / words[0]), *words[1:]], cwd=PROJECT, check=False).returncode
    if code != 0:
        console.print(f"quickstart: {phase.title!r} failed with exit code {code}; the command is above", style="red")
        raise SystemExit(code if code > 0 else 1)
    return time.monotonic() - started


def _newest(latest: str) -> str:
    """The newest complete checkpoint in the folder of a path that ends in `latest`."""
    folder = Path(latest).parent
    found = sorted(mark.parent for mark in (PROJECT / folder).glob("step_*/COMPLETE"))
    return str(folder / found[-1].name) if found else latest


def accuracies() -> tuple[dict[str, float], int]:
    """What `eval` wrote: accuracy by model, and the number of problems."""
    found = {name: json.loads((PROJECT / FOLDER / "eval" / f"{name}.json").read_text()) for name in MODELS}
    return {name: told["metrics"]["eval/avg_at_1"] for name, told in found.items()}, found["teacher"]["problems"]


def show(summary: Summary, console: Console) -> None:
    """The table at the end, and where to look next."""
    table = Table("model", f"accuracy on {summary.held_out_problems} held-out problems")
    for name, accuracy in summary.accuracy.items():
        table.add_row(name.replace("_", " "), f"{accuracy:.1%}")
    times = Table("phase", "seconds")
    for name, seconds in summary.seconds.items():
        times.add_row(name, f"{seconds:.0f}", style="bold" if name == "total" else None)
    console.rule("result", align="left")
    console.print(table, times)
    verdict = (
        "" if summary.passed else f"; MISSED: at least +{NEEDED_GAIN:.0%} and {NEEDED_SHARE_OF_GAP:.0%} of the gap"
    )
    console.print(
        f"student {summary.gain:+.1%}, {summary.gap_closed:.0%} of the gap to the teacher closed{verdict}",
        style="green" if summary.passed else "red",
        highlight=False,
    )
    console.print(
        f"""where to look next
  {FOLDER}/summary.json                 these numbers
  {FOLDER}/distilled/metrics.jsonl      every step of the distillation; also
      .venv/bin/tensorboard --logdir {FOLDER}
  configs/quickstart/distill.yaml            the run as a config: change objective.kind to gkd and train again
  .venv/bin/megatron-distill train --help    every field of a config
  docs/guides/quickstart.md                  what happened, step by step; README.md: your own data""",
        highlight=False,
        soft_wrap=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 only if the student came as near to its teacher as promised."""
    parser = argparse.ArgumentParser(description="a whole distillation on two processes, from data to exported model")
    parser.add_argument("--seed", type=int, default=1, help="another seed: other problems, other weights")
    parser.add_argument(
        "--engine",
        choices=sorted(DISTILLATIONS),
        default="embedded",
        help="what writes the rollouts: a model in the run's own processes, or two SGLang servers (make sglang)",
    )
    chosen = parser.parse_args(arguments)
    console = Console()
    if (PROJECT / FOLDER).exists():
        console.print(f"quickstart: {FOLDER} is there already; starting afresh", highlight=False)
        shutil.rmtree(PROJECT / FOLDER)
    seconds: dict[str, float] = {}
    for phase in phases(chosen.seed, chosen.engine):
        seconds[phase.title] = perform(phase, console)
    seconds["total"] = sum(seconds.values())
    summary = Summary.of(*accuracies(), seconds)
    (PROJECT / FOLDER / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    show(summary, console)
    return 0 if summary.passed else 1


if __name__ == "__main__":
    sys.exit(main())
