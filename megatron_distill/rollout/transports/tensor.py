"""Weights through shared memory, to servers on the same machine: no process group, no copy over a socket.

What travels over HTTP is the name of a piece of shared memory and where in it each tensor lies, in the form that the
server unpickles (it takes nothing but names of tensors' building functions from a pickle).
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_distill.errors import SyncError
from megatron_distill.rollout.sglang import Client
from megatron_distill.rollout.transports.base import Bucketed, Shipment
from megatron_distill.rollout.transports.buckets import Bucket
from megatron_distill.rollout.transports.crew import Crew
from megatron_distill.rollout.transports.pieces import SHARED, SharedPieces, pickled, shared_memory
from megatron_distill.rollout.transports.switchboard import Asked, Switchboard


class SharedTensors(Bucketed):
    """Every tensor-parallel rank writes its slices where servers will read them."""

    def __init__(self, crew: Crew, bucket_bytes: int, *, seconds: float) -> None:
        super().__init__(crew)
        self._seconds = seconds
        self._pieces = SharedPieces(crew, bucket_bytes)
        self._one_machine = False

    def prepare(self, shipment: Shipment) -> None:
        if not self._one_machine:
            found = self.crew.mesh.gather_objects(shared_memory())
            if len(set(found)) > 1 or None in found:
                raise SyncError(
                    "transport=tensor shares memory, and the trainer's ranks are on several machines, or in "
                    f"containers that share none, or there is no {SHARED}: use broadcast, or disk"
                )
            self._one_machine = True

    def fill(self, shipment: Shipment) -> Iterator[Bucket]:
        return self._pieces.fill(shipment.student)

    def launch(self, bucket: Bucket, shipment: Shipment) -> Asked[None]:
        servers = shipment.servers
        assert servers is not None
        # whoever unpickles gives one reference back, so that each process of each server needs a pickle of its own
        payloads = {
            url: [pickled(bucket) for _ in range(size)]
            for url, size in zip(servers.urls, shipment.tp_sizes, strict=True)
        }

        async def hand_over(client: Client) -> None:
            await client.update_tensor(payloads[client.url], timeout=self._seconds)

        return servers.begin(hand_over)

    def forget(self) -> None:
        self._pieces.forget()

    def close(self, servers: Switchboard | None) -> None:
        self.forget()
