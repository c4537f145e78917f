"""Weights through shared memory, to servers on the same machine: no process group, no copy over a socket.

What travels over HTTP is the name of a piece of shared memory and where in it each tensor lies, in the form that the
server unpickles (it takes nothing but names of tensors' building functions from a pickle). The trainer's own ranks tell
each other in the same way, through torch.distributed; nothing that a server says is ever unpickled.
"""

from __future__ import annotations

import base64
import io
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.multiprocessing.reductions import reduce_storage, reduce_tensor, reduce_typed_storage

from megatron_distill.errors import SyncError
from megatron_distill.models.hf.io import TensorPlan
from megatron_distill.rollout.sglang import Client
from megatron_distill.rollout.transports.base import Bucketed, Shipment
from megatron_distill.rollout.transports.buckets import Bucket, buckets
from megatron_distill.rollout.transports.crew import Crew, HoldsStageWeights
from megatron_distill.rollout.transports.switchboard import Asked, Switchboard

SHARED = Path("/dev/shm")
_ALIGNED = 64
"""Bytes: tensors begin at multiples of this."""


class SharedTensors(Bucketed):
    """Two pieces of shared memory in turn: servers read one while the other is filled.

    Nothing is gathered: every tensor-parallel rank writes its slices where servers will read them.
    """

    def __init__(self, crew: Crew, bucket_bytes: int, *, seconds: float) -> None:
        super().__init__(crew, bucket_bytes)
        self._seconds = seconds
        self._pieces: list[Tensor] = []
        """The same two on all tensor-parallel ranks of a stage."""
        self._one_machine = False

    def prepare(self, shipment: Shipment) -> None:
        if not self._one_machine:
            found = self.crew.mesh.gather_objects(shared_memory())
            if len(set(found)) > 1:
                raise SyncError(
                    "transport=tensor shares memory, and the trainer's ranks are on several machines, or in "
                    "containers that share none: use broadcast, or disk"
                )
            self._one_machine = True

    def fill(self, shipment: Shipment) -> Iterator[Bucket]:
        half, tp_group = self.bucket_bytes // 2, self.crew.mesh.tp_group
        self._share(largest_piece(shipment.student, half))
        for turn, slices in enumerate(buckets(shipment.student.stage_slices(), half, lambda one: one.plan.bytes)):
            placed = _places([one.plan for one in slices], self._pieces[turn % 2])
            _all_here(tp_group)  # so the leader is: no server reads this piece any more
            for one, (_, whole) in zip(slices, placed, strict=True):
                one.place(whole)
            del slices, one
            _all_here(tp_group)
            yield placed

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
        self._pieces = []  # a server that hangs may still hold them: never written again, gone with the last holder

    def close(self, servers: Switchboard | None) -> None:
        self.forget()

    def _share(self, room: int) -> None:
        """Two pieces of at least `room` bytes, the same ones on all tensor-parallel ranks; collective over those."""
        if self._pieces and self._pieces[0].nbytes >= room:
            return
        self.forget()
        mesh = self.crew.mesh
        told: list[list[str] | None] = [None] * mesh.sizes.tp
        failed = None
        if self.crew.leads:
            try:
                self._pieces = [shared(room), shared(room)]
                # one for each that will open it, as in `launch`
                told = [[pickled([("", piece)]) for piece in self._pieces] if rank else [] for rank in range(len(told))]
            except SyncError as error:
                failed = error
        if mesh.tp_group is not None:
            dist.broadcast_object_list(told, group=mesh.tp_group, group_src=0)
        if failed is not None:
            raise failed
        mine = told[mesh.tp_rank]
        if mine is None:
            raise SyncError("the stage's first rank has no shared memory")  # which says so itself
        if not self.crew.leads:
            with by_name(), _kept_from_children():
                self._pieces = [pickle.loads(base64.b64decode(name))[0][1] for name in mine]


def shared_memory() -> tuple[str, int]:
    """Whose it is: equal for processes that can share some."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return boot, SHARED.stat().st_dev


def _all_here(tp_group: ProcessGroup | None) -> None:
    if tp_group is not None:
        dist.barrier(group=tp_group)


def _places(plans: Sequence[TensorPlan], piece: Tensor) -> Bucket:
    """Whole tensors in a piece of memory, one after another."""
    placed: Bucket = []
    start = 0
    for plan in plans:
        placed.append((plan.name, piece[start : start + plan.bytes].view(plan.dtype).view(plan.shape)))
        start += _aligned(plan.bytes)
    return placed


def largest_piece(student: HoldsStageWeights, most_bytes: int) -> int:
    """Bytes of the largest bucket of this rank's stage."""
    planned = buckets(student.stage_plan(), most_bytes, lambda plan: plan.bytes)
    return max((sum(_aligned(plan.bytes) for plan in plans) for plans in planned), default=0)


def free_bytes() -> int:
    """Of this machine's shared memory."""
    return shutil.disk_usage(SHARED).free


def shared(room: int) -> Tensor:
    """Bytes that other processes of this user can open by name.

    Raises:
        SyncError: there is not so much shared memory; touching what is not there would kill the process.
    """
    if (free := free_bytes()) < room:
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
