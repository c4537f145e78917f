"""A verifier compares the text of a response with the gold answer.

Nothing heavy is imported here or in the verifiers: their worker processes import these modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one response."""

    reward: float | None
    """None: not scored. Never a silent 0 for a check that did not come to an end."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """By metric name, e.g. `reward/failed`: 1 when the check did not come to an end."""


class Judge(Protocol):
    """A connected verifier; may be called from any thread."""

    def score(self, pairs: Sequence[tuple[str | None, str]]) -> list[Verdict]:
        """One verdict per (gold answer, response text), in order."""
        ...

    def close(self) -> None:
        """Give processes back."""
        ...


class Verifier(ABC):
    """A kind of reward; subclasses are frozen dataclasses whose fields are the YAML keys."""

    needs_answers: ClassVar[bool] = True
    """Whether every prompt must have a gold answer."""

    @abstractmethod
    def connect(self) -> Judge:
        """The live verifier."""
