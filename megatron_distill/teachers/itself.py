"""The student as its own teacher: its weights as they are, as they were, or averaged over its steps.

With the student's own context this teaches nothing; it is for views that show the teacher more than the student sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from megatron_distill.models.network import Network
from megatron_distill.models.student import Student
from megatron_distill.teachers._megatron import MegatronTeacher
from megatron_distill.teachers._views import View
from megatron_distill.teachers.base import TeacherPart
from megatron_distill.types import Fidelity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

type Weights = Literal["live", "frozen", "ema", "refreshed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ItselfPart(TeacherPart):
    """The student's own network, in the student's mesh; needs no second folder."""

    weights: Weights = "frozen"
    """`live`: the student's, at no cost in memory. `frozen`: those it started from. `ema`: an average over its steps.
    `refreshed`: a copy, renewed `every` so many steps."""
    decay: float = 0.999
    """With `ema`: average = decay * average + (1 - decay) * student after each step, from the start on, in fp32."""
    every: int = 512
    """With `refreshed`: steps between two copies."""
    view: View = field(default_factory=View)
    """What it reads before the response."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay={self.decay}: must be from 0 to below 1")
        if self.every < 1:
            raise ValueError(f"every={self.every}: must be at least 1")

    @property
    def provides(self) -> Fidelity:
        """All of it."""
        return Fidelity.FULL

    @property
    def folder(self) -> None:
        """It is the student."""

    def connect(self, student: Student, tokenizer: PreTrainedTokenizerBase, logs: Path | None = None) -> Itself:
        """With the weights that the student has now."""
        network, averages = student.network, None
        if self.weights != "live":
            network = copy_of(student.network)
        if self.weights == "ema":
            averages = (
                network if network.runtime.precision.torch_dtype == torch.float32 else copy_of(network, wide=True)
            )
        head = network.head().detach() if network.runtime.mesh.is_last_stage else None
        return Itself(
            network=network,
            head=head,
            partition=student.partition,
            view=self.view,
            tokenizer=tokenizer,
            part=self,
            averages=averages,
        )


@dataclass(slots=True, kw_only=True)
class Itself(MegatronTeacher):
    """The live teacher."""

    part: ItselfPart
    averages: Network | None
    """With `ema`: the averages in fp32; `network` itself where it computes in fp32."""

    @property
    def kept(self) -> Network | None:
        """What does not follow from the student's weights or its folder."""
        return {"ema": self.averages, "refreshed": self.network}.get(self.part.weights)

    @torch.no_grad()
    def after_step(self, student: Student, step: int) -> None:
        """Average, or copy, or nothing."""
        if self.part.weights == "refreshed" and step % self.part.every == 0:
            fill(self.network, student.network)
        if self.averages is not None:
            now = student.network.parameters()
            for name, average in self.averages.parameters().items():
                average.lerp_(now[name].to(average.dtype), 1.0 - self.part.decay)
            self.restored()

    def restored(self) -> None:
        """The averages have changed: read with them from now on."""
        if self.averages is not None and self.averages is not self.network:
            fill(self.network, self.averages)


def copy_of(network: Network, *, wide: bool = False) -> Network:
    """Another network with the same weights, without gradients; `wide`: in fp32, to hold weights and never to read."""
    copy = Network.empty(network.spec, network.runtime, valid_vocab=network.partition.valid)
    copy.module.requires_grad_(False)
    if wide:
        copy.module.float()
    fill(copy, network)
    return copy


@torch.no_grad()
def fill(network: Network, source: Network) -> None:
    """The source's weights into the network, rank by rank."""
    weights = source.parameters()
    for name, parameter in network.parameters().items():
        parameter.copy_(weights[name])
