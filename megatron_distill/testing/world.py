"""Gloo worlds for tests: processes that import torch once and then run one function after another on every rank.

`Worlds` owns the processes; `worlds(4).run(function, ...)` gives the results by rank. Ranks meet at a file, never at
a port number that another process might take. After every run the process groups are torn down, Megatron's module
globals included, so that the next run starts clean. It knows nothing of meshes or models.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

RENDEZVOUS = "MEGATRON_DISTILL_RENDEZVOUS"
"""Environment variable with the `file://` address at which the ranks of a run meet."""

_READY = b"ready"
_START_SECONDS = 180.0
_GRACE_SECONDS = 2.0


class RemoteTraceback(Exception):
    """The text of a traceback in another process; stands as the cause of the exception raised here."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


@dataclass(frozen=True, slots=True)
class _Job:
    """One run, as one rank sees it."""

    function: Callable[..., Any]
    arguments: tuple[object, ...]
    rank: int
    size: int
    rendezvous: str
    init: bool
    timeout: float
    filters: list[Any]


@dataclass(frozen=True, slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    stacks: Path


class Worlds:
    """At most `limit` worker processes, started when first needed; `worlds(n)` is a world of the first n.

    Use it as a context manager, or `kill` it at the end: the processes outlive a run on purpose.
    """

    def __init__(self, folder: Path, limit: int = 4) -> None:
        self.folder = folder
        self.limit = limit
        self._workers: list[_Worker] = []
        self._busy: set[int] = set()
        self._runs = 0

    def __call__(self, size: int) -> World:
        if not 1 <= size <= self.limit:
            raise ValueError(f"a world of {size} ranks: this pool has 1 to {self.limit}")
        return World(self, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """End every worker at once, also one that sits in a collective for ever. The next run starts new ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()
        self._busy.clear()

    def _idle(self, size: int) -> list[_Worker]:
        """The first `size` workers, started if need be, all of them waiting for a job."""
        if not self._settled(_GRACE_SECONDS):
            self.kill()  # tearing down after a failed run can hang
        for number in range(len(self._workers), size):
            self._workers.append(self._start(number))
            self._busy.add(number)
        if not self._settled(_START_SECONDS):
            self.kill()
            raise TimeoutError(f"worker processes did not start within {_START_SECONDS:.0f} s")
        return self._workers[:size]

    def _start(self, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        stacks = self.folder / f"stacks_{number}.txt"
        # Not a daemon: those may not start processes, and Megatron's checkpoint writer does.
        process = context.Process(target=_serve, args=(there, stacks), name=f"world-{number}")
        process.start()
        there.close()
        return _Worker(process, here, stacks)

    def _settled(self, seconds: float) -> bool:
        """Whether every busy worker reports, within `seconds` each, that it is ready for the next job."""
        for number in sorted(self._busy):
            pipe = self._workers[number].pipe
            try:
                if not pipe.poll(seconds) or pipe.recv_bytes() != _READY:
                    return False
            except (EOFError, ConnectionResetError):
                return False
            self._busy.remove(number)
        return True

    def _rendezvous(self) -> str:
        self._runs += 1
        return f"file://{self.folder / f'rendezvous_{os.getpid()}_{self._runs}'}"


@dataclass(frozen=True, slots=True)
class World:
    """`size` ranks of a pool."""

    pool: Worlds
    size: int

    def run[Result](
        self, function: Callable[..., Result], *arguments: object, init: bool = True, timeout: float = 120.0
    ) -> list[Result]:
        """Call `function(*arguments)` on every rank; its results, by rank.

        Args:
            function: a function of a module (the ranks import it by name); it and `arguments` are pickled.
            init: initialise torch.distributed with gloo first. False leaves that to `function`, which finds
                RANK, WORLD_SIZE, LOCAL_RANK and the meeting point (`RENDEZVOUS`) in the environment.
            timeout: seconds until the stacks of all ranks are printed and the processes killed.

        Raises:
            TimeoutError: with every rank's stack.
            Exception: whatever the first failing rank raised, that rank's traceback as its cause.
        """
        workers = self.pool._idle(self.size)
        rendezvous = self.pool._rendezvous()
        filters = list(warnings.filters)
        jobs = [
            _Job(function, arguments, rank, self.size, rendezvous, init, timeout, filters) for rank in range(self.size)
        ]
        messages = [pickle.dumps(job) for job in jobs]  # all of them before any rank starts: pickling may fail
        for worker, message in zip(workers, messages, strict=True):
            worker.pipe.send_bytes(message)
        self.pool._busy |= set(range(self.size))
        answers = self._collect(workers, timeout)
        failures = [answer for answer in answers.values() if isinstance(answer, _Failure)]
        silent = sorted(set(range(self.size)) - set(answers))
        stacks = _stacks(workers) if silent and not failures else ""
        if silent or any(not worker.process.is_alive() for worker in workers):
            self.pool.kill()
        if failures:
            raise min(failures, key=lambda failure: failure.at).restore()
        if silent:
            raise TimeoutError(f"ranks {silent} of {self.size} gave no answer within {timeout:.0f} s\n{stacks}")
        return [answers[rank] for rank in range(self.size)]

    def _collect(self, workers: list[_Worker], timeout: float) -> dict[int, Any]:
        """Answers by rank in order of arrival; stops soon after a first failure, whose peers may wait forever."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            waiting = {worker.pipe: rank for rank, worker in enumerate(workers) if rank not in answers}
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0.0))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                answers[rank] = _receive(workers[rank])
                if isinstance(answers[rank], _Failure):
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return answers


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception
    text: str
    at: float
    """Seconds of the machine's monotonic clock; the first failure is the cause, its peers' are consequences."""

    @staticmethod
    def of(error: Exception) -> _Failure:
        text = f"rank {os.environ.get('RANK')}:\n" + "".join(traceback.format_exception(error))
        at = time.monotonic()
        try:
            pickle.loads(pickle.dumps(error))
        except (pickle.PicklingError, TypeError, AttributeError):
            return _Failure(RuntimeError(f"{type(error).__name__}: {error}"), text, at)
        return _Failure(error, text, at)

    def restore(self) -> Exception:
        self.error.__cause__ = RemoteTraceback(self.text)
        return self.error


def _receive(worker: _Worker) -> Any:
    try:
        return pickle.loads(worker.pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        worker.process.join(_GRACE_SECONDS)
        death = RuntimeError(f"{worker.process.name} died with exit code {worker.process.exitcode}")
        return _Failure(death, worker.stacks.read_text() or "no traceback: the process is gone", at=0.0)


def _stacks(workers: list[_Worker]) -> str:
    for worker in workers:
        if worker.process.is_alive() and worker.process.pid is not None:
            os.kill(worker.process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return "\n".join(f"--- rank {rank}\n{worker.stacks.read_text()}" for rank, worker in enumerate(workers))


def _serve(pipe: Connection, stacks: Path) -> None:
    """The life of a worker: one job after another until the parent closes the pipe."""
    with stacks.open("w") as file:
        faulthandler.enable(file=file, all_threads=True)  # what a crash of native code leaves behind
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        before = dict(os.environ)
        while True:
            pipe.send_bytes(_READY)
            try:
                message = pipe.recv_bytes()
            except EOFError:
                return
            pipe.send_bytes(_answer(message))
            _tear_down()
            os.environ.clear()
            os.environ.update(before)


def _answer(message: bytes) -> bytes:
    """The pickled result of a job, or its `_Failure`: whatever a test raises belongs to the test, not to us."""
    try:
        return _pickled(_work(pickle.loads(message)))
    except Exception as error:
        return pickle.dumps(_Failure.of(error))


class _Pickler(pickle.Pickler):
    """Tensors go as arrays: Megatron, once imported, would have them name one of its own functions for unpickling."""

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        plain = value.detach().cpu()
        if plain.dtype == torch.bfloat16:
            return _bfloat16, (plain.view(torch.int16).numpy(),)
        return torch.from_numpy, (plain.numpy(),)


def _bfloat16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


def _pickled(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def _work(job: _Job) -> Any:
    os.environ |= {
        "RANK": str(job.rank),
        "LOCAL_RANK": str(job.rank),
        "WORLD_SIZE": str(job.size),
        RENDEZVOUS: job.rendezvous,
    }
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filters[:] = job.filters  # type: ignore[index]  # an error in the test is one here
        warnings._filters_mutated()  # type: ignore[attr-defined]
        if job.init:
            dist.init_process_group(
                "gloo",
                init_method=job.rendezvous,
                rank=job.rank,
                world_size=job.size,
                timeout=timedelta(seconds=job.timeout),
            )
        return job.function(*job.arguments)


def _tear_down() -> None:
    """Forget all process groups; Megatron keeps its own in module globals, if anyone imported it."""
    if (state := sys.modules.get("megatron.core.parallel_state")) is not None:
        state.destroy_model_parallel()
    if (calculator := sys.modules.get("megatron.core.num_microbatches_calculator")) is not None:
        calculator.unset_num_microbatches_calculator()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
