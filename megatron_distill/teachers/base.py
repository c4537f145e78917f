"""What a teacher is: something that says, for each response token, how it would have gone on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from megatron_distill.models.network import Network
from megatron_distill.models.student import Student
from megatron_distill.teachers._views import View
from megatron_distill.types import Batch, Fidelity, Scored, TeacherSignal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Teacher(Protocol):
    """A live teacher; its methods are collective."""

    @property
    def kept(self) -> Network | None:
        """Weights of its own that a checkpoint must hold; None where they follow from the student's or a folder."""

    def fit(self, scored: list[Scored]) -> list[Scored]:
        """The step's rollouts, cut to what it can read; those that it cannot read at all are left out."""

    def signal(self, batch: Batch) -> tuple[TeacherSignal, ...]:
        """One per micro-batch, aligned to its response axis; empty on pipeline stages that see no logits."""

    def after_step(self, student: Student, step: int) -> None:
        """Told of every update; a frozen teacher does nothing."""

    def restored(self) -> None:
        """Told that a checkpoint has filled `kept`."""

    def close(self) -> None:
        """End the processes that it started; nothing where it started none."""


class TeacherPart(ABC):
    """One entry of section `teachers`; fields are settings."""

    beside_student: ClassVar[bool] = True
    """Whether its model is cut over the student's mesh."""
    view: View
    """What it reads before the response."""

    @property
    @abstractmethod
    def provides(self) -> Fidelity:
        """The richest signal it gives; an objective that needs more is refused when the config is loaded.

        Signals poorer than `FULL` are of the model itself, at temperature 1.
        """

    @property
    @abstractmethod
    def folder(self) -> Path | None:
        """Model folder whose tokenizer and vocabulary must be the student's; None when it is the student itself."""

    @abstractmethod
    def connect(self, student: Student, tokenizer: PreTrainedTokenizerBase, logs: Path | None = None) -> Teacher:
        """Load it into the student's mesh, or find it where it is served; collective.

        Signals are laid out on the student's cut of the vocabulary, or name its ids.

        Args:
            student: whom it teaches.
            tokenizer: of both.
            logs: folder for the logs of processes that it starts; None: one that goes with them.
        """
