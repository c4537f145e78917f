"""Bring the world up and take it down again."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_distill.errors import ConfigError
from megatron_distill.runtime.backend import Backend, choose
from megatron_distill.runtime.mesh import Mesh, ParallelSizes, Ranks, all_ranks, build_mesh, take_down_mesh
from megatron_distill.runtime.precision import Precision

TIMEOUT_MINUTES = 30
"""How long a collective waits for a rank that does not come."""

RENDEZVOUS = "MEGATRON_DISTILL_RENDEZVOUS"
"""Environment variable: where ranks meet, as a torch.distributed URL; torchrun's own variables otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a running rank knows of its world."""

    mesh: Mesh
    backend: Backend
    precision: Precision
    seed: int


def world_size() -> int:
    """Ranks that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def start(parallel: ParallelSizes, precision: Precision, seed: int = 0) -> Iterator[Runtime]:
    """Process groups, device and seeds of this rank, taken down on the way out.

    Raises:
        ConfigError: the settings cannot run on this machine, or the launcher started another number of ranks.
    """
    backend = choose()
    refused = backend.refusals(parallel, precision)
    if refused:
        raise ConfigError("; ".join(refused))
    if world_size() != parallel.world:
        raise ConfigError(
            f"parallel: tp x pp x cp x dp = {parallel.world} ranks, but {world_size()} were started: "
            "start as many ranks, or change parallel"
        )
    with _distributed(backend):
        # Megatron reads torch.cuda at import, so the stand-ins come first
        backend.prepare()
        mesh = build_mesh(parallel, timeout_minutes=TIMEOUT_MINUTES)
        try:
            _seed(seed)
            yield Runtime(mesh=mesh, backend=backend, precision=precision, seed=seed)
        finally:
            take_down_mesh()


@contextlib.contextmanager
def start_ranks() -> Iterator[Ranks]:
    """The launcher's ranks without Megatron, which takes seconds to import."""
    with _distributed(choose()):
        yield all_ranks()


@contextlib.contextmanager
def _distributed(backend: Backend) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        where = os.environ.get(RENDEZVOUS)
        if where is None and "MASTER_ADDR" in os.environ:
            where = "env://"
        elif where is None:
            where = f"file://{stack.enter_context(tempfile.TemporaryDirectory())}/store"
        dist.init_process_group(
            backend.collectives,
            init_method=where,
            rank=int(os.environ.get("RANK", "0")),
            world_size=world_size(),
            timeout=timedelta(minutes=TIMEOUT_MINUTES),
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


def _seed(seed: int) -> None:
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    torch.manual_seed(seed)
    # dropout is off everywhere, so the tracker that forks nothing is enough
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
