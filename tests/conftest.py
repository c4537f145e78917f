"""Fixtures that every test may use. One thread each: worker processes share two cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch

from megatron_distill.testing.world import Worlds

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """`worlds(2).run(function, ...)`: the function on 2 gloo ranks; processes start on first use and stay."""
    with Worlds(tmp_path_factory.mktemp("worlds")) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
