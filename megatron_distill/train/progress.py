"""How a run shows itself: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from megatron_distill.train.metrics import Sink

SHOWN = {
    "loss/total": ("loss", "{:.4g}"),
    "optim/grad_norm": ("grad norm", "{:.3g}"),
    "reward/mean": ("reward", "{:.3f}"),
    "eval/avg_at_": ("accuracy", "{:.1%}"),
    "perf/tokens_per_s": ("tokens/s", "{:,.0f}"),
}
"""How a metric's name begins: label and format."""
TIME = "time/"


def progress(done: int, steps: int, every: int, console: Console | None = None) -> Sink:
    """The sink that fits what stdout is."""
    console = console or Console()
    return Live(done, steps, console) if console.is_terminal else Text(done, steps, every, console)


class Phases:
    """Where the time of a run's steps went."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._steps = 0

    def add(self, values: Mapping[str, float]) -> None:
        """Count what one line of metrics says of time; an evaluation's line says nothing."""
        seconds = {name[len(TIME) : -2]: value for name, value in values.items() if name.startswith(TIME)}
        self._steps += bool(seconds)
        for phase, value in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + value

    def line(self) -> str:
        """`time per step 2.10 s: rollout 1.20 s (57%), ...`, longest first; what no phase counts is `other`."""
        whole = self._seconds.get("step", 0.0)
        if not whole:
            return ""
        phases = {name: seconds for name, seconds in self._seconds.items() if name != "step"}
        phases["other"] = max(whole - sum(phases.values()), 0.0)
        told = [
            f"{name} {seconds / self._steps:.2f} s ({seconds / whole:.0%})"
            for name, seconds in sorted(phases.items(), key=lambda one: -one[1])
        ]
        return f"time per step {whole / self._steps:.2f} s: {', '.join(told)}"


def numbers(values: Mapping[str, float]) -> str:
    """The few numbers that matter, those that are there."""
    return "  ".join(
        f"{label} {form.format(value)}"
        for begin, (label, form) in SHOWN.items()
        for name, value in values.items()
        if name.startswith(begin)
    )


class Live:
    """A bar, the time left and the latest numbers, redrawn in place."""

    def __init__(self, done: int, steps: int, console: Console) -> None:
        self._latest: dict[str, float] = {}
        self._phases = Phases()
        self._console = console
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self._task = self._progress.add_task("train", total=steps, completed=done, numbers="")
        self._progress.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._latest |= values
        self._phases.add(values)
        self._progress.update(self._task, completed=step, numbers=numbers(self._latest))

    def close(self) -> None:
        self._progress.stop()
        _show(self._phases, self._console)


class Text:
    """`step 12/100  loss 1.234  ...  left 0:03:20`, for logs."""

    def __init__(self, done: int, steps: int, every: int, console: Console) -> None:
        self._done = done
        self._steps = steps
        self._every = every
        self._console = console
        self._begin = time.perf_counter()
        self._phases = Phases()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._phases.add(values)
        evaluated = any(name.startswith("eval/") for name in values)
        if step % self._every and step != self._steps and not evaluated:
            return
        pace = (time.perf_counter() - self._begin) / max(step - self._done, 1)
        left = timedelta(seconds=round(pace * (self._steps - step)))
        # soft_wrap: a log has no width
        self._console.print(
            f"step {step}/{self._steps}  {numbers(values)}  left {left}", highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        _show(self._phases, self._console)


def _show(phases: Phases, console: Console) -> None:
    if line := phases.line():
        console.print(line, highlight=False, soft_wrap=True)
