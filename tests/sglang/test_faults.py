"""Servers are killed, hang and break off: every prompt is answered once, by the weights in force, or the run says why.

One run on two tensor-parallel ranks meets one fault after another, with two real servers of its own; each test looks
at one of them. Whether an answer is the right one is seen from its log-probs: they must be the trainer's, for that
prompt and those tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import psutil
import pytest
import torch
from torch import Tensor

from megatron_distill.data.packing import pack
from megatron_distill.data.templates import load_tokenizer
from megatron_distill.errors import EngineError, EngineStopped
from megatron_distill.models.hf.stage import Slice
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.sft import SFT
from megatron_distill.rollout.base import Completion, Request, Sampling
from megatron_distill.rollout.engines.base import Serving
from megatron_distill.rollout.engines.sglang import SGLang, SGLangEngine
from megatron_distill.rollout.servers import ServerProcess, ServerSettings
from megatron_distill.rollout.sync import UPDATING, SyncSettings
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import Runtime, start
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.testing.world import Worlds
from megatron_distill.train.step import bind
from megatron_distill.types import Batch, Origin, Prompt, Rollout, Scored, Stop, TokenStats
from tests.broken import Relay

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

TOLERANCE = 1e-4
DIRECT = build_opener(ProxyHandler({}))
# so long that what happens to a server happens while it writes them: some 2 s on two idle cores
REQUESTS = [
    Request(tokens=(5, 6, 7, 8 + index), sampling=Sampling(max_new_tokens=480), key=(1, index)) for index in range(24)
]
PART = SGLang(
    servers=ServerSettings(count=2, context_length=512),
    probe_seconds=5,
    silent_seconds=20,
    most_restarts=3,
    sync=SyncSettings(transport="broadcast", timeout_seconds=60),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What became of one act, as rank 0 saw it."""

    difference: float
    """Largest between a log-prob of an answer and the trainer's."""
    versions: set[int]
    in_force: int
    stops: set[Stop]
    figures: dict[str, float]
    """The engine's, counted since the act before."""
    same: bool
    """Whether all ranks got the same answers."""


@pytest.fixture(scope="module")
def told(server_python: Path, worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("faults")
    folder = tiny_tokenizer(tiny_model(root / "student", "qwen3", vocab_size=259, max_position_embeddings=512))
    other = tiny_tokenizer(tiny_model(root / "other", "qwen3", vocab_size=259, layers=3, max_position_embeddings=512))
    found = worlds(2).run(story, folder, other, root, init=False, timeout=1500)[0]
    for name, what in found.items():
        print(f"{name}: {what}")
    return found


def test_nothing_is_wrong_without_a_fault(told: dict[str, Any]) -> None:
    right(told["plain"], restarts=0, redone=False)


def test_a_server_killed_while_it_generates(told: dict[str, Any]) -> None:
    right(told["killed"], restarts=1, redone=True)


def test_a_server_killed_in_the_middle_of_an_update(told: dict[str, Any]) -> None:
    right(told["killed in update"], restarts=1, redone=False)


def test_a_server_that_stops_answering(told: dict[str, Any]) -> None:
    right(told["stopped"], restarts=1, redone=True)


def test_restarted_servers_were_given_the_weights_and_serve_again(told: dict[str, Any]) -> None:
    assert told["all serve"] == {"serving": 2, "versions": ["1", "1"]}
    right(told["after all"], restarts=0, redone=False)


def test_an_answer_that_is_cut_is_asked_for_again(told: dict[str, Any]) -> None:
    right(told["cut"], restarts=0, redone=True)


def test_a_full_disk_stops_the_run_and_leaves_the_old_weights(told: dict[str, Any]) -> None:
    message, version = told["full disk"]
    assert "File too large" in message or "No space" in message
    assert version == "2", "servers hold what they held"


def test_another_model_is_refused_at_the_start(told: dict[str, Any]) -> None:
    assert "with num_layers=2, but the student has 3" in told["wrong model"]
    assert "student.model=" in told["wrong model"]


def test_a_port_that_is_taken_is_refused_at_the_start(told: dict[str, Any]) -> None:
    assert "a server cannot listen there (Address already in use)" in told["taken port"]


def test_no_more_restarts_than_allowed(told: dict[str, Any]) -> None:
    assert "most_restarts=3" in told["killed once more"]


def right(act: Told, *, restarts: int, redone: bool) -> None:
    """Every prompt was answered, by the weights in force."""
    assert act.difference <= TOLERANCE
    assert act.versions == {act.in_force}
    assert act.stops <= {Stop.EOS, Stop.LENGTH}
    assert act.same
    assert act.figures["restarts"] == restarts
    assert (act.figures["redone"] > 0) == redone


# -- on the ranks ------------------------------------------------------------------------------------------------------


class Dawdling(Student):
    """A student whose weights take so long that something can happen meanwhile."""

    def stage_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.dawdling(super().stage_weights())

    def stage_slices(self) -> Iterator[Slice]:
        return self.dawdling(super().stage_slices())

    def dawdling[T](self, stream: Iterator[T]) -> Iterator[T]:
        for one in stream:
            time.sleep(0.1)
            yield one


def story(folder: Path, other: Path, root: Path) -> dict[str, Any]:
    """One fault after another; what was seen of each."""
    found: dict[str, Any] = {}
    with start(ParallelSizes(tp=2), Precision()) as runtime:
        built = Student.build(StudentSection(model=folder), OptimizerSection(lr=1e-2), runtime, steps=10)
        student = Dawdling(**{field.name: getattr(built, field.name) for field in fields(Student)})
        serving = Serving(
            folder=folder,
            tokenizer=load_tokenizer(folder),
            ranks=runtime.mesh,
            mesh=runtime.mesh,
            valid_vocab=259,
            run_folder=root / "run",
        )
        with closing(PART.connect(serving)) as engine:
            act = Act(engine, student, runtime)
            engine.load_weights(student, 0)
            found["plain"] = act.ask()
            with acting(runtime, lambda: kill_when_busy(act.process(0))):
                found["killed"] = act.ask(restarts=1)
            learn(student, runtime, 1)
            with acting(runtime, lambda: kill_when_updating(act.process(1))):
                engine.load_weights(student, 1)
                found["killed in update"] = act.ask()
            act.wait_for_all()
            with acting(runtime, lambda: stop_when_busy(act.process(0))):
                found["stopped"] = act.ask()
            act.wait_for_all()
            urls = runtime.mesh.gather_objects(act.urls())[0]
            found["all serve"] = {"serving": act.figures()["serving"], "versions": [version(url) for url in urls]}
            act.count()
            found["after all"] = act.ask()

            learn(student, runtime, 2)
            found["cut"] = through_a_relay(serving, student, runtime, urls)
            found["full disk"] = onto_a_full_disk(serving, student, runtime, urls, root)
            found["wrong model"] = refusal(replace(PART, urls=tuple(urls)), replace(serving, folder=other))
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                taken.listen(1)
                port = runtime.mesh.gather_objects(taken.getsockname()[1])[0]
                part = replace(PART, servers=replace(PART.servers, count=1, port=port))
                found["taken port"] = refusal(part, serving)

            engine.load_weights(student, 3)
            with acting(runtime, lambda: kill_when_busy(act.process(0))), pytest.raises(EngineStopped) as caught:
                act.keep_asking()
            found["killed once more"] = str(caught.value)
    return found


class Act:
    """Asks the engine, and sees whether what it answers is right."""

    def __init__(self, engine: SGLangEngine, student: Student, runtime: Runtime) -> None:
        self._engine, self._student, self._runtime = engine, student, runtime
        self._before = self.figures()

    def ask(self, restarts: int = 0) -> Told:
        """All requests, once; so many servers were lost meanwhile.

        The end of a process may be seen a look later than its connections break, and the other server be done by then.
        """
        done = self._engine.generate(REQUESTS)
        everywhere = self._runtime.mesh.gather_objects(done)
        now, before = self.figures(), self._before
        for _ in range(300):
            if now["restarts"] - before["restarts"] >= restarts:
                break
            time.sleep(0.1)
            now = self.figures()
        self._before = now
        return Told(
            difference=difference(self._student, self._runtime, done),
            versions={version for one in done for version in {one.version, *one.versions}},
            in_force=self._engine.version,
            stops={one.stop for one in done},
            figures={name: now[name] - before[name] for name in ("restarts", "redone")} | {"serving": now["serving"]},
            same=all(one == done for one in everywhere) and len(done) == len(REQUESTS),
        )

    def keep_asking(self) -> None:
        """Until a lost server must have been seen."""
        for _ in range(100):
            self.ask()

    def figures(self) -> dict[str, float]:
        """The engine's so far, on all ranks."""
        return self._runtime.mesh.gather_objects(dict(self._engine.figures))[0]

    def count(self) -> None:
        """From here on."""
        self._before = self.figures()

    def wait_for_all(self) -> None:
        """Until both serve; weights get there while the engine is asked."""
        end = time.monotonic() + 400
        while self.figures()["serving"] < 2:
            self._engine.generate(REQUESTS[:1])
            assert time.monotonic() < end
            time.sleep(1.0)
        self._before = self._before | {"redone": self.figures()["redone"]}

    def urls(self) -> list[str]:
        """Of the engine's own servers."""
        return [] if self._engine._live is None else [process.url for process in self._processes()]

    def process(self, index: int) -> ServerProcess:
        """One of the engine's own servers; rank 0 only."""
        return self._processes()[index]

    def _processes(self) -> list[ServerProcess]:
        assert self._engine._live is not None
        return self._engine._live._keeper._group.processes


@contextmanager
def acting(runtime: Runtime, act: Callable[[], None]) -> Iterator[None]:
    """Something that rank 0 does meanwhile."""
    thread = threading.Thread(target=act if runtime.mesh.rank == 0 else lambda: None)
    thread.start()
    yield
    thread.join()


def kill_when_busy(server: ServerProcess) -> None:
    wait_until(lambda: running(server.url) > 0)
    os.kill(server.pid, signal.SIGKILL)


def stop_when_busy(server: ServerProcess) -> None:
    """Its scheduler alone: the process that is asked goes on, and says that all is well."""
    wait_until(lambda: running(server.url) > 0)
    for process in psutil.Process(server.pid).children(recursive=True):
        if "scheduler" in process.name():
            process.send_signal(signal.SIGSTOP)


def kill_when_updating(server: ServerProcess) -> None:
    wait_until(lambda: version(server.url) == UPDATING)
    os.kill(server.pid, signal.SIGKILL)


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(url: str) -> int:
    return int(asked(url, "/v1/loads")["loads"][0]["num_running_reqs"])


def version(url: str) -> str:
    return str(asked(url, "/model_info")["weight_version"])


def asked(url: str, path: str) -> Any:
    with DIRECT.open(f"{url}{path}", timeout=30) as response:
        return json.load(response)


def through_a_relay(serving: Serving, student: Student, runtime: Runtime, urls: Sequence[str]) -> Told:
    """Answers of one server break off in the middle, for a while."""
    with relayed(runtime, urls[0]) as relay:
        url = runtime.mesh.gather_objects(relay.url if relay else "")[0]
        with closing(replace(PART, urls=(url, urls[1])).connect(serving)) as engine:
            act = Act(engine, student, runtime)
            engine.load_weights(student, 2)
            if relay is not None:
                relay.cut_after = 300
            with acting(runtime, lambda: mend_when_it_hurts(engine, relay)):
                return act.ask()


def mend_when_it_hurts(engine: SGLangEngine, relay: Relay | None) -> None:
    assert relay is not None
    wait_until(lambda: engine.figures["redone"] > 0)
    relay.cut_after = None


@contextmanager
def relayed(runtime: Runtime, url: str) -> Iterator[Relay | None]:
    """A relay before a server, in a thread of rank 0."""
    if runtime.mesh.rank != 0:
        yield None
        return
    loop, relay = asyncio.new_event_loop(), Relay(url)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(relay.__aenter__(), loop).result()
    yield relay
    asyncio.run_coroutine_threadsafe(relay.__aexit__(None, None, None), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def onto_a_full_disk(
    serving: Serving, student: Student, runtime: Runtime, urls: Sequence[str], root: Path
) -> tuple[str, str]:
    """The error of a push by files that cannot be written, and what a server then holds."""
    sync = SyncSettings(transport="disk", folder=root / "weights", timeout_seconds=60)
    with closing(replace(PART, urls=tuple(urls), sync=sync).connect(serving)) as engine:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(EngineStopped) as caught:
                engine.load_weights(student, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return str(caught.value), version(urls[0])


def refusal(part: SGLang, serving: Serving) -> str:
    with pytest.raises(EngineError) as caught:
        part.connect(serving)
    return str(caught.value)


def difference(student: Student, runtime: Runtime, done: Sequence[Completion]) -> float:
    """Largest between an answer's log-probs and the trainer's for the same prompt and tokens."""
    batch = batch_of(runtime, done)
    trainer, engine = torch.cat(student.score(batch)), torch.cat([micro.rollout_logp_R for micro in batch.micro])
    return float((trainer - engine).abs().max())


def learn(student: Student, runtime: Runtime, version: int) -> None:
    """One optimizer step that moves every log-prob."""
    taught = [
        Completion(tokens=tuple(range(20, 60)), logprobs=(0.0,) * 40, stop=Stop.LENGTH, version=version)
        for _ in REQUESTS
    ]
    batch = batch_of(runtime, taught)
    objective = SFT()
    plan, _ = objective.prepare(TokenStats(), batch, Scope(seed=0, step=0), {})
    student.step(batch, bind(objective, {}, plan, batch, student.partition))


def batch_of(runtime: Runtime, done: Sequence[Completion]) -> Batch:
    scored = [
        Scored(
            rollout=Rollout(
                prompt=Prompt(id=str(index), messages=(), tokens=request.tokens),
                group=f"{index:03d}",
                sample=0,
                tokens=one.tokens,
                logprobs=one.logprobs,
                origin=(Origin.STUDENT,) * len(one.tokens),
                stop=one.stop,
                version=one.version,
            ),
            reward=None,
        )
        for index, (request, one) in enumerate(zip(REQUESTS, done, strict=True))
    ]
    return pack(
        scored,
        dp_rank=runtime.mesh.dp_rank,
        dp_size=1,
        tokens_per_micro_batch=2048,
        sequence_multiple=1,
        total_multiple=1,
        device=torch.device("cpu"),
        version=min(one.version for one in done),
    )
