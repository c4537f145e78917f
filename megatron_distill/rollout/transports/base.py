"""What every way of sending weights answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from megatron_distill.rollout.transports.buckets import Bucket
from megatron_distill.rollout.transports.crew import Crew, HoldsStageWeights
from megatron_distill.rollout.transports.switchboard import Asked, Switchboard


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """One set of weights on its way to servers."""

    student: HoldsStageWeights
    version: int
    servers: Switchboard | None
    """On leaders; None elsewhere."""
    tp_sizes: tuple[int, ...]
    """Processes of each server that want weights."""
    fresh: bool
    """Whether a server does not hold what was last sent to it: it was started anew, or is a new one."""

    @property
    def what(self) -> str:
        """For errors."""
        return f"weights of step {self.version}"


class Transport(ABC):
    """Built on every rank; methods are collective and raise the same error on every rank."""

    session: ClassVar[bool]
    """Whether servers must be told where the new weights begin and end."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew

    @abstractmethod
    def prepare(self, shipment: Shipment) -> None:
        """What can be done while servers still write."""

    @abstractmethod
    def send(self, shipment: Shipment) -> int:
        """To paused servers: the bytes that this rank sent."""

    @abstractmethod
    def forget(self) -> None:
        """After a failure: let go of what may be broken; not collective."""

    @abstractmethod
    def tidy(self) -> None:
        """After a shipment, however it ended; not collective."""

    @abstractmethod
    def close(self, servers: Switchboard | None) -> None:
        """Let everything go, on servers too; not collective."""


class Bucketed(Transport):
    """Tensors go in buckets: one is under way while the next is gathered."""

    session: ClassVar[bool] = True

    def __init__(self, crew: Crew) -> None:
        super().__init__(crew)
        self._sent = 0

    def send(self, shipment: Shipment) -> int:
        self._sent = 0

        def take(filled: Iterator[Bucket]) -> None:
            self._take(filled, shipment)

        self.crew.in_turn(lambda: self.crew.stream(self.fill(shipment), take))
        return self._sent

    def _take(self, filled: Iterator[Bucket], shipment: Shipment) -> None:
        under_way = None
        for bucket in filled:
            if under_way is not None:
                self.land(under_way, shipment)
            self._sent += sum(tensor.nbytes for _, tensor in bucket)
            under_way = self.launch(bucket, shipment)
            del bucket
        if under_way is not None:
            self.land(under_way, shipment)

    def tidy(self) -> None:
        pass

    @abstractmethod
    def fill(self, shipment: Shipment) -> Iterator[Bucket]:
        """Whole tensors of this stage on its leader, each bucket while the one before is under way, the one before
        that has landed; collective over the stage's tensor-parallel ranks."""

    @abstractmethod
    def launch(self, bucket: Bucket, shipment: Shipment) -> Asked[None]:
        """Set it on its way."""

    def land(self, asked: Asked[None], shipment: Shipment) -> None:
        """Wait until every server has taken it."""
        asked.answers(shipment.what)
