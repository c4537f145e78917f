"""A teacher behind a real SGLang server against the same model beside the student: same losses, same gradients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.data.phrases import Phrases
from megatron_distill.data.templates import load_tokenizer, render
from megatron_distill.errors import EngineError, EngineStopped
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.schedule import forward_backward
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.objectives.base import Objective, Scope
from megatron_distill.objectives.gkd import GKD
from megatron_distill.objectives.opd import OPD
from megatron_distill.rollout.base import Given
from megatron_distill.rollout.servers import ServerGroup, ServerSettings
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import start
from megatron_distill.teachers._views import Privileged, Revision, View
from megatron_distill.teachers.base import Teacher, TeacherPart
from megatron_distill.teachers.frozen import FrozenPart
from megatron_distill.teachers.remote import RemotePart, RemoteTeacher
from megatron_distill.testing.tiny import BYTE_VOCAB_SIZE, tiny_model, tiny_tokenizer
from megatron_distill.testing.world import Worlds
from megatron_distill.train.step import bind, token_stats
from megatron_distill.types import Batch, Origin, Prompt, Rollout, Scored, Stop, Token, TopK

pytestmark = pytest.mark.sglang

RESPONSES = ("four", "it is 17", "so: 5\n", "", "2+2 is 4", "no idea at all", "a")
PADDING = 21
"""Rows of the teacher's output that stand for no id of the run."""
V = BYTE_VOCAB_SIZE
TIMEOUT = 600
"""Seconds for one question to the workers; a server's start is among them."""
LAYOUTS = {
    "tp=2": ParallelSizes(tp=2),
    "pp=2": ParallelSizes(pp=2),
    "cp=2": ParallelSizes(cp=2),
    "dp=2": ParallelSizes(dp=2),
}
VIEWS = {
    "same": View(),
    "privileged": View(privileged=Privileged(template="{problem} ({solution})")),
    "revision": View(revision=Revision(phrases=Phrases(right="Good.", wrong="Wrong, once more:"))),
}
WHOLE: dict[str, tuple[Objective, Objective]] = {
    "reverse KL": (
        OPD(divergence="reverse_kl"),
        OPD(divergence="reverse_kl", support="top_k", top_k=V),
    ),
    "forward KL": (GKD(beta=0.0), GKD(beta=0.0, support="top_k", top_k=V)),
    "JSD": (GKD(beta=0.3), GKD(beta=0.3, support="top_k", top_k=V)),
}
"""Of a teacher that gives everything, and of one that names every id."""
PART: dict[str, tuple[Objective, Objective]] = {
    "forward KL of 8 ids and a tail": (GKD(beta=0.0, support="top_k", top_k=8),) * 2,
    "reverse KL of 8 ids and a tail": (OPD(divergence="reverse_kl", support="top_k", top_k=8),) * 2,
    "sampled token": (OPD(), OPD()),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    tiny_model(root / "student", "qwen3", tied=True, hidden=32, heads=4, kv_heads=4)
    tiny_model(root / "teacher", "llama", hidden=64, heads=8, kv_heads=4, vocab_size=V + PADDING, seed=3)
    for name in ("student", "teacher"):
        tiny_tokenizer(root / name)
    return root


@pytest.fixture(scope="module")
def server(root: Path, server_python: Path) -> Iterator[str]:
    with ServerGroup(
        ServerSettings(python=server_python), root / "teacher", "cpu", name="teacher", logs=root / "logs"
    ) as group:
        yield group.urls[0]


def scored_of(folder: Path) -> list[Scored]:
    tokenizer = load_tokenizer(folder)
    found = []
    for number, text in enumerate(RESPONSES):
        messages = ({"role": "user", "content": f"{number // 2} and {number}?"},)
        end = (2,) if number % 3 != 1 else ()
        tokens = (*tokenizer(text, add_special_tokens=False)["input_ids"], *end)
        rollout = Rollout(
            prompt=Prompt(
                id=str(number),
                messages=messages,
                tokens=render(tokenizer, messages),
                hints={"solution": "x" * (3 * number + 1)},
            ),
            group=str(number),
            sample=0,
            tokens=tokens,
            logprobs=tuple(-1.0 - 0.1 * place for place in range(len(tokens))),
            origin=(Origin.STUDENT,) * len(tokens),
            stop=Stop.EOS if end else Stop.LENGTH,
            version=0,
            text=text,
        )
        found.append(Scored(rollout=rollout, reward=float(number % 2)))
    return found


class Here:
    """A student on this rank, and what its teachers make of one step."""

    def __init__(self, root: Path, sizes: ParallelSizes, runtime: Any) -> None:
        self.root, self.sizes, self.runtime = root, sizes, runtime
        self.tokenizer = load_tokenizer(root / "student")
        self.student = Student.build(
            StudentSection(model=root / "student"), OptimizerSection(), runtime, steps=10, chunk_rows=16, valid_vocab=V
        )

    def connect(self, part: TeacherPart) -> Teacher:
        return part.connect(self.student, self.tokenizer, self.root / "own logs")

    def remote(self, url: str, **settings: Any) -> RemoteTeacher:
        part = RemotePart(model=self.root / "teacher", urls=(url,) if url else (), **settings)
        return part.connect(self.student, self.tokenizer, self.root / "own logs")

    def batch(self, teacher: Teacher) -> Batch:
        return pack(
            teacher.fit(scored_of(self.root / "student")),
            dp_rank=self.runtime.mesh.dp_rank,
            dp_size=self.sizes.dp,
            tokens_per_micro_batch=80,
            sequence_multiple=self.sizes.sequence_multiple,
            total_multiple=self.sizes.total_multiple,
            device=torch.device("cpu"),
            version=0,
        )

    def learn(self, objective: Objective, teacher: Teacher) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss of the step, and this rank's share of the gradient."""
        batch, network = self.batch(teacher), self.student.network
        signals = {"big": teacher.signal(batch)}
        stats = token_stats(self.student, batch, signals, objective.needs, objective.temperature)
        scope = Scope(seed=0, step=0, data_group=self.runtime.mesh.groups.dp)
        plan, _ = objective.prepare(stats, batch, scope, {})
        network.module.train()
        with self.runtime.backend.megatron():
            network.module.zero_grad_buffer()
        loss = bind(objective, signals, plan, batch, self.student.partition)
        sums = forward_backward(network, batch, loss, self.student.chunk_rows)
        return sum(sums.values()), {name: one.main_grad.clone() for name, one in network.parameters().items()}

    def differ(self, objectives: tuple[Objective, Objective], frozen: Teacher, remote: Teacher) -> tuple[float, float]:
        """Relative error of loss and gradient."""
        loss, gradient = self.learn(objectives[0], frozen)
        other_loss, other = self.learn(objectives[1], remote)
        largest = max(float(one.abs().max()) for one in gradient.values())
        error = max(float((one - other[name]).abs().max()) for name, one in gradient.items())
        assert largest > 1e-4, "there is no gradient to compare"
        return abs(other_loss - loss) / abs(loss), error / largest


@contextmanager
def here(root: Path, sizes: ParallelSizes) -> Iterator[Here]:
    with start(sizes, Precision(dtype="fp32")) as runtime:
        yield Here(root, sizes, runtime)


# --- what it says -----------------------------------------------------------------------------------------------------


def compare(root: Path, url: str, sizes: ParallelSizes, views: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    with here(root, sizes) as world:
        found = {}
        for view in views:
            frozen = world.connect(FrozenPart(model=root / "teacher", view=VIEWS[view]))
            whole = world.remote(url, top_k=V, view=VIEWS[view])
            found |= {f"{view}, {name}": world.differ(both, frozen, whole) for name, both in WHOLE.items()}
            if view != "same":
                continue
            some, token = world.remote(url, top_k=8), world.remote(url)
            for name, both in PART.items():
                found[name] = world.differ(both, frozen, token if name == "sampled token" else some)
        return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_teaches_what_the_same_model_beside_the_student_teaches(
    worlds: Worlds, root: Path, server: str, layout: str
) -> None:
    sizes = LAYOUTS[layout]
    views = tuple(VIEWS) if layout == "tp=2" else ("same",)
    for found in worlds(sizes.world).run(compare, root, server, sizes, views, init=False, timeout=TIMEOUT):
        for name, (loss, gradient) in found.items():
            print(f"{layout}: {name}: loss {loss:.1e}, gradient {gradient:.1e}")
            assert loss <= 1e-4, name
            assert gradient <= 1e-4, name


def hear(root: Path, url: str) -> dict[str, Any]:
    """Signals of one replica, in the teacher's own context and another."""
    with here(root, ParallelSizes()) as world:
        heard: dict[str, Any] = {}
        whole, token = world.remote(url, top_k=V), world.remote(url)
        heard["longest"] = whole.introduced.longest
        for micro, all_ids, one_id in zip(
            (batch := world.batch(whole)).micro, whole.signal(batch), token.signal(batch), strict=True
        ):
            assert isinstance(all_ids, TopK)
            assert isinstance(one_id, Token)
            heard.setdefault("sum", []).extend(all_ids.top_logp_RK.double().exp().sum(-1).tolist())
            heard.setdefault("ids", set()).update(all_ids.ids_RK.sort(-1).values.unique(dim=0).flatten().tolist())
            named_R = all_ids.top_logp_RK.gather(
                -1, (all_ids.ids_RK == micro.target_R[:, None]).int().argmax(-1)[:, None]
            )
            heard.setdefault("errors", []).extend((named_R[:, 0] - one_id.logp_R).abs().tolist())
            heard["errors"] += (all_ids.logp_R - one_id.logp_R).abs().tolist()
        heard["cached"] = asyncio.run(read_again(whole, batch))
        short = world.remote(url, view=View(max_tokens=30))
        heard["cut"] = [len(one.rollout.tokens) for micro in world.batch(short).micro for one in micro.sequences]
        assert [one.rows for one in world.batch(short).micro] == [
            len(signal.logp_R) for signal in short.signal(world.batch(short))
        ]
        return heard


async def read_again(teacher: RemoteTeacher, batch: Batch) -> list[tuple[int, int]]:
    """Tokens before each response, and how many tokens the server remembers of the last time."""
    found = []
    async with teacher.served.client(teacher.addresses[0]) as client:
        for micro in batch.micro:
            for one in micro.sequences:
                prompt, response = one.rollout.prompt.tokens, one.rollout.tokens
                said = await client.score(Given(tokens=(*prompt, *response), start=len(prompt)), rid="again")
                found.append((len(prompt), said.cached))
    return found


def test_all_ids_are_the_whole_distribution_without_those_that_only_the_teacher_has(
    worlds: Worlds, root: Path, server: str
) -> None:
    (heard,) = worlds(1).run(hear, root, server, init=False, timeout=TIMEOUT)
    assert 500 < heard["longest"] < 512
    assert max(abs(total - 1) for total in heard["sum"]) < 1e-5
    assert heard["ids"] == set(range(V))
    assert all(remembered == before - 1 for before, remembered in heard["cached"]), "prompts are read again"
    assert max(heard["errors"]) < 1e-5
    assert sum(heard["cut"]) < sum(len(one.rollout.tokens) for one in scored_of(root / "student"))


# --- servers that are the wrong ones ----------------------------------------------------------------------------------


def refuse(root: Path, url: str) -> list[str]:
    with here(root, ParallelSizes()) as world:
        found = []
        for settings in (
            {"model": root / "student"},
            {"model": root / "student", "served_as": str((root / "teacher").resolve())},
        ):
            with pytest.raises(EngineError) as caught:
                world.connect(RemotePart(urls=(url,), **settings))
            found.append(str(caught.value))
        remote = world.remote(url)
        batch = world.batch(remote)
        remote.signal(batch)
        name_weights(url, "7")
        try:
            with pytest.raises(EngineStopped) as stopped:
                remote.signal(batch)
            found.append(str(stopped.value))
        finally:
            name_weights(url, "default")
        remote.signal(batch)
        return found


def name_weights(url: str, version: str) -> None:
    """What a trainer does that takes a teacher's server for its own."""
    body = json.dumps({"new_version": version, "abort_all_requests": False}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/update_weight_version", body, headers)) as answer:
        assert answer.status == 200


def test_servers_of_another_model_are_refused(worlds: Worlds, root: Path, server: str) -> None:
    ((path, family, version),) = worlds(1).run(refuse, root, server, init=False, timeout=TIMEOUT)
    assert f"{server}: serves {root / 'teacher'}, the teacher is {root / 'student'}" in path
    assert f"{server}: serves a ['LlamaForCausalLM']" in family
    assert "answered as '7': all servers of a teacher must hold one model" in version


# --- servers that break -----------------------------------------------------------------------------------------------


class Relay:
    """A second address of a server that can be taken away, or made to say nothing; the server itself stays well."""

    def __init__(self, url: str) -> None:
        self.target = (urlsplit(url).hostname, urlsplit(url).port)
        self.silent = False
        self.fragile = False
        """Whether it dies of the next scoring request, to be there again at once."""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.open: list[socket.socket] = []
        self.up()

    def up(self) -> None:
        if self.listener.fileno() < 0:
            self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def down(self) -> None:
        """As when a process is killed: nobody listens, and whoever is connected is cut off."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for one in self.open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes whoever reads it; closing alone would not
            one.close()
        self.open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self.target)
                self.open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                while self.silent:
                    time.sleep(0.05)
                if self.fragile and b"logprob_start_len" in data:
                    self.fragile = False
                    self.down()
                    self.up()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def survive(root: Path, url: str) -> dict[str, Any]:
    """The rank that asks is the second, the one that looks after servers the first."""
    with here(root, ParallelSizes(pp=2)) as world:
        mesh = world.runtime.mesh
        relay = Relay(url) if mesh.rank == 0 else None
        there = mesh.gather_objects(relay.url if relay else "")[0]
        settings: dict[str, Any] = {"top_k": 4, "silent_seconds": 4.0, "most_restarts": 2}
        settings["served_as"] = str((root / "teacher").resolve())
        part = RemotePart(model=root / "teacher", urls=(url, there), **settings)
        both, alone = world.connect(part), world.connect(replace(part, urls=(there,)))
        assert isinstance(both, RemoteTeacher)
        assert isinstance(alone, RemoteTeacher)
        batch = world.batch(both)

        def bits(teacher: RemoteTeacher) -> list[Any]:
            mesh.barrier()
            return [one.top_logp_RK.tolist() for one in teacher.signal(batch) if isinstance(one, TopK)]

        def come_back() -> None:
            while alone.deaths == 0:
                time.sleep(0.1)
            relay.up()

        told = [bits(both)]
        if relay:
            relay.silent = True
        told.append(bits(both))  # hangs in the middle of the work: what it was asked is asked of the other
        if relay:
            relay.down()
            relay.silent = False
        told.append(bits(both))
        deaths = [both.deaths]
        if relay:
            threading.Thread(target=come_back).start()
        told.append(bits(alone))  # waits for it
        deaths.append(alone.deaths)
        if relay:
            relay.fragile = True
        told.append(bits(alone))  # dies with work in flight, and is back at once
        deaths.append(alone.deaths)
        if relay:
            relay.down()
        with pytest.raises(EngineStopped) as stopped:
            bits(alone)
        return {"told": told, "deaths": deaths, "message": str(stopped.value)}


def test_work_of_servers_that_hang_or_die_is_done_all_the_same(worlds: Worlds, root: Path, server: str) -> None:
    first, last = worlds(2).run(survive, root, server, init=False, timeout=TIMEOUT)
    assert first["told"] == [[]] * 5
    assert last["told"][0]
    for told in last["told"]:
        for micro, expected in zip(told, last["told"][0], strict=True):
            torch.testing.assert_close(torch.tensor(micro), torch.tensor(expected), rtol=0, atol=1e-5)
    for seen in (first, last):
        assert seen["deaths"] == [0, 1, 2]
        assert "loss number 3 of the run, most_restarts=2 allows no more" in seen["message"]


def outlive(root: Path, python: Path) -> dict[str, Any]:
    with here(root, ParallelSizes()) as world:
        remote = world.remote("", top_k=4, most_restarts=1, servers=ServerSettings(python=python))
        assert remote.servers is not None
        (process,) = remote.servers.group.processes
        try:
            batch = world.batch(remote)
            before = [one.top_logp_RK for one in remote.signal(batch) if isinstance(one, TopK)]
            first = process.pid
            os.killpg(first, signal.SIGSTOP)  # so that it dies with all of the work in flight
            threading.Timer(1.0, os.killpg, (first, signal.SIGKILL)).start()
            after = [one.top_logp_RK for one in remote.signal(batch) if isinstance(one, TopK)]
            os.killpg(process.pid, signal.SIGKILL)
            with pytest.raises(EngineStopped) as stopped:
                remote.signal(batch)
        finally:
            remote.close()
        return {
            "error": max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True)),
            "another": process.pid != first,
            "message": str(stopped.value),
            "alive": process.alive(),
        }


def test_a_server_of_the_runs_own_is_started_again_and_ended(worlds: Worlds, root: Path, server_python: Path) -> None:
    (seen,) = worlds(1).run(outlive, root, server_python, init=False, timeout=TIMEOUT)
    assert seen["error"] <= 1e-5
    assert seen["another"]
    assert not seen["alive"]
    assert "loss number 2 of the run, most_restarts=1 allows no more" in seen["message"]
