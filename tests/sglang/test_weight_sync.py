"""Weights of a sharded student in real servers: log-probs agree after every update, and no half update is served."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.errors import SyncError, WrongWeights
from megatron_distill.models.hf.stage import Slice
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.sft import SFT
from megatron_distill.rollout.base import Completion, Given, Request, Sampling
from megatron_distill.rollout.canary import Canary
from megatron_distill.rollout.servers import ServerGroup, ServerSettings
from megatron_distill.rollout.sglang import Address, Client
from megatron_distill.rollout.sync import UPDATING, SyncSettings, WeightSync
from megatron_distill.rollout.transports.broadcast import Broadcast
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import Runtime, start
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.testing.world import Worlds
from megatron_distill.train.step import bind
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop, TokenStats
from tests.busy import until_writing

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

ROWS = ((5, 6, 7, 8, 9, 10, 11, 12), (200, 150, 100, 50, 3, 199, 4, 198, 31, 32, 33), tuple(range(3, 180)))
TOLERANCE = 1e-4
STOP_IDS = (2,)
LAYOUTS = {"tp=2": ParallelSizes(tp=2, sequence_parallel=True), "pp=2": ParallelSizes(pp=2)}
TRANSPORTS = ("broadcast", "tensor", "disk")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary divides by nothing, so that padding must go, and whose head is its embedding."""
    return tiny_model(
        tmp_path_factory.mktemp("sync") / "student", "qwen3", tied=True, vocab_size=201, layers=4, kv_heads=2
    )


@pytest.fixture(scope="module")
def breakable(server_python: Path, tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerGroup]:
    """Servers of it that tests may break: whoever needs them starts them again."""
    settings = ServerSettings(count=2, python=server_python)
    with ServerGroup(settings, tied, "cpu", logs=tmp_path_factory.mktemp("logs")) as group:
        yield group


# -- on the ranks ------------------------------------------------------------------------------------------------------


@contextmanager
def syncing(
    folder: Path, sizes: ParallelSizes, settings: SyncSettings, kind: type[Student] = Student
) -> Iterator[tuple[Runtime, Any, WeightSync]]:
    with start(sizes, Precision()) as runtime:
        built = Student.build(StudentSection(model=folder), OptimizerSection(lr=1e-2), runtime, steps=10)
        student = kind(**{field.name: getattr(built, field.name) for field in fields(Student)})
        sync = WeightSync(settings, runtime.mesh)
        yield runtime, student, sync
        sync.close()


def gather(sync: WeightSync, settings: SyncSettings) -> None:
    """A broadcast as from ranks that share no memory."""
    sync._transport = Broadcast(
        sync._crew,
        round(settings.bucket_mb * 2**20),
        share=False,
        host=settings.host,
        seconds=settings.timeout_seconds,
        device=torch.device("cpu"),
    )


def learn(student: Student, runtime: Runtime, version: int) -> None:
    """One optimizer step that moves every log-prob."""
    scored = [
        Scored(
            rollout=Rollout(
                prompt=Prompt(id=str(index), messages=(), tokens=row[:2]),
                group=str(index),
                sample=0,
                tokens=row[2:],
                logprobs=None,
                origin=(Origin.CONSTRUCTED,) * (len(row) - 2),
                stop=Stop.LENGTH,
                version=version,
            ),
            reward=None,
        )
        for index, row in enumerate(ROWS)
    ]
    mesh = runtime.mesh
    batch = pack(
        scored,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.sizes.dp,
        tokens_per_micro_batch=256,
        sequence_multiple=mesh.sizes.sequence_multiple,
        total_multiple=mesh.sizes.total_multiple,
        device=torch.device("cpu"),
        version=version,
    )
    objective = SFT()
    plan, _ = objective.prepare(TokenStats(), batch, Scope(seed=0, step=0), {})
    student.step(batch, bind(objective, {}, plan, batch, student.partition))


def differences(student: Student, urls: Sequence[str]) -> tuple[float, list[str]]:
    """Largest difference of any token's log-prob on any server, and the versions that servers claim; collective."""
    trainer = [Canary(row).from_trainer(student) for row in ROWS]
    if student.mesh.rank != 0:
        return 0.0, []
    worst, versions = 0.0, []
    for url in urls:
        found = asyncio.run(served(url))
        worst = max(worst, *(float(np.abs(one - two).max()) for one, (two, _) in zip(trainer, found, strict=True)))
        versions.append(found[0][1])
    return worst, versions


async def served(url: str) -> list[tuple[np.ndarray, str]]:
    async with Client(Address(url)) as client:
        scores = [await client.score(Given(tokens=row, start=1), rid=f"row-{n}") for n, row in enumerate(ROWS)]
    return [(one.logprobs, one.version) for one in scores]


def three_updates(
    folder: Path, sizes: ParallelSizes, settings: SyncSettings, urls: list[str], gathers: bool = False
) -> tuple[list[float], list[float], list[list[str]], list[Any]]:
    """Of each version: differences after its push and, before it, those of the version before; versions; groups."""
    stale, fresh, versions, groups = [], [], [], []
    with syncing(folder, sizes, settings) as (runtime, student, sync):
        if gathers:
            gather(sync, settings)
        for version in range(4):
            if version:
                learn(student, runtime, version)
                stale.append(differences(student, urls)[0])
            report = sync.push(student, [Address(url) for url in urls], version)
            worst, claimed = differences(student, urls)
            fresh.append(worst)
            versions.append(claimed)
            groups.append(getattr(getattr(sync._transport, "_group", None), "name", None))
            assert report.bytes == sum(
                tensor.bytes
                for plan in runtime.mesh.gather_objects(
                    student.stage_plan() if runtime.mesh.tp_rank == 0 and runtime.mesh.dp_rank == 0 else []
                )
                for tensor in plan
            )
            assert report.canary is not None
    return stale, fresh, versions, groups


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_servers_follow_three_updates(
    worlds: Worlds, served: ServerGroup, tiny_served: Path, tmp_path: Path, transport: Any, layout: str
) -> None:
    sizes = LAYOUTS[layout]
    (other := tmp_path / "weights_of_mine").mkdir()
    # buckets far smaller than the model, and smaller than its largest tensor
    settings = SyncSettings(transport=transport, bucket_mb=0.04, folder=tmp_path, timeout_seconds=60)
    by_rank = worlds(sizes.world).run(three_updates, tiny_served, sizes, settings, served.urls, init=False, timeout=240)
    stale, fresh, versions, groups = by_rank[0]
    print(f"{transport} {layout}: before {[f'{one:.2g}' for one in stale]}, after {[f'{one:.2g}' for one in fresh]}")
    assert max(fresh) <= TOLERANCE
    assert min(stale) > 100 * TOLERANCE  # each update could be seen, and was not there before its push
    assert versions == [[str(version)] * 2 for version in range(4)]
    assert len(set(groups)) == 1  # the group was kept
    assert list(tmp_path.iterdir()) == [other]  # nothing of a push stays on disk, and nothing else is removed


def test_a_broadcast_from_ranks_that_share_no_memory(worlds: Worlds, served: ServerGroup, tiny_served: Path) -> None:
    sizes, settings = LAYOUTS["tp=2"], SyncSettings(transport="broadcast", bucket_mb=0.04, timeout_seconds=60)
    by_rank = worlds(2).run(three_updates, tiny_served, sizes, settings, served.urls, True, init=False, timeout=240)
    stale, fresh, versions, _ = by_rank[0]
    assert max(fresh) <= TOLERANCE < 100 * TOLERANCE < min(stale)
    assert versions == [[str(version)] * 2 for version in range(4)]


def to_some(
    folder: Path, sizes: ParallelSizes, settings: SyncSettings, urls: list[str]
) -> list[tuple[float, list[str]]]:
    """Differences and versions after pushes to all servers, to one, and to all again."""
    found = []
    with syncing(folder, sizes, settings) as (runtime, student, sync):
        for version, to in enumerate([urls, urls[:1], urls]):
            if version:
                learn(student, runtime, version)
            sync.push(student, [Address(url) for url in to], version)
            found.append(differences(student, to))
    return found


@pytest.mark.parametrize("transport", ["broadcast", "tensor"])
def test_other_servers_than_before(worlds: Worlds, served: ServerGroup, tiny_served: Path, transport: Any) -> None:
    settings = SyncSettings(transport=transport, bucket_mb=0.04, timeout_seconds=60)
    found = worlds(2).run(to_some, tiny_served, LAYOUTS["tp=2"], settings, served.urls, init=False, timeout=120)[0]
    assert max(worst for worst, _ in found) <= TOLERANCE
    assert [versions for _, versions in found] == [["0", "0"], ["1"], ["2", "2"]]


def taken(folder: Path, sizes: ParallelSizes, urls: list[str]) -> str:
    """The kind of transport that a push takes where none is asked for."""
    with syncing(folder, sizes, SyncSettings(timeout_seconds=60)) as (_, student, sync):
        sync.push(student, [Address(url) for url in urls], 0)
        return type(sync._transport).__name__


def test_between_cpus_of_one_machine_weights_go_through_shared_memory(
    worlds: Worlds, served: ServerGroup, tiny_served: Path
) -> None:
    found = worlds(2).run(taken, tiny_served, LAYOUTS["tp=2"], served.urls, init=False, timeout=120)
    assert found == ["SharedTensors"] * 2


def push_under_requests(
    folder: Path, sizes: ParallelSizes, settings: SyncSettings, urls: list[str]
) -> tuple[float, list[Completion]]:
    """Weights change while every server writes: the requests go on with the new ones."""
    with syncing(folder, sizes, settings) as (runtime, student, sync):
        addresses = [Address(url) for url in urls]
        sync.push(student, addresses, 0)
        learn(student, runtime, 1)
        written: list[Completion] = []
        under_way = threading.Event()

        async def write() -> None:
            async with Client(addresses[0], stop_ids=STOP_IDS) as one, Client(addresses[1], stop_ids=STOP_IDS) as two:
                sampling = Sampling(temperature=1.0, max_new_tokens=380)
                requests = [Request(tokens=ROWS[0], sampling=sampling, key=(n,)) for n in range(4)]
                asked = asyncio.gather(
                    *(
                        client.generate(request, f"{client.url}-{n}")
                        for client in (one, two)
                        for n, request in enumerate(requests)
                    )
                )
                await asyncio.gather(*map(until_writing, (one, two)))
                under_way.set()
                written.extend(await asked)

        writing = threading.Thread(target=lambda: asyncio.run(write()))
        if runtime.mesh.rank == 0:
            writing.start()
            assert under_way.wait(60)
        runtime.mesh.barrier()
        sync.push(student, addresses, 1)
        worst, _ = differences(student, urls)
        if runtime.mesh.rank == 0:
            writing.join()
        return worst, written


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_requests_under_way_go_on_with_the_new_weights(
    worlds: Worlds, served: ServerGroup, tiny_served: Path, tmp_path: Path, transport: Any
) -> None:
    settings = SyncSettings(transport=transport, folder=tmp_path, timeout_seconds=60)
    sizes = LAYOUTS["tp=2"]
    by_rank = worlds(2).run(push_under_requests, tiny_served, sizes, settings, served.urls, init=False, timeout=240)
    worst, written = by_rank[0]
    assert worst <= TOLERANCE
    assert len(written) == 8
    assert {one.stop for one in written} <= {Stop.LENGTH, Stop.EOS}  # none was aborted
    for one in written:
        assert one.versions == tuple(sorted(one.versions))
        assert set(one.versions) <= {0, 1}
    assert any(set(one.versions) == {0, 1} for one in written)


class Forgetful(Student):
    """A student whose stream lacks a tensor."""

    def stage_weights(self) -> Iterator[tuple[str, Tensor]]:
        return (named for named in super().stage_weights() if not named[0].endswith("0.mlp.down_proj.weight"))


def push_less_than_all(folder: Path, sizes: ParallelSizes, settings: SyncSettings, urls: list[str]) -> SyncError:
    with syncing(folder, sizes, settings) as (runtime, student, sync):
        sync.push(student, [Address(url) for url in urls], 0)
        learn(student, runtime, 1)
        student = Forgetful(**{field.name: getattr(student, field.name) for field in fields(Student)})
        with pytest.raises(SyncError) as caught:
            sync.push(student, [Address(url) for url in urls], 7)
        return caught.value


def test_the_canary_sees_a_tensor_that_did_not_arrive(worlds: Worlds, served: ServerGroup, tiny_served: Path) -> None:
    settings = SyncSettings(transport="broadcast", timeout_seconds=60)
    for error in worlds(2).run(
        push_less_than_all, tiny_served, LAYOUTS["pp=2"], settings, served.urls, init=False, timeout=120
    ):
        assert "log-probs that differ by up to" in str(error)
        assert "weights of step 7" in str(error)
        assert error.servers == ()


def listeners(pids: Sequence[int]) -> set[tuple[int, str, int]]:
    """Process, address and port of every socket that a process or its children listen at."""
    family = {one for pid in pids for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))}
    return {
        (one.pid, socket.laddr.ip, socket.laddr.port)
        for one in family
        for socket in one.net_connections(kind="inet")
        if socket.status == psutil.CONN_LISTEN
    }


def listening(
    folder: Path, sizes: ParallelSizes, settings: SyncSettings, urls: list[str], pids: list[int]
) -> tuple[set[str], set[str]]:
    """Addresses at which this rank listens, and those at which servers listen since they joined the group."""
    with syncing(folder, sizes, settings) as (runtime, student, sync):
        before = listeners(pids)
        runtime.mesh.barrier()
        sync.push(student, [Address(url) for url in urls], 0)
        mine, theirs = listeners([os.getpid()]), listeners(pids) - before
        runtime.mesh.barrier()
        return {ip for _, ip, _ in mine}, {ip for _, ip, _ in theirs}


def test_the_weight_group_listens_on_loopback_alone(worlds: Worlds, served: ServerGroup, tiny_served: Path) -> None:
    settings = SyncSettings(transport="broadcast", timeout_seconds=60)
    pids = [process.pid for process in served.processes]
    for mine, theirs in worlds(2).run(
        listening, tiny_served, LAYOUTS["pp=2"], settings, served.urls, pids, init=False, timeout=120
    ):
        assert mine == {"127.0.0.1"}
        assert theirs == {"127.0.0.1"}


# -- what breaks -------------------------------------------------------------------------------------------------------


def full_disk(
    folder: Path, sizes: ParallelSizes, settings: SyncSettings, urls: list[str], most_bytes: int | None
) -> tuple[str, float, list[str], float]:
    """A push that finds no room: the error, how servers then agree with the old weights; and after a push with room."""
    with syncing(folder, sizes, settings) as (runtime, student, sync):
        addresses = [Address(url) for url in urls]
        before = WeightSync(SyncSettings(transport="broadcast", timeout_seconds=60), runtime.mesh)
        before.push(student, addresses, 0)
        old = [Canary(row).from_trainer(student) for row in ROWS]
        learn(student, runtime, 1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
        try:
            with pytest.raises(SyncError) as caught:
                sync.push(student, addresses, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        worst, claimed = 0.0, []
        if runtime.mesh.rank == 0:
            for url in urls:
                for one, (two, version) in zip(old, asyncio.run(served(url)), strict=True):
                    worst = max(worst, float(np.abs(one - two).max()))
                    claimed.append(version)
        runtime.mesh.barrier()
        assert caught.value.servers == ()
        before.push(student, addresses, 1)
        after, _ = differences(student, urls)
        before.close()
        return str(caught.value), worst, claimed, after


@pytest.fixture(params=["a file may not grow so large", "a file system without room"])
def no_room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, int | None]]:
    if "file system" not in request.param:
        yield tmp_path, 100_000
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        yield tmp_path, None
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_leaves_servers_with_the_old_weights(
    worlds: Worlds, served: ServerGroup, tiny_served: Path, no_room: tuple[Path, int | None], layout: str
) -> None:
    where, most_bytes = no_room
    settings = SyncSettings(transport="disk", folder=where, timeout_seconds=60)
    by_rank = worlds(2).run(
        full_disk, tiny_served, LAYOUTS[layout], settings, served.urls, most_bytes, init=False, timeout=240
    )
    for message, *_ in by_rank:
        assert f"{where}: cannot write new weights there" in message
        assert ("No space left" if most_bytes is None else "File too large") in message
    _, worst, claimed, after = by_rank[0]
    assert worst <= TOLERANCE
    assert set(claimed) == {"0"}
    assert after <= TOLERANCE
    assert list(where.iterdir()) == []


class Breaking(Student):
    """A student in the middle of whose stream something happens to a server."""

    def stage_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.breaking(super().stage_weights())

    def stage_slices(self) -> Iterator[Slice]:
        return self.breaking(super().stage_slices())

    def breaking[T](self, stream: Iterator[T]) -> Iterator[T]:
        for number, one in enumerate(stream):
            if number == 20 and BREAK and self.mesh.rank == 0:
                os.killpg(*BREAK.pop())
                time.sleep(0.5)
            yield one


BREAK: list[tuple[int, int]] = []
"""Process group and signal, in the process of rank 0."""


async def half_updated(url: str) -> tuple[str, bool]:
    """What a server says it holds, and whether its answers are refused; it must answer soon."""
    async with asyncio.timeout(30), Client(Address(url)) as client:
        version = (await client.info()).weight_version
        try:
            await client.generate(Request(tokens=ROWS[0], sampling=Sampling(max_new_tokens=4), key=(0,)), "after")
        except WrongWeights:
            return version, True
    return version, False


def push_while_one_breaks(
    folder: Path, sizes: ParallelSizes, settings: SyncSettings, urls: list[str], group: int, what: int, gathers: bool
) -> tuple[SyncError, float, tuple[str, bool] | None, float]:
    """The error and its seconds; what the other server then says; differences after a push to that one alone."""
    with syncing(folder, sizes, settings, Breaking) as (runtime, student, sync):
        if gathers:
            gather(sync, settings)
        addresses = [Address(url) for url in urls]
        sync.push(student, addresses, 0)
        learn(student, runtime, 1)
        BREAK[:] = [(group, what)]
        begun = time.monotonic()
        with pytest.raises(SyncError) as caught:
            sync.push(student, addresses, 1)
        seconds = time.monotonic() - begun
        half = asyncio.run(half_updated(urls[0])) if runtime.mesh.rank == 0 else None
        runtime.mesh.barrier()
        sync.push(student, addresses[:1], 1)
        worst, claimed = differences(student, urls[:1])
        assert claimed == (["1"] if runtime.mesh.rank == 0 else [])
        return caught.value, seconds, half, worst


@pytest.mark.parametrize(
    ("transport", "gathers", "what", "layout"),
    [
        ("broadcast", True, signal.SIGSTOP, "tp=2"),
        ("broadcast", False, signal.SIGKILL, "tp=2"),
        ("broadcast", False, signal.SIGKILL, "pp=2"),
        ("tensor", False, signal.SIGKILL, "tp=2"),
    ],
    ids=["gathered broadcast stopped tp=2", "broadcast killed tp=2", "broadcast killed pp=2", "tensor killed tp=2"],
)
def test_a_server_that_breaks_in_the_middle_is_named_and_the_others_go_on(
    worlds: Worlds,
    breakable: ServerGroup,
    tied: Path,
    transport: Any,
    gathers: bool,
    what: signal.Signals,
    layout: str,
) -> None:
    victim, sizes = breakable.processes[1], LAYOUTS[layout]
    if not victim.alive():
        victim.restart()
    settings = SyncSettings(transport="disk", folder=tied.parent / "weights", timeout_seconds=60)
    all_well = worlds(2).run(three_updates, tied, sizes, settings, breakable.urls, init=False, timeout=180)
    assert max(all_well[0][1]) <= TOLERANCE  # also of a server that was broken by the test before
    settings = SyncSettings(transport=transport, bucket_mb=0.04, timeout_seconds=5)
    by_rank = worlds(2).run(
        push_while_one_breaks,
        tied,
        sizes,
        settings,
        breakable.urls,
        victim.pid,
        int(what),
        gathers,
        init=False,
        timeout=120,
    )
    if what == signal.SIGSTOP:
        os.killpg(victim.pid, signal.SIGCONT)
    else:
        victim.kill()
    for error, seconds, _, worst in by_rank:
        print(f"{transport} {what.name} {layout}: {seconds:.1f} s: {error}")
        assert error.servers == (victim.url,)
        assert victim.url in str(error)
        assert seconds < 30
        assert worst <= TOLERANCE
    assert by_rank[0][2] == (UPDATING, True)
