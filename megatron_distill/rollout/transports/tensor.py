"""Weights through shared memory, to servers on the same machine: no process group, no copy over a socket.

What travels over HTTP is the name of a piece of shared memory and where in it each tensor lies, in the form that the
server unpickles (it takes nothing but names of tensors' building functions from a pickle; we take none from it).
"""

from __future__ import annotations

import base64
import io
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing.reductions import reduce_storage, reduce_tensor, reduce_typed_storage

from megatron_distill.errors import SyncError
from megatron_distill.rollout.sglang import Client
from megatron_distill.rollout.transports.base import Bucketed, Shipment
from megatron_distill.rollout.transports.buckets import Bucket
from megatron_distill.rollout.transports.crew import Crew
from megatron_distill.rollout.transports.switchboard import Asked, Switchboard

SHARED = Path("/dev/shm")
_ALIGNED = 64
"""Bytes: tensors begin at multiples of this."""


class SharedTensors(Bucketed):
    """Two pieces of shared memory in turn: servers read one while the other is filled."""

    def __init__(self, crew: Crew, bucket_bytes: int, *, seconds: float) -> None:
        super().__init__(crew, bucket_bytes)
        self._seconds = seconds
        self._buffers: list[Tensor] = []
        self._payloads: dict[str, list[str]] = {}

    def prepare(self, shipment: Shipment) -> None:
        pass

    def load(self, bucket: Bucket, shipment: Shipment) -> None:
        room = sum(_aligned(tensor.nbytes) for _, tensor in bucket)
        buffer = self._next_buffer(max(room, self.bucket_bytes // 2))
        placed: Bucket = []
        start = 0
        for name, tensor in bucket:
            view = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            placed.append((name, view))
            start += _aligned(tensor.nbytes)
        servers = shipment.servers
        assert servers is not None
        # whoever unpickles gives one reference back, so that each process of each server needs a pickle of its own
        self._payloads = {
            url: [pickled(placed) for _ in range(size)]
            for url, size in zip(servers.urls, shipment.tp_sizes, strict=True)
        }

    def launch(self, bucket: Bucket, shipment: Shipment) -> Asked[None]:
        payloads, servers = self._payloads, shipment.servers
        assert servers is not None

        async def hand_over(client: Client) -> None:
            await client.update_tensor(payloads[client.url], timeout=self._seconds)

        return servers.begin(hand_over)

    def forget(self) -> None:
        self._buffers = []  # a server that hangs may still hold them: never written again, gone with the last holder

    def close(self, servers: Switchboard | None) -> None:
        self.forget()

    def _next_buffer(self, room: int) -> Tensor:
        """The piece that no server reads: that of the bucket before the last."""
        if len(self._buffers) == 2:
            self._buffers.reverse()
            if self._buffers[0].nbytes >= room:
                return self._buffers[0]
            self._buffers.pop(0)
        self._buffers.insert(0, shared(room))
        return self._buffers[0]


def shared(room: int) -> Tensor:
    """Bytes that other processes of this user can open by name.

    Raises:
        SyncError: there is not so much shared memory; touching what is not there would kill the process.
    """
    free = shutil.disk_usage(SHARED).free
    if free < room:
        raise SyncError(
            f"{SHARED}: {free / 2**20:.0f} MiB of shared memory are free, a bucket takes {room / 2**20:.0f}: make "
            "bucket_mb smaller, give the container more (--shm-size), or use transport=broadcast"
        )
    with by_name(), _kept_from_children():
        return torch.empty(room, dtype=torch.uint8).share_memory_()


@contextmanager
def _kept_from_children() -> Iterator[None]:
    """Within: processes that are started get none of this one's files.

    Torch starts one that removes shared memory whose users have died. It lives as long as any server that has opened
    some, and would keep our output open, and sockets to other ranks, which then never notice that we are gone.
    """
    ours = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them is gone
            if os.get_inheritable(int(name)):
                ours.append(int(name))
    for file in ours:
        os.set_inheritable(file, False)
    try:
        yield
    finally:
        for file in ours:
            with suppress(OSError):
                os.set_inheritable(file, True)


@contextmanager
def by_name() -> Iterator[None]:
    """Within: torch shares memory by name. Its default hands over file descriptors, for which a server is no kin."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


class _Pickler(pickle.Pickler):
    """Tensors by torch's own reducers, whatever else in this process has registered others."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return reduce_tensor(value)
        if isinstance(value, torch.storage.TypedStorage):
            return reduce_typed_storage(value)
        if isinstance(value, torch.UntypedStorage):
            return reduce_storage(value)
        return NotImplemented


def pickled(named: Bucket) -> str:
    """Names and places of tensors in shared memory, as SGLang's server reads them."""
    file = io.BytesIO()
    with by_name():
        _Pickler(file).dump(named)
    return base64.b64encode(file.getvalue()).decode()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
