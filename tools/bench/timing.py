"""Times of several methods that do the same work, taken so that their ratios mean something.

All methods of a comparison run in one process, one after the other, round by round, each round in another order; a
machine that slows down for a while slows all of them. On a CPU the clock is the CPU time of the process, which runs
one thread, so that other people's processes count only through the caches and the memory bus that they share.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to do the work."""

    name: str
    run: Callable[[], Any]
    """What is timed. What it returns is let go before the next method starts."""
    prepare: Callable[[], None] = lambda: None
    """Called before each run, not timed: puts back what a run overwrites."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Milliseconds, one per round."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure that ratios are made of."""
        return statistics.median(self.ms)

    @property
    def best(self) -> float:
        """The least disturbed round."""
        return min(self.ms)


class Stopwatch(Protocol):
    """How long something took on the device it ran on."""

    def time(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one run."""


class ProcessorTime:
    """CPU time of this process, all threads together."""

    def time(self, run: Callable[[], Any]) -> float:
        begin = time.process_time_ns()
        kept = run()
        spent = time.process_time_ns() - begin
        del kept
        return spent / 1e6


class DeviceTime:
    """Time between two events on the current CUDA stream."""

    def time(self, run: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        kept = run()
        end.record()
        torch.cuda.synchronize()
        del kept
        return float(begin.elapsed_time(end))


def stopwatch() -> Stopwatch:
    """The one for this machine."""
    return DeviceTime() if torch.cuda.is_available() else ProcessorTime()


def interleave(methods: Sequence[Method], rounds: int, watch: Stopwatch, warm_up: int = 2) -> dict[str, Samples]:
    """Time every method once per round, in an order that moves on by one from round to round.

    Args:
        methods: names differ.
        rounds: at least 5 for a figure that anybody is told.
        watch: the clock.
        warm_up: runs of each method beforehand, not counted: compilers, caches, the heap.
    """
    assert len({method.name for method in methods}) == len(methods)
    for method in methods:
        for _ in range(warm_up):
            method.prepare()
            method.run()
    found: dict[str, list[float]] = {method.name: [] for method in methods}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            for method in order(methods, number):
                method.prepare()
                found[method.name].append(watch.time(method.run))
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(tuple(times)) for name, times in found.items()}


def order[T](methods: Sequence[T], number: int) -> list[T]:
    """The methods as they run in a round: the next one begins each time, and every other round goes backwards."""
    start = number % len(methods)
    if number % 2:
        return [*methods[start::-1], *methods[:start:-1]]
    return [*methods[start:], *methods[:start]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over theirs; below 1 is faster."""

    median: float
    best: float
    """Of the least disturbed round of each."""
    spread: tuple[float, float]
    """Smallest and largest ratio of a single round."""


def ratio(times: Mapping[str, Samples], ours: str, theirs: str) -> Ratio:
    """Of two methods that ran in the same rounds."""
    mine, other = times[ours], times[theirs]
    single = [one / two for one, two in zip(mine.ms, other.ms, strict=True)]
    return Ratio(mine.median / other.median, mine.best / other.best, (min(single), max(single)))
