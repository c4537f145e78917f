"""Fixtures that every test may use. One thread each: worker processes share two cores.

A test that asks for `server_python`, `served` or `new_servers` needs the real SGLang server: it is marked `sglang` by
that, and has more time. `make served` runs these; without the server's environment they are skipped.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_distill.errors import EngineError
from megatron_distill.rollout.servers import ServerGroup, ServerSettings
from megatron_distill.rollout.servers import server_python as find_server_python
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.testing.world import Worlds

SERVED_TIMEOUT = 900
"""Seconds for a test with servers: a start alone takes half a minute of a core's time for each process."""

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """`worlds(2).run(function, ...)`: the function on 2 gloo ranks; processes start on first use and stay."""
    with Worlds(tmp_path_factory.mktemp("worlds")) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that need the real server, before markers choose."""
    for item in items:
        if "server_python" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.sglang)
        if item.get_closest_marker("sglang") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SERVED_TIMEOUT))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line about tests with the real server, where markers left them out."""
    if "not sglang" in config.option.markexpr:
        try:
            find_server_python()
            how = "make served runs them"
        except EngineError:
            how = "make sglang sets it up (10 GB), make served runs them"
        terminalreporter.write_line(f"tests with the real SGLang server were left out: {how}")


@pytest.fixture(scope="session")
def server_python() -> Path:
    """The interpreter of the server's environment."""
    try:
        return find_server_python()
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model that `served` starts with: a random Qwen3 in fp32, 259 tokens, 512 positions."""
    folder = tmp_path_factory.mktemp("served") / "tiny_qwen3"
    tiny_tokenizer(folder)
    return tiny_model(folder, "qwen3")


@pytest.fixture(scope="session")
def served(server_python: Path, tiny_served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerGroup]:
    """Two servers that run for the whole session, for tests that do not break them.

    Weights and version are whatever the test before has left: a test that depends on them gives its own.
    """
    settings = ServerSettings(count=2, python=server_python)
    with ServerGroup(settings, tiny_served, "cpu", name="served", logs=tmp_path_factory.mktemp("server-logs")) as group:
        yield group


type NewServers = Callable[..., ServerGroup]


@pytest.fixture
def new_servers(server_python: Path, tiny_served: Path, tmp_path: Path) -> Iterator[NewServers]:
    """`new_servers(count, model=..., wait=True, **settings)`: servers that the test may break; they end with it."""
    groups: list[ServerGroup] = []

    def start(count: int = 1, model: Path = tiny_served, *, wait: bool = True, **settings: Any) -> ServerGroup:
        group = ServerGroup(
            ServerSettings(**{"count": count, "python": server_python, **settings}),
            model,
            "cpu",
            name=f"new{len(groups)}",
            logs=tmp_path / "server-logs",
        )
        groups.append(group)
        group.start()
        if wait:
            group.wait_ready()
        return group

    yield start
    for group in groups:
        group.stop()
