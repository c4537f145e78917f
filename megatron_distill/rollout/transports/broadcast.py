"""Weights by broadcast, over a process group of a stage's leader and all servers: gloo between CPUs, NCCL between GPUs.

The group belongs to no world: rank 0 is the leader, whoever the servers are. torch.distributed has no public way to
make such a group, so the two backends' own classes are used. The prefixes of the store's keys are those under which
`torch.distributed` looks for them on the servers' side.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from megatron_distill.errors import RequestRefused, SyncError
from megatron_distill.rollout.sglang import Client
from megatron_distill.rollout.transports.base import Bucketed, Shipment
from megatron_distill.rollout.transports.buckets import Bucket, buckets
from megatron_distill.rollout.transports.crew import Crew
from megatron_distill.rollout.transports.pieces import SharedPieces, fit
from megatron_distill.rollout.transports.switchboard import GRACE_SECONDS, Asked, Switchboard

_LATER = 2 * GRACE_SECONDS
"""Servers may answer so much later than a step of the group may take: see `Broadcast.land`."""
OWN_NAME = "auto"
"""As host: the name of the machine that the leader runs on."""


class Broadcast(Bucketed):
    """One group for each pipeline stage, kept while the servers are the same and hold what was sent."""

    def __init__(
        self,
        crew: Crew,
        bucket_bytes: int,
        *,
        share: bool,
        host: str,
        seconds: float,
        device: torch.device,
    ) -> None:
        """
        Args:
            crew: the ranks.
            bucket_bytes: of buckets at one time.
            share: tensor-parallel ranks fill memory that they share, where they can; else they gather over their group.
            host: address of this machine at which servers join.
            seconds: for joining, and for each bucket.
            device: where tensors are.
        """
        super().__init__(crew)
        self._bucket_bytes = bucket_bytes
        self._pieces = SharedPieces(crew, bucket_bytes) if share and crew.mesh.sizes.tp > 1 else None
        self._shares: bool | None = None
        """Whether they can; None: not looked yet."""
        self._host = socket.gethostname() if host == OWN_NAME else host
        self._seconds = seconds
        self._device = device
        self._group: WeightGroup | None = None
        self._works: list[Any] = []
        self._left: dict[str, list[str]] = {}
        """Groups that this side has left and servers still keep, by server."""

    def prepare(self, shipment: Shipment) -> None:
        if self._shares is None:
            self._shares = self._pieces is not None and fit(self.crew, shipment.student, self._bucket_bytes)
        self.crew.in_turn(lambda: self._meet(shipment))

    def _meet(self, shipment: Shipment) -> None:
        servers = shipment.servers
        if servers is None:
            return
        members = tuple(zip(servers.urls, shipment.tp_sizes, strict=True))
        if self._group is not None and self._group.members == members and not shipment.fresh:
            return
        self._part(servers)
        self._group = WeightGroup.form(
            servers, shipment.tp_sizes, host=self._host, seconds=self._seconds, device=self._device
        )

    def fill(self, shipment: Shipment) -> Iterator[Bucket]:
        if self._shares and self._pieces is not None:
            return self._pieces.fill(shipment.student)
        return buckets(shipment.student.stage_weights(), self._bucket_bytes // 2, lambda named: named[1].nbytes)

    def launch(self, bucket: Bucket, shipment: Shipment) -> Asked[None]:
        group, servers = self._group, shipment.servers
        assert group is not None
        assert servers is not None
        names = [name for name, _ in bucket]
        tensors = [tensor.contiguous() for _, tensor in bucket]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
        shapes = [tuple(tensor.shape) for tensor in tensors]

        async def announce(client: Client) -> None:
            await client.update_distributed(
                names=names, dtypes=dtypes, shapes=shapes, group=group.name, timeout=self._seconds + _LATER
            )

        asked = servers.begin(announce)
        try:
            self._works = [group.broadcast(tensor) for tensor in tensors]
        except RuntimeError as error:
            self._leave()
            raise asked.failure(f"{shipment.what}: {_first_line(error)}") from error
        return asked

    def land(self, asked: Asked[None], shipment: Shipment) -> None:
        # A server answers when it has received and loaded everything. One that is gone says so at once, before the
        # group's own collectives notice (NCCL's would not). One that hangs says nothing, and others may wait for it:
        # when this side hangs up they answer, and it does not.
        if not asked.went_well(self._seconds):
            self._leave()
            raise asked.failure(shipment.what)
        works, self._works = self._works, []
        for work in works:
            work.wait()

    def forget(self) -> None:
        # on every rank, or on none: what ranks share they make together
        if self._pieces is not None:
            self._pieces.forget()
        self._shares = None
        self._leave()

    def _leave(self) -> None:
        """The group, on this rank: servers that wait for the rest of a bucket see it."""
        group, self._group, self._works = self._group, None, []
        if group is not None:
            group.leave()
            for url, _ in group.members:
                self._left.setdefault(url, []).append(group.name)

    def close(self, servers: Switchboard | None) -> None:
        self.forget()
        if servers is not None:
            self._part(servers)

    def _part(self, servers: Switchboard) -> None:
        """Leave the group, and have servers leave it and those before."""
        self._leave()
        left = {url: self._left.pop(url, []) for url in servers.urls}

        async def leave(client: Client) -> None:
            for name in left[client.url]:
                with suppress(RequestRefused):  # a server that was started anew has never heard of it
                    await client.destroy_group(name)

        servers.ask_if_there(leave)


class WeightGroup:
    """A process group of this process, rank 0, and the servers' processes."""

    def __init__(self, name: str, members: tuple[tuple[str, int], ...], group: Any, store: TCPStore) -> None:
        self.name = name
        self.members = members
        self._group = group
        self._store = store

    @staticmethod
    def form(
        servers: Switchboard, tp_sizes: Sequence[int], *, host: str, seconds: float, device: torch.device
    ) -> WeightGroup:
        """Invite the servers and join with them.

        Raises:
            SyncError: they did not all come.
        """
        members = tuple(zip(servers.urls, tp_sizes, strict=True))
        offsets = dict(zip(servers.urls, accumulate(tp_sizes, initial=1), strict=False))
        name, world = f"weights-{uuid4().hex}", 1 + sum(tp_sizes)
        backend = "nccl" if device.type == "cuda" else "gloo"
        store, port = _listen(host, seconds)

        async def invite(client: Client) -> None:
            await client.init_group(
                address=host,
                port=port,
                rank_offset=offsets[client.url],
                world_size=world,
                group=name,
                backend=backend,
                timeout=seconds + _LATER,
            )

        asked = servers.begin(invite)
        joined = _in_thread(lambda: _join(store, name, world, backend, host, seconds))
        wait([joined, *asked.futures.values()], seconds + GRACE_SECONDS, return_when=FIRST_EXCEPTION)
        what = "joining the weight group"
        if not joined.done() or joined.exception() is not None:
            del store  # servers that still wait for one that does not come see it go
            raise asked.failure(what)
        asked.answers(what)
        group = joined.result()
        return WeightGroup(name, members, group, store)

    def broadcast(self, tensor: Tensor) -> Any:
        """From here to all; torch's handle of what is under way."""
        return self._group.broadcast(tensor, 0)

    def leave(self) -> None:
        """Hang up, whatever is under way: servers that wait for the rest of a bucket see it and give up."""
        self._group.abort()
        del self._group, self._store


def _listen(host: str, seconds: float) -> tuple[TCPStore, int]:
    """A store that listens at `host` alone, where torch's own would at every address of the machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError as error:
        raise SyncError(
            f"weight group: cannot listen at {host}: {error}; host must be an address of this machine"
        ) from error
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _join(store: TCPStore, name: str, world: int, backend: str, host: str, seconds: float) -> Any:
    # servers put the name before the store's keys, torch puts it there once more, and then the device
    device = "cuda" if backend == "nccl" else "cpu"
    keys = PrefixStore(f"{device}/", PrefixStore(f"{name}/", PrefixStore(name, store)))
    if backend == "nccl":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=seconds)
        return ProcessGroupNCCL(keys, 0, world, options)
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._threads = 2
    options._timeout = timedelta(seconds=seconds)
    return gloo(keys, 0, world, options)


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """In a thread that nobody has to wait for: joining ends at its own time limit."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except RuntimeError as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weight-group", daemon=True).start()
    return future


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
