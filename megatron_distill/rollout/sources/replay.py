"""Recorded rollouts, step by step: to compare runs on equal data, or to train on what another run wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    gives_pairs: ClassVar[bool | None] = None

    path: Path
    """The `traces/` folder of a run with rollout.record=true, or one file of it."""

    @property
    def origins(self) -> None:
        """Only the traces can tell."""
        return None

    def connect(self, surroundings: Surroundings) -> Replaying:
        """The live source.

        Raises:
            DataError: no traces, a broken line, or ids that the student does not have.
        """
        traces = Traces.read(self.path)
        traces.check_ids(surroundings.valid_vocab)
        return Replaying(traces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """What was recorded, by step."""

    path: Path
    steps: Mapping[int, list[Scored]]

    @staticmethod
    def read(path: Path) -> Traces:
        """All of it.

        Raises:
            DataError: nothing there, or a broken line.
        """
        return Traces(path=path, steps=read_traces(path))

    def check_steps(self, wanted: Iterable[int]) -> None:
        """That every wanted step is there.

        Raises:
            DataError: the first one that is not.
        """
        missing = next((step for step in wanted if step not in self.steps), None)
        if missing is not None:
            raise DataError(
                f"{self.path}: no rollouts of step {missing}; it holds steps {min(self.steps)} to {max(self.steps)}, "
                "counting from 0: lower train.steps, or replay a longer run"
            )

    def check_ids(self, valid_vocab: int) -> None:
        """That all ids are below `valid_vocab`.

        Raises:
            DataError: one is not.
        """
        for step, scored in self.steps.items():
            largest = max(max(one.rollout.tokens + one.rollout.prompt.tokens) for one in scored)
            if largest >= valid_vocab:
                raise DataError(
                    f"{self.path}: step {step} holds token id {largest}, the run's models share the ids "
                    f"below {valid_vocab}; the traces were written with another tokenizer"
                )

    def check_lengths(self, positions: int, place: str) -> None:
        """That no prompt with its response is longer than the `positions` of the model at `place`.

        Raises:
            DataError: one is.
        """
        for step, scored in self.steps.items():
            longest = max(len(one.rollout.prompt.tokens) + len(one.rollout.tokens) for one in scored)
            if longest > positions:
                raise DataError(
                    f"{self.path}: step {step} holds a prompt and response of {longest} tokens, more than the "
                    f"{positions} positions of {place}: replay what was recorded for models of this length"
                )


class Replaying:
    """The live source; a pure function of the step, so it has no state and takes no weights."""

    engine = None

    def __init__(self, traces: Traces) -> None:
        self._traces = traces

    def next(self, step: int) -> list[Scored]:
        """What was recorded for `step`.

        Raises:
            DataError: nothing was.
        """
        self._traces.check_steps([step])
        return self._traces.steps[step]

    def publish(self, student: HoldsWeights, version: int) -> None:
        """Nobody writes."""

    def state(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, int]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing to give back."""
