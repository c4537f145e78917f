"""A push that takes longer than a server may be silent: servers that are paused for it are not taken for hung."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest
from torch import Tensor

from megatron_distill.data.templates import load_tokenizer
from megatron_distill.models.hf.stage import Slice
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.rollout.base import Request, Sampling
from megatron_distill.rollout.engines.base import Serving
from megatron_distill.rollout.engines.sglang import SGLang
from megatron_distill.rollout.servers import ServerGroup
from megatron_distill.rollout.sync import SyncSettings
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import start
from megatron_distill.testing.world import Worlds

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

PROBE_SECONDS, SILENT_SECONDS = 2.0, 3.0
"""The least that a server's own look allows, and less than passes between two looks that fail."""
# a look begins after `PROBE_SECONDS` and fails after as many more; the first makes a suspect, the second a lost server
PUSH_SECONDS = 7 * PROBE_SECONDS


class Slow(Student):
    """A student that keeps servers waiting, paused, before the first of its weights."""

    def stage_weights(self) -> Iterator[tuple[str, Tensor]]:
        time.sleep(PUSH_SECONDS)
        yield from super().stage_weights()

    def stage_slices(self) -> Iterator[Slice]:
        time.sleep(PUSH_SECONDS)
        yield from super().stage_slices()


def push_slowly(folder: Path, urls: list[str], run_folder: Path) -> tuple[float, dict[str, float], set[int]]:
    """How long a push took, the engine's figures after it, and by which weights a request was answered then."""
    part = SGLang(
        urls=tuple(urls),
        probe_seconds=PROBE_SECONDS,
        silent_seconds=SILENT_SECONDS,
        sync=SyncSettings(transport="broadcast", timeout_seconds=120),
    )
    with start(ParallelSizes(), Precision()) as runtime:
        student = Student.build(StudentSection(model=folder), OptimizerSection(lr=1e-2), runtime, steps=10)
        serving = Serving(
            folder=folder,
            tokenizer=load_tokenizer(folder),
            ranks=runtime.mesh,
            mesh=runtime.mesh,
            valid_vocab=259,
            run_folder=run_folder,
        )
        with closing(part.connect(serving)) as engine:
            engine.load_weights(student, 0)  # only a server that serves can become suspect
            begun = time.monotonic()
            engine.load_weights(Slow(**{field.name: getattr(student, field.name) for field in fields(Student)}), 1)
            seconds = time.monotonic() - begun
            done = engine.generate([Request(tokens=(5, 6, 7), sampling=Sampling(max_new_tokens=4), key=(1,))])
            return seconds, dict(engine.figures), {one.version for one in done}


def test_nobody_is_restarted_over_a_push_that_takes_long(
    worlds: Worlds, served: ServerGroup, tiny_served: Path, tmp_path: Path
) -> None:
    seconds, figures, versions = worlds(1).run(
        push_slowly, tiny_served, served.urls, tmp_path, init=False, timeout=300
    )[0]
    assert seconds > PUSH_SECONDS
    assert figures == {"restarts": 0, "redone": 0, "serving": 2}
    assert versions == {1}
