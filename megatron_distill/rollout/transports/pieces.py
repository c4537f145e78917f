"""Shared memory that a stage's tensor-parallel ranks fill together: nothing is gathered over a socket.

A piece goes to another process by its name, pickled. The trainer's own ranks tell each other in that way, through
torch.distributed, and SGLang's servers unpickle it too; nothing that a server says is ever unpickled.
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
from megatron_distill.rollout.transports.buckets import Bucket, buckets
from megatron_distill.rollout.transports.crew import Crew, HoldsStageWeights

SHARED = Path("/dev/shm")
_ALIGNED = 64
"""Bytes: tensors begin at multiples of this."""


class SharedPieces:
    """Two pieces of shared memory in turn: one is read while the other is filled. Kept from one push to the next."""

    def __init__(self, crew: Crew, bucket_bytes: int) -> None:
        """
        Args:
            crew: the ranks, all on one machine.
            bucket_bytes: of the two pieces together.
        """
        self._crew = crew
        self._most = bucket_bytes // 2
        self._pieces: list[Tensor] = []
        """The same two on all tensor-parallel ranks of a stage."""

    def fill(self, student: HoldsStageWeights) -> Iterator[Bucket]:
        """Whole tensors of this stage, on all its tensor-parallel ranks, each of which writes its own slices.

        Collective over them. A bucket is read until the one after the next is asked for.
        """
        tp_group = self._crew.mesh.tp_group
        # one's own reference: whoever lets them go after a failure does not stop the others in the middle
        pieces = self._share(piece_sizes(student, self._most))
        for turn, slices in enumerate(buckets(student.stage_slices(), self._most, lambda one: one.plan.bytes)):
            placed = _places([one.plan for one in slices], pieces[turn % 2])
            _all_here(tp_group)  # so the leader is: nobody reads this piece any more
            for one, (_, whole) in zip(slices, placed, strict=True):
                one.place(whole)
            del slices, one
            _all_here(tp_group)
            yield placed

    def forget(self) -> None:
        """Let go of them: a reader that hangs may still hold them; they are gone with the last one who does."""
        self._pieces = []

    def _share(self, sizes: list[int]) -> list[Tensor]:
        """Pieces of so many bytes, the same ones on all tensor-parallel ranks; collective over those."""
        if [piece.nbytes for piece in self._pieces] == sizes:
            return self._pieces
        self.forget()
        mesh = self._crew.mesh
        told: list[list[str] | None] = [None] * mesh.sizes.tp
        failed = None
        if self._crew.leads:
            try:
                self._pieces = [shared(size) for size in sizes]
                # one for each that will open it: whoever unpickles gives a reference back
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
        if not self._crew.leads:
            with by_name(), _kept_from_children():
                self._pieces = [pickle.loads(base64.b64decode(name))[0][1] for name in mine]
        return self._pieces


def fit(crew: Crew, student: HoldsStageWeights, bucket_bytes: int) -> bool:
    """Whether all ranks can share memory, and there is enough for every stage's pieces; collective over all ranks."""
    needed = sum(piece_sizes(student, bucket_bytes // 2)) if crew.leads else 0
    found = crew.mesh.gather_objects((shared_memory(), free_bytes(), needed))
    machines = {memory for memory, _, _ in found}
    return len(machines) == 1 and None not in machines and sum(each for _, _, each in found) < found[0][1]


def shared_memory() -> tuple[str, int] | None:
    """Whose it is: equal for processes that can share some; None where there is none."""
    if not SHARED.is_dir():
        return None
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


def piece_sizes(student: HoldsStageWeights, most_bytes: int) -> list[int]:
    """Bytes of the pieces that this rank's stage needs: two, one if a single bucket holds everything."""
    planned = buckets(student.stage_plan(), most_bytes, lambda plan: plan.bytes)
    sizes = [sum(_aligned(plan.bytes) for plan in plans) for plans in planned]
    return [max(sizes[turn::2]) for turn in range(min(2, len(sizes)))]


def free_bytes() -> int:
    """Of this machine's shared memory."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else 0


def shared(room: int) -> Tensor:
    """Bytes that other processes of this user can open by name.

    Raises:
        SyncError: there is not so much shared memory; touching what is not there would kill the process.
    """
    if (free := free_bytes()) < room:
        raise SyncError(
            f"{SHARED}: {free / 2**20:.0f} MiB of shared memory are free, a bucket takes {room / 2**20:.0f}: make "
            "bucket_mb smaller, give the container more (--shm-size), or use another transport"
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
