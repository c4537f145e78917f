"""The engine in this process: a whole `transformers` model on every rank, and no server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_distill.data.templates import stop_ids
from megatron_distill.rollout.embedded import EmbeddedEngine
from megatron_distill.rollout.engines.base import EnginePart, Serving


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded(EnginePart):
    """A `transformers` model in every rank's process: for CPU, tests and first runs of small models."""

    everywhere: ClassVar[bool] = True

    batch_size: int = 256
    """Responses written at a time on each rank."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")

    def connect(self, serving: Serving) -> EmbeddedEngine:
        """One for this rank alone."""
        return EmbeddedEngine(
            serving.folder,
            valid_vocab=serving.valid_vocab,
            stop_ids=stop_ids(serving.tokenizer, serving.folder),
            batch_size=self.batch_size,
            device=serving.device,
        )
