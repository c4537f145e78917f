"""Numbers of a run: one JSON line per step, TensorBoard, and the few that matter on the screen.

Names are `group/name` with the unit in the name. Only the first rank has sinks; on the others everything here does
nothing. A value arrives as `types.Metric`, already summed over ranks; the same name added twice in a step is pooled.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from megatron_distill.config import MetricsSection
from megatron_distill.errors import EngineStopped
from megatron_distill.files import write_atomically
from megatron_distill.types import Metric

FILE = "metrics.jsonl"
UNREPEATABLE = ("time/", "perf/", "memory/", "engine/")
"""Groups that differ from run to run; everything else is the same, bit for bit, for the same config."""

type Clock = Callable[[str], contextlib.AbstractContextManager[None]]


class Sink(Protocol):
    """Somebody who is told the numbers."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step; steps come in order, a step may come twice (training, then evaluation)."""

    def close(self) -> None:
        """Nothing more will come."""


class Metrics:
    """The numbers of a run as they come in; a context manager, so that sinks are closed whatever happens."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._pool: dict[str, Metric] = {}
        self._seconds: dict[str, float] = {}

    @classmethod
    def open(cls, folder: Path, section: MetricsSection, *, rank: int, done: int, steps: int) -> Self:
        """Sinks for a run that stands at `done` steps of `steps`; what a lost run wrote after them is cut off.

        Args:
            folder: run folder; metrics.jsonl and tensorboard/ lie in it.
            rank: only rank 0 writes.
        """
        if rank != 0:
            return cls(())
        folder.mkdir(parents=True, exist_ok=True)
        cut(folder / FILE, done)
        sinks: list[Sink] = [Lines(folder / FILE)]
        if section.tensorboard:
            sinks.append(TensorBoard(folder / "tensorboard", done))
        if section.console:
            from megatron_distill.train.progress import progress

            sinks.append(progress(done, steps, section.every))
        return cls(sinks)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[Clock]:
        """One training step, `number` counting from 1: what is added inside is written when it ends well.

        The clock it gives times phases, `with clock("rollout"): ...`, as `time/rollout_s`; `time/step_s` is the whole,
        and `perf/tokens_per_s` follows where `batch/tokens` was added.
        """
        self._pool, self._seconds = {}, {}
        begin = time.perf_counter()
        try:
            yield self._clock
        except EngineStopped:
            # numbers are there once the update is done: it is kept, and only its weights did not reach the engine
            if self._pool:
                self._end_step(number, time.perf_counter() - begin)
            raise
        self._end_step(number, time.perf_counter() - begin)

    def _end_step(self, number: int, seconds: float) -> None:
        self._seconds["step"] = seconds
        values = {name: metric.value for name, metric in self._pool.items()}
        if "batch/tokens" in values:
            values["perf/tokens_per_s"] = values["batch/tokens"] / self._seconds["step"]
        self._tell(number, values | {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()})

    def add(self, *metrics: Metric) -> None:
        """Numbers of the step that is running."""
        _pool(self._pool, metrics)

    def write(self, number: int, *metrics: Metric) -> None:
        """Numbers that belong to no running step, such as an evaluation after step `number`: a line of their own."""
        pool: dict[str, Metric] = {}
        _pool(pool, metrics)
        self._tell(number, {name: metric.value for name, metric in pool.items()})

    def close(self) -> None:
        """Close all sinks."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell(self, number: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(number, values)

    @contextlib.contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begin


class Lines:
    """metrics.jsonl: every number of a step at full precision, one line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # one write of one line, handed to the system at once: a killed process loses at most the line it was writing
        line: dict[str, Any] = {"step": step} | {name: jsonable(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """The same numbers as TensorBoard scalars."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        resumed = folder.is_dir()
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if resumed else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def cut(path: Path, done: int) -> None:
    """Drop the lines of steps after `done`, and a half line at the end, in one atomic replacement."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = list(file)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
    if len(kept) < len(lines):
        write_atomically(path, kept)


def comparable(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what differs from run to run: for comparing two runs bit for bit."""
    return {name: value for name, value in line.items() if not name.startswith(UNREPEATABLE)}


def _pool(pool: dict[str, Metric], metrics: Iterable[Metric]) -> None:
    for metric in metrics:
        old = pool.get(metric.name)
        both = Metric(metric.name, old.total + metric.total, old.count + metric.count) if old else metric
        pool[metric.name] = both


def jsonable(value: float) -> float | str:
    """JSON has no NaN and no infinities; written as text they can still be read by `float`."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
