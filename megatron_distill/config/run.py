"""`RunConfig`: one run, section by section; each section is the part's own dataclass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_distill.config.compose import compose
from megatron_distill.config.read import Parts, read, write
from megatron_distill.config.sections import MetricsSection, PathsSection, TrainSection
from megatron_distill.data.prompts import DataSection
from megatron_distill.eval.runner import EvalSection
from megatron_distill.files import write_atomically
from megatron_distill.models.checkpoint import CheckpointSection
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import StudentSection
from megatron_distill.objectives.base import Objective
from megatron_distill.rewards.base import Verifier
from megatron_distill.rollout.engines.base import EnginePart
from megatron_distill.rollout.sources.base import SourcePart
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.teachers.base import TeacherPart


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything about a run."""

    student: StudentSection
    """The model that learns."""
    teachers: Mapping[str, TeacherPart] = field(default_factory=dict)
    """Who supervises, by a name of your choice; null takes out one that a base file put in."""
    rollout: SourcePart
    """Where responses come from."""
    reward: Verifier
    """How answers are judged."""
    data: DataSection
    """Prompts."""
    objective: Objective
    """What is minimised; its defaults are the paper's."""
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    """AdamW."""
    train: TrainSection = field(default_factory=TrainSection)
    """Steps."""
    parallel: ParallelSizes = field(default_factory=ParallelSizes)
    """How the work is cut over ranks."""
    precision: Precision = field(default_factory=Precision)
    """The numbers it computes in."""
    eval: EvalSection = field(default_factory=EvalSection)
    """Held-out problems."""
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    """What is kept to go on from."""
    metrics: MetricsSection = field(default_factory=MetricsSection)
    """Who is told the numbers."""
    paths: PathsSection = field(default_factory=PathsSection)
    """Where the run lives."""


ENGINES = Parts("megatron_distill.rollout.engines", EnginePart)
PARTS = {
    "teachers": Parts("megatron_distill.teachers", TeacherPart, named=True),
    "rollout": Parts("megatron_distill.rollout.sources", SourcePart, inner={"engine": ENGINES}),
    "reward": Parts("megatron_distill.rewards", Verifier),
    "objective": Parts("megatron_distill.objectives", Objective),
}


def load(config: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run from a YAML file, or its name under `configs/`, and overrides such as `train.steps=5`.

    Raises:
        ConfigError: one line for everything that is wrong with it.
    """
    return read(RunConfig, PARTS, compose(config, overrides))


def tree(run: RunConfig) -> dict[str, Any]:
    """The resolved config as plain values, defaults included."""
    return write(run, PARTS)


def dump(run: RunConfig) -> str:
    """The resolved config as YAML that `load` reads back to an equal run."""
    return yaml.safe_dump(tree(run), sort_keys=False, allow_unicode=True)


def save(run: RunConfig, path: Path) -> None:
    """Write the resolved config in one atomic replacement."""
    write_atomically(path, dump(run))
