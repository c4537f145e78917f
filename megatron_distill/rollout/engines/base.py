"""Who writes the responses of a run; the file name is the name in `rollout.engine.kind`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from megatron_distill.rollout.base import RolloutEngine
from megatron_distill.rollout.sample import Ranks
from megatron_distill.runtime.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What an engine serves, and to whom."""

    folder: Path
    """Hugging Face folder: its config.json is the architecture, its tokenizer files name the ids that stop."""
    tokenizer: PreTrainedTokenizerBase
    ranks: Ranks
    """The run's; an engine that is one for all ranks gives them all the same answers."""
    mesh: Mesh | None = None
    """The ranks that hold the student, where it is cut over them and its weights are pushed from there."""
    valid_vocab: int | None = None
    """Ids from here on are padding that is never drawn; None: the model has none."""
    device: torch.device | None = None
    """Of this rank; None: the CPU."""
    run_folder: Path | None = None
    """Where the logs of processes that the engine starts go; None: a folder of their own that goes with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePart(ABC):
    """A kind of engine; subclasses are frozen dataclasses whose fields are the YAML keys."""

    everywhere: ClassVar[bool]
    """Whether each rank has one of its own; otherwise it is one for all, and every call is collective."""

    @abstractmethod
    def connect(self, serving: Serving) -> RolloutEngine:
        """The live engine, still without weights; collective."""

    def room(self, positions: int) -> int:
        """Tokens that a prompt and its response may have together, with a model of so many positions."""
        return positions
