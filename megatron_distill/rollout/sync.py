"""New weights from the sharded trainer to SGLang servers, so that none ever serves a mixture of old and new ones.

One push, collective over all ranks:

    while servers write on   what can be prepared: joining the process group, or writing files
    pause                    requests under way are kept and read again later, caches are flushed
    send                     servers are named `updating` from here on, which is no version
    resume                   after every stage's part is in: the version is that of the new weights
    canary                   every server's log-probs of some fixed tokens must be the trainer's

After an error in the middle servers are running again, but named `updating`: whoever asks them sees that their answers
are by no version. They get another push, or are started anew.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_distill.errors import RequestRefused, ServerError, SyncError
from megatron_distill.models.student import Student
from megatron_distill.rollout.canary import Canary, compare, default_tolerance
from megatron_distill.rollout.server_settings import is_loopback
from megatron_distill.rollout.sglang import Address, Client, Limits
from megatron_distill.rollout.transports.base import Shipment, Transport
from megatron_distill.rollout.transports.broadcast import Broadcast
from megatron_distill.rollout.transports.crew import Crew
from megatron_distill.rollout.transports.disk import Disk
from megatron_distill.rollout.transports.pieces import fit
from megatron_distill.rollout.transports.switchboard import Call, Switchboard
from megatron_distill.rollout.transports.tensor import SharedTensors
from megatron_distill.runtime.mesh import Mesh

UPDATING = "updating"
"""The version of a server that holds neither the old weights nor the new ones."""
_CONTROL_SECONDS = 60.0
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncSettings:
    """How weights get to servers."""

    transport: Literal["auto", "broadcast", "tensor", "disk"] = "auto"
    """`broadcast`: over a process group, gloo or NCCL; `tensor`: through shared memory of one machine; `disk`: through
    a folder that trainer and servers share. `auto`: `tensor` where that is the fastest, which is between CPUs of one
    machine with enough shared memory and servers that the run has started, else `broadcast`."""
    bucket_mb: float = 1024
    """MiB of gathered tensors, or of shared memory, that a sending rank holds at most, besides one parameter."""
    timeout_seconds: float = 300
    """Longest that servers may take to join, to receive a bucket, or to read a folder."""
    host: str = "127.0.0.1"
    """Where servers join the group of a broadcast: an address of the sending machine. Loopback, unless servers run
    elsewhere; `auto` is the machine's own name."""
    folder: Path | None = None
    """For `disk`: where the weights are written. Default: in the run folder."""
    canary: bool = True
    """Compare log-probs of fixed tokens after each push."""
    canary_tolerance: float | None = None
    """Largest difference of a log-prob. Default: 0.001 for a trainer in fp32, 0.25 in bf16."""

    def __post_init__(self) -> None:
        checks = {
            "bucket_mb": (self.bucket_mb > 0, "must be above 0"),
            "timeout_seconds": (self.timeout_seconds > 0, "must be above 0"),
            "canary_tolerance": ((self.canary_tolerance or 1) > 0, "must be above 0"),
        }
        for name, (fits, allowed) in checks.items():
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)}: {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One push."""

    bytes: int
    """Of all stages' tensors, once, however many servers took them."""
    seconds: float
    canary: float | None
    """Largest difference of a log-prob between trainer and any server; None if it was not looked at."""


class WeightSync:
    """Built on every rank; one push at a time, while nothing else uses the mesh's groups."""

    def __init__(self, settings: SyncSettings, mesh: Mesh, *, run_folder: Path | None = None) -> None:
        """
        Args:
            settings: section of the config.
            mesh: all ranks.
            run_folder: where files go if the settings name no folder.
        """
        self._settings = settings
        self._crew = Crew(mesh)
        self._run_folder = run_folder
        self._transport: Transport | None = None
        self._canary: Canary | None = None
        self._addresses: tuple[Address, ...] = ()
        self._servers: Switchboard | None = None
        """On leaders, from one push to the next while addresses are the same."""
        self._holds: dict[str, tuple[str, int]] = {}
        """By server: the version that was last sent to it, and how many processes took it."""

    def push(self, student: Student, addresses: Sequence[Address], version: int) -> SyncReport:
        """The student's weights to all servers; collective.

        Args:
            student: holds the weights.
            addresses: of the servers; rank 0's count.
            version: optimizer steps behind the weights.

        Raises:
            SyncError: on every rank alike. `servers` are those that were lost or silent; if there are none, pushing
                again would fail in the same way.
        """
        begun = time.perf_counter()
        self._connect(self._crew.mesh.gather_objects(tuple(addresses))[0])
        if self._transport is None:
            self._transport = self._build(student)
        try:
            shipment = self._shipment(student, version)
            try:
                sent = self._deliver(shipment, self._transport)
            finally:
                self._transport.tidy()
            worst = self._check(student, shipment) if self._settings.canary else None
        except BaseException:
            self._hang_up()  # nothing that a server still answers belongs to the next push
            raise
        total = sum(self._crew.mesh.gather_objects(sent))
        return SyncReport(bytes=total, seconds=time.perf_counter() - begun, canary=worst)

    def close(self) -> None:
        """Leave process groups, on servers too where they are still there; not collective."""
        if self._transport is not None:
            self._connect(self._addresses)
            self._transport.close(self._servers)
            self._transport = None
        self._hang_up()

    # -- one push ----------------------------------------------------------------------------------------------------

    def _shipment(self, student: Student, version: int) -> Shipment:
        servers = self._servers

        def look() -> tuple[tuple[int, ...], bool]:
            if not self._crew.controls or servers is None:
                return (), False
            self._check_addresses()
            told = servers.ask(lambda client: client.version(), "before new weights")
            known = [self._holds.get(url, ("", 0)) for url in servers.urls]
            if [version for version, _ in known] == told:
                return tuple(size for _, size in known), False
            return tuple(servers.ask(lambda client: client.tp_size(), "before new weights")), True

        tp_sizes, fresh = self._crew.mesh.gather_objects(self._crew.agreed(look))[0]
        return Shipment(student=student, version=version, servers=servers, tp_sizes=tp_sizes, fresh=fresh)

    def _deliver(self, shipment: Shipment, transport: Transport) -> int:
        """The bytes that this rank sent. Whatever happens, no server stays paused."""
        touched = ended = False
        try:
            transport.prepare(shipment)
            self._control(shipment, _pause)
            touched = True
            self._control(shipment, lambda client: _open(client, transport.session))
            sent = transport.send(shipment)
            self._control(shipment, lambda client: _shut(client, transport.session, str(shipment.version)))
            ended = True
        except SyncError as error:  # which is the same on every rank
            transport.forget()
            self._crew.mesh.barrier()  # servers answer again only when every stage's leader has hung up
            self._put_right(shipment, transport, touched, lost=error.servers)
            ended = True
            raise
        finally:
            if not ended:
                self._put_right(shipment, transport, touched)
        if shipment.servers is not None:
            held = ((str(shipment.version), size) for size in shipment.tp_sizes)
            self._holds |= dict(zip(shipment.servers.urls, held, strict=True))
        return sent

    def _control(self, shipment: Shipment, call: Call[object]) -> None:
        def tell() -> None:
            if self._crew.controls and shipment.servers is not None:
                shipment.servers.ask(call, shipment.what)

        self._crew.agreed(tell)

    def _put_right(self, shipment: Shipment, transport: Transport, touched: bool, lost: tuple[str, ...] = ()) -> None:
        """After an error: nobody waits for the rest of a bucket, no server stays paused."""
        self._holds.clear()
        if self._crew.controls and shipment.servers is not None:
            shipment.servers.ask_if_there(lambda client: _abandon(client, transport.session, touched), but=lost)

    def _check(self, student: Student, shipment: Shipment) -> float:
        canary = self._canary = self._canary or Canary.of(student.spec.vocab_size, student.spec.max_positions)
        trainer_R = canary.from_trainer(student)
        tolerance = self._settings.canary_tolerance
        if tolerance is None:
            tolerance = default_tolerance(student.network.runtime.precision.torch_dtype)

        def look() -> float:
            if not self._crew.controls or shipment.servers is None:
                return 0.0
            found = shipment.servers.ask(canary.from_server, f"canary after {shipment.what}")
            return max(
                compare(url, trainer_R, server_R, tolerance, shipment.what)
                for url, server_R in zip(shipment.servers.urls, found, strict=True)
            )

        return max(self._crew.mesh.gather_objects(self._crew.agreed(look)))

    # -- what it is made of ------------------------------------------------------------------------------------------

    def _build(self, student: Student) -> Transport:
        settings, backend = self._settings, student.network.runtime.backend
        bucket_bytes, seconds = round(settings.bucket_mb * 2**20), settings.timeout_seconds
        on_cpu, chosen = backend.device.type == "cpu", settings.transport
        if chosen == "auto":
            near = on_cpu and not self._away() and fit(self._crew, student, bucket_bytes)
            chosen = "tensor" if near else "broadcast"
        match chosen:
            case "broadcast":
                return Broadcast(
                    self._crew,
                    bucket_bytes,
                    share=on_cpu,
                    host=settings.host,
                    seconds=seconds,
                    device=backend.device,
                )
            case "tensor":
                return SharedTensors(self._crew, bucket_bytes, seconds=seconds)
            case "disk":
                folder = settings.folder or (self._run_folder and self._run_folder / "weights")
                if folder is None:
                    raise SyncError("transport=disk needs a folder: set folder to one that servers can read")
                return Disk(self._crew, folder, seconds=seconds)

    def _away(self) -> list[str]:
        """Servers that are on other machines, for all that can be seen."""
        return [one.url for one in self._addresses if not is_loopback(urlsplit(one.url).hostname or "")]

    def _check_addresses(self) -> None:
        away = self._away()
        if away and isinstance(self._transport, SharedTensors):
            raise SyncError(
                f"transport=tensor shares memory, and {away[0]} is not on this machine's loopback: use broadcast, or "
                "disk"
            )
        if away and isinstance(self._transport, Broadcast) and is_loopback(self._settings.host):
            raise SyncError(
                f"{away[0]} cannot join a weight group that listens at host={self._settings.host}: set host to an "
                "address of this machine that servers reach, on a network that is yours alone"
            )

    def _connect(self, addresses: tuple[Address, ...]) -> None:
        """To servers other than those of the last push."""
        if self._servers is not None and self._addresses == addresses:
            return
        self._hang_up()
        self._addresses = addresses
        if not self._crew.leads or not addresses:
            return
        seconds = self._settings.timeout_seconds
        limits = Limits(
            request_seconds=seconds,
            control_seconds=min(seconds, _CONTROL_SECONDS),
            update_seconds=seconds,
            connect_seconds=min(seconds, _CONNECT_SECONDS),
        )
        self._servers = Switchboard(addresses, limits)

    def _hang_up(self) -> None:
        if self._servers is not None:
            self._servers.close()
            self._servers = None


async def _pause(client: Client) -> None:
    await client.pause("retract")
    await client.flush_cache()


async def _open(client: Client, session: bool) -> None:
    await client.set_version(UPDATING)
    if not session:
        return
    try:
        await client.begin_update()
    except RequestRefused:
        # a session that was never ended: by a trainer that died, or while the server hung
        await client.end_update()
        await client.begin_update()


async def _shut(client: Client, session: bool, version: str) -> None:
    if session:
        await client.end_update()
    await client.flush_cache()
    await client.set_version(version)
    await client.resume()


async def _tried(call: Coroutine[Any, Any, object]) -> None:
    with contextlib.suppress(ServerError):
        await call


async def _abandon(client: Client, session: bool, touched: bool) -> None:
    """Each step by itself: that one fails must not keep the last one back."""
    if touched:
        # their responses would go on with weights of no version
        await _tried(client.abort_all())
        if session:
            await _tried(client.end_update())
        await _tried(client.flush_cache())
    await _tried(client.resume())
