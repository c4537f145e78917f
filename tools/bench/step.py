"""`python -m tools.bench.step`: whole training steps by phase, tokens per second and peak memory.

Each case is a real run of `megatron-distill train` in a temporary folder, and the figures are those that the run writes
of itself: rollout, pack, teacher, score, train, sync. Models have random weights and real shapes; they are small, so
that a step takes seconds on a CPU. `--config` measures a run of your own instead.

These are seconds on this machine, of all its cores, and not ratios: compare them with themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tools.bench.machine import write_results

type Line = Mapping[str, float]
"""What metrics.jsonl says of a step."""
PHASES = ("rollout", "pack", "teacher", "score", "train", "sync")
STEPS, WARM_UP = 6, 2
"""Steps of each run, and how many at its beginning are not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Student and teacher of a case, and how much they have to do."""

    hidden: int
    layers: int
    teacher_hidden: int
    teacher_layers: int
    vocab: int
    prompts: int
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run."""

    name: str
    size: Size
    parallel: Mapping[str, int]
    objective: str
    settings: tuple[str, ...] = ()


_TINY = Size(hidden=64, layers=2, teacher_hidden=128, teacher_layers=4, vocab=1024, prompts=8, new_tokens=32)
_SMALL = Size(hidden=256, layers=4, teacher_hidden=512, teacher_layers=6, vocab=32768, prompts=8, new_tokens=64)
CASES = [
    Case(name="tiny, opd", size=_TINY, parallel={}, objective="opd"),
    Case(name="small, opd", size=_SMALL, parallel={}, objective="opd"),
    Case(name="small, opd, TP=2", size=_SMALL, parallel={"tp": 2}, objective="opd"),
    Case(name="small, gkd", size=_SMALL, parallel={}, objective="gkd"),
    Case(name="small, gkd, TP=2", size=_SMALL, parallel={"tp": 2}, objective="gkd"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON."""
    chosen = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if chosen.config:
        found = summarise(train(chosen.config, chosen.overrides, chosen.steps))
        console.print(_table([{"name": chosen.config, **found}]))
        return 0
    runs = []
    for case in CASES:
        if chosen.only and chosen.only not in case.name:
            continue
        console.print(f"measuring {case.name}", style="dim")
        with tempfile.TemporaryDirectory() as folder:
            config = prepare(case, Path(folder))
            found = summarise(train(str(config), [*case.settings, *chosen.overrides], chosen.steps))
        runs.append({"name": case.name, "parallel": case.parallel, "size": asdict(case.size), **found})
    console.print(_table(runs))
    if not chosen.no_write:
        steps = {"counted": chosen.steps - WARM_UP, "not_counted": WARM_UP}
        path = write_results("step", {"clock": "wall, medians over steps", "steps": steps, "runs": runs})
        console.print(f"written: {path.relative_to(Path(__file__).parents[2])}", highlight=False)
    return 0


def prepare(case: Case, folder: Path) -> Path:
    """Models, prompts and the config of a case, in `folder`: the config's path."""
    from transformers.utils import logging

    from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer

    logging.disable_progress_bar()
    size = case.size
    questions = [f"What is {one} + {two}?" for one in range(10, 26) for two in range(10, 26)]
    widths = {"student": (size.hidden, size.layers), "teacher": (size.teacher_hidden, size.teacher_layers)}
    for seed, (name, (hidden, layers)) in enumerate(widths.items()):
        tiny_model(folder / name, "qwen3", vocab_size=size.vocab, hidden=hidden, layers=layers, seed=seed)
        tiny_tokenizer(folder / name, questions)
    rows = (json.dumps({"question": question, "answer": "#### 1"}) for question in questions)
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = {
        "base": ["base", f"objectives/{case.objective}"],
        "student": {"model": str(folder / "student")},
        "teachers": {"main": {"kind": "frozen", "model": str(folder / "teacher")}},
        "data": {"prompts": str(folder / "prompts.jsonl"), "answer_after": "####"},
        "rollout": {"sampling": {"max_new_tokens": size.new_tokens}},
        "train": {"prompts_per_step": size.prompts},
        "parallel": dict(case.parallel),
        "paths": {"run": str(folder / "run")},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def train(config: str, overrides: Sequence[str], steps: int) -> list[Line]:
    """Train `steps` steps by a config, in a run folder of the bench's own: what it says of the steps that count.

    Raises:
        SystemExit: the run failed; its own message is above.
    """
    assert steps > WARM_UP, f"steps={steps}: the first {WARM_UP} are not counted"
    with tempfile.TemporaryDirectory() as folder:
        own = (f"train.steps={steps}", f"paths.run={folder}/run", "checkpoint.every=0", "metrics.console=false")
        words = [sys.executable, "-m", "megatron_distill.cli", "train", config, *overrides, *own]
        quiet = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(words, env=os.environ | quiet, stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            raise SystemExit(f"bench: training by {config} failed with {done.returncode}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return counted([json.loads(line) for line in lines])


def counted(lines: Sequence[Line]) -> list[Line]:
    """Those of a metrics.jsonl that tell of a step, but for the first ones."""
    return [line for line in lines if line["step"] > WARM_UP and "time/step_s" in line]


def summarise(lines: Sequence[Line]) -> dict[str, Any]:
    """Medians over steps, of the lines of a metrics.jsonl."""

    def median(name: str) -> float:
        return statistics.median(float(line[name]) for line in lines)

    return {
        "steps": len(lines),
        "tokens": median("batch/tokens"),
        "tokens_per_s": median("perf/tokens_per_s"),
        "step_s": median("time/step_s"),
        "phases_s": {phase: median(f"time/{phase}_s") for phase in PHASES},
        "peak_gib": max(float(line["memory/peak_gib"]) for line in lines),
    }


def _table(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("run")
    for column in ("tokens", "tokens/s", "step s", *(f"{phase} s" for phase in PHASES), "peak GiB"):
        table.add_column(column, justify="right")
    for run in runs:
        seconds = [run["step_s"], *(run["phases_s"][phase] for phase in PHASES)]
        shown = [f"{second:.2f}" for second in seconds]
        table.add_row(
            run["name"], f"{run['tokens']:.0f}", f"{run['tokens_per_s']:.0f}", *shown, f"{run['peak_gib']:.2f}"
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.step", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", help="measure a run by this config, and write no results file")
    parser.add_argument("--only", help="of the built-in cases, those whose name has this in it")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}; the first {WARM_UP} do not count")
    parser.add_argument("--no-write", action="store_true", help="print, and leave the results file as it is")
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="such as train.chunk_rows=256")
    return parser


if __name__ == "__main__":
    sys.exit(main())
