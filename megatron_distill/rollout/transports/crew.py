"""Who of the trainer's ranks does what while weights are sent, and how all of them learn of a failure of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from megatron_distill.errors import DistillError, SyncError
from megatron_distill.models.hf.io import TensorPlan
from megatron_distill.models.hf.stage import Slice
from megatron_distill.runtime.mesh import Mesh


class HoldsStageWeights(Protocol):
    """A sharded model."""

    def stage_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors of this pipeline stage, on the first of its tensor-parallel ranks; collective over those."""
        ...

    def stage_slices(self) -> Iterator[Slice]:
        """What this rank holds of each of them; not collective."""
        ...

    def stage_plan(self) -> list[TensorPlan]:
        """What they will be; not collective."""
        ...


class Crew:
    """This rank among the others. Every method is collective over all ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.gathers = mesh.cp_rank == 0 and mesh.dp_rank == 0
        """Takes part in gathering its stage's tensors: other replicas hold the same ones."""
        self.leads = self.gathers and mesh.tp_rank == 0
        """Sends its stage's tensors; one rank of each stage."""
        self.controls = mesh.rank == 0
        """Tells servers when to stop and go on."""

    def agreed[T](self, work: Callable[[], T]) -> T:
        """`work` on this rank; if it failed on any rank, the same error on all of them.

        Raises:
            SyncError: what the lowest rank met, with the servers lost by any.
        """
        failed: DistillError | None = None
        result: T | None = None
        try:
            result = work()
        except DistillError as error:
            failed = error
        errors = [error for error in self.mesh.gather_objects(failed) if error is not None]
        if errors:
            raise _one_of(errors) from failed
        return result  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], None]) -> None:
        """`work` on the ranks of one stage after another.

        Two stages at once could stop each other for good: a server takes part in one exchange at a time, and two
        servers may begin with different ones.
        """
        for stage in range(self.mesh.sizes.pp):
            self.agreed(work if self.mesh.pp_rank == stage else _nothing)

    def stream[T](self, items: Iterator[T], take: Callable[[Iterator[T]], None]) -> None:
        """What a stage's ranks make together goes to `take` on their leader; the others take part in making it.

        Not collective over all ranks but over the stage's tensor-parallel ones.
        """
        if not self.gathers:
            return
        try:
            if self.leads:
                take(items)
        finally:
            for _ in items:
                pass  # the others are in the same exchanges: whatever happened here, they must come to an end


def _nothing() -> None:
    pass


def _one_of(errors: list[DistillError]) -> DistillError:
    lost = tuple(dict.fromkeys(url for error in errors if isinstance(error, SyncError) for url in error.servers))
    cause = next((error for error in errors if isinstance(error, SyncError) and error.servers), errors[0])
    return SyncError(str(cause), servers=lost)
