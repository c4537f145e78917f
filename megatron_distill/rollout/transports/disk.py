"""Weights through a folder that trainer and servers share: each stage's leader writes a file, servers read them all.

Written while servers still work with the old weights, and given its name only when it is whole. It is removed as soon
as all servers have read it: a server that is started later gets weights like every other.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from megatron_distill.errors import SyncError
from megatron_distill.models.hf.io import TensorFile, file_name, write_index
from megatron_distill.rollout.transports.base import Shipment, Transport
from megatron_distill.rollout.transports.crew import Crew
from megatron_distill.rollout.transports.switchboard import Switchboard

_NAME = "weights_"
_OURS = re.compile(rf"{_NAME}(partial|\d{{6,}})")


class Disk(Transport):
    """A folder of safetensors for each shipment, one file for each stage."""

    session: ClassVar[bool] = False

    def __init__(self, crew: Crew, folder: Path, *, seconds: float) -> None:
        """
        Args:
            crew: the ranks.
            folder: where the folders go: the same for all leaders and servers.
            seconds: in which servers must have read one.
        """
        super().__init__(crew)
        self._folder = folder.absolute()
        self._seconds = seconds
        self._bytes = 0

    def prepare(self, shipment: Shipment) -> None:
        self._bytes = 0
        self.crew.agreed(lambda: self._on_disk(self._make_room) if self.crew.controls else None)
        try:
            self.crew.agreed(lambda: self._on_disk(lambda: self._write(shipment)))
            plans = self.crew.mesh.gather_objects(shipment.student.stage_plan() if self.crew.leads else None)
            shards = [plan for plan in plans if plan is not None]

            def finish() -> None:
                write_index(self._partial, shards)
                self._partial.rename(self._whole(shipment))

            self.crew.agreed(lambda: self._on_disk(finish) if self.crew.controls else None)
        except SyncError:
            self.tidy()
            raise

    def send(self, shipment: Shipment) -> int:
        def read() -> None:
            if self.crew.controls:
                assert shipment.servers is not None
                folder = self._whole(shipment)
                shipment.servers.ask(lambda client: client.update_disk(folder, timeout=self._seconds), shipment.what)

        self.crew.agreed(read)
        return self._bytes

    def forget(self) -> None:
        pass

    def close(self, servers: Switchboard | None) -> None:
        pass

    def tidy(self) -> None:
        if self.crew.controls:
            for folder in self._ours():
                shutil.rmtree(folder, ignore_errors=True)

    def _ours(self) -> list[Path]:
        """Whatever else lies in a folder that somebody named is not ours to remove."""
        return [folder for folder in self._folder.glob(f"{_NAME}*") if _OURS.fullmatch(folder.name)]

    @property
    def _partial(self) -> Path:
        return self._folder / f"{_NAME}partial"

    def _whole(self, shipment: Shipment) -> Path:
        return self._folder / f"{_NAME}{shipment.version:06d}"

    def _make_room(self) -> None:
        """An empty folder; what a run that was cut off has left goes."""
        for folder in self._ours():
            shutil.rmtree(folder)
        self._partial.mkdir(parents=True)

    def _write(self, shipment: Shipment) -> None:
        def take(weights: Iterator[tuple[str, Tensor]]) -> None:
            planned = shipment.student.stage_plan()
            mesh = self.crew.mesh
            file = TensorFile(self._partial / file_name(mesh.pp_rank, mesh.sizes.pp), planned)
            try:
                for name, tensor in weights:
                    file.write(name, tensor)
            finally:
                file.close()
            self._bytes = sum(tensor.bytes for tensor in planned)

        self.crew.stream(shipment.student.stage_weights(), take)

    def _on_disk(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            raise SyncError(
                f"{self._folder}: cannot write new weights there: {error.strerror or error}; servers keep the old "
                "ones. Make room, name another folder, or use transport=broadcast"
            ) from error
