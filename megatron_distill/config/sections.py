"""The sections that belong to no part: the steps of a run, its metrics, its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_distill.objectives._importance import Importance


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSection:
    """Section `train`: how many steps, of what size."""

    steps: int = 100
    """Optimizer steps of the whole run; a resumed run does the rest of them."""
    prompts_per_step: int = 32
    """Prompts of one step over all data-parallel replicas; each gives `rollout.samples_per_prompt` sequences."""
    seed: int = 1
    """Everything random is drawn from it, by step and sample, whatever the parallel sizes."""
    tokens_per_micro_batch: int = 16384
    """Packed tokens of one forward pass; a longer sequence has a micro-batch to itself."""
    chunk_rows: int = 1024
    """Response tokens whose logits exist at a time; less needs less memory."""
    losses: Literal["auto", "eager", "compiled", "triton"] = "auto"
    """Who computes losses over the vocabulary: torch as it stands, its compiler, or the project's Triton kernels.
    `auto` is `compiled` on a GPU and `eager` on a CPU, where compiling pays only in long runs."""
    importance: Importance = field(default_factory=Importance)
    """What becomes of tokens that the engine sampled with other probabilities than the trainer's."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about a loss or gradient that is NaN or infinite: end the run, or leave out the step and count it."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "tokens_per_micro_batch", "chunk_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSection:
    """Section `metrics`: who is told the numbers of a step; metrics.jsonl always is."""

    tensorboard: bool = True
    """Write TensorBoard events to `tensorboard/` of the run folder."""
    console: bool = True
    """Show progress: a live line on a terminal, else a line of text."""
    every: int = 1
    """Steps between two lines of text; the live line and the files get every step."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PathsSection:
    """Section `paths`: where a run lives."""

    run: Path = Path("runs/run")
    """Its folder: config, metrics, logs, checkpoints, exports; an existing one is resumed."""
