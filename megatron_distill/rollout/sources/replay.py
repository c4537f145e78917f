"""Recorded rollouts, step by step: to compare runs on equal data, or to train on what another run wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_distill.data.traces import read_traces
from megatron_distill.errors import DataError
from megatron_distill.rollout.sources.base import HoldsWeights, SourcePart, Surroundings
from megatron_distill.types import Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay(SourcePart):
    """The rollouts that were recorded for each step, with their log-probs and rewards."""

    gives_logprobs: ClassVar[bool] = True

    path: Path
    """The `traces/` folder of a run with rollout.record=true, or one file of it."""

    def connect(self, surroundings: Surroundings) -> Replaying:
        """The live source.

        Raises:
            DataError: no traces, a broken line, or ids that the student does not have.
        """
        steps = read_traces(self.path)
        for step, scored in steps.items():
            largest = max(max(one.rollout.tokens + one.rollout.prompt.tokens) for one in scored)
            if largest >= surroundings.valid_vocab:
                raise DataError(
                    f"{self.path}: step {step} holds token id {largest}, the student has {surroundings.valid_vocab}; "
                    "the traces were written with another tokenizer"
                )
        return Replaying(self.path, steps)


class Replaying:
    """The live source; a pure function of the step, so it has no state and takes no weights."""

    engine = None

    def __init__(self, path: Path, steps: Mapping[int, list[Scored]]) -> None:
        self._path = path
        self._steps = steps

    def next(self, step: int) -> list[Scored]:
        """What was recorded for `step`.

        Raises:
            DataError: nothing was.
        """
        if step not in self._steps:
            raise DataError(
                f"{self._path}: no rollouts of step {step}; it holds steps {min(self._steps)} to {max(self._steps)}"
            )
        return self._steps[step]

    def publish(self, student: HoldsWeights, version: int) -> None:
        """Nobody writes."""

    def state(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, int]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing to give back."""
