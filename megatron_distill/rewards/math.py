r"""Mathematical equality by math-verify, in processes that can be killed.

A response may hold anything (`\boxed{9^{9^{9^{9}}}}`), and math-verify's own timeouts work on the main thread only.
So every answer is checked in a spawned process with a deadline in the parent; one that misses it is killed and
replaced, and its answer counts as unscored.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_distill.errors import RewardError
from megatron_distill.rewards._answers import BOX, final_answer
from megatron_distill.rewards.base import Verdict, Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Math(Verifier):
    """1 when the final answer is mathematically equal to the gold answer, else 0.

    The final answer stands in the last `\\boxed{}`, or after a later marker. A last box that never closes, as in a
    response that was cut off, is no answer, whatever stands before it. `data.instruction` can ask for the box.
    """

    answer_after: str | None = None
    """The answer may also be the rest of the line after the last such marker, e.g. `####`."""
    anywhere: bool = False
    """Without box and marker take what math-verify finds, the last number for instance. For evaluations only: a student
    that is rewarded for it learns to name numbers."""
    timeout_seconds: float = 5.0
    """Longest check of one answer; after it the answer counts as unscored."""
    processes: int = 2
    """Worker processes of each rank; started with the first answer."""
    memory_gib: float = 4.0
    """What one worker process may take for its answers; one that needs more counts as unscored."""

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "processes", "memory_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")

    def connect(self) -> MathJudge:
        """A judge that starts its processes when it is first asked.

        Raises:
            RewardError: math-verify is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError("reward.kind=math needs math-verify: install math-verify[antlr4-13-2]")
        return MathJudge(self)


class MathJudge:
    """Worker processes and their deadlines."""

    def __init__(self, part: Math) -> None:
        self._part = part
        self._pool: Any = None
        self._starting = Lock()

    def score(self, pairs: Sequence[tuple[str | None, str]]) -> list[Verdict]:
        """Verdicts in order; a pair without gold answer, a check that failed or took too long is unscored.

        Raises:
            RewardError: the worker processes die before they can work.
        """
        asked = [index for index, (gold, _) in enumerate(pairs) if gold is not None]
        verdicts = [Verdict(None) for _ in pairs]
        if not asked:
            return verdicts
        pool, settings = self._started(), (self._part.answer_after, self._part.anywhere)
        futures = [
            pool.schedule(_check, args=(*pairs[index], *settings), timeout=self._part.timeout_seconds)
            for index in asked
        ]
        for index, future in zip(asked, futures, strict=True):
            verdicts[index] = self._verdict(future)
        return verdicts

    def _verdict(self, future: Any) -> Verdict:
        """Waits. Whatever went wrong in a check (deadline, death, any error inside sympy) is one failed check."""
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            self.close()
            raise RewardError(
                "the processes of reward.kind=math die as they start; raise reward.memory_gib, and see that "
                f"`python -c 'import math_verify'` works ({error})"
            ) from error
        outcome = None if error else future.result()
        if outcome is None:
            return Verdict(None, {"reward/failed": 1.0})
        right, answered = outcome
        return Verdict(float(right), {"reward/failed": 0.0, "reward/answered": float(answered)})

    def _started(self) -> Any:
        from pebble import ProcessPool

        with self._starting:
            if self._pool is None:
                self._pool = ProcessPool(
                    max_workers=self._part.processes,
                    initializer=_prepare,
                    initargs=(self._part.memory_gib,),
                    # fork would copy a process with threads and open connections of its process groups
                    context=multiprocessing.get_context("spawn"),
                )
            return self._pool

    def close(self) -> None:
        """End the worker processes; the next `score` starts new ones."""
        with self._starting:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()


def _prepare(memory_gib: float) -> None:
    """In a worker, before its first answer: load everything, so that no deadline pays for it."""
    import logging
    import resource

    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without its own timeout
    math_verify.verify(math_verify.parse("$1$", parsing_timeout=None), math_verify.parse("$1$", parsing_timeout=None))
    loaded = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = loaded + int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _check(gold: str, text: str, answer_after: str | None, anywhere: bool) -> tuple[bool, bool] | None:
    """In a worker: (right, answered); None when the gold answer is no mathematics."""
    import math_verify

    def parse(text: str) -> list[Any]:
        return math_verify.parse(text, parsing_timeout=None)

    # math-verify takes all boxes together; a model that corrects itself means the last one
    final = final_answer(text, answer_after, boxed=True)
    if final is not None:
        said = parse(f"\\boxed{{{final}}}")
    else:
        begun = BOX in text or (answer_after is not None and answer_after in text)
        said = parse(text) if anywhere and not begun else []
    expected = parse(f"\\boxed{{{gold}}}")
    if not expected:
        return None
    right = bool(said) and math_verify.verify(expected, said, timeout_seconds=None, raise_on_error=True)
    return right, bool(said)
