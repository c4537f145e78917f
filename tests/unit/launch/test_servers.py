"""Which servers `python -m launch.servers` starts for a run's config, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.servers import SILENT_SECONDS, silent_seconds, wanted
from megatron_distill.config import RunConfig, load
from megatron_distill.errors import ConfigError

URLS = "rollout.engine.urls=[http://127.0.0.1:30010,http://127.0.0.1:30011,http://127.0.0.1:30012]"


def run(*overrides: str) -> RunConfig:
    return load("quickstart/sglang", overrides)


def test_servers_start_where_the_run_looks_for_them() -> None:
    [rollout] = wanted(run(URLS, "student.model=a"))
    assert (rollout.where, rollout.model) == ("rollout.engine", Path("a"))
    assert (rollout.settings.count, rollout.settings.port) == (3, 30010)


def test_without_addresses_the_settings_say_how_many() -> None:
    [rollout] = wanted(run("rollout.engine.servers.count=4", "rollout.engine.servers.port=30020"))
    assert (rollout.settings.count, rollout.settings.port) == (4, 30020)


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ("http://127.0.0.1:30010,http://127.0.0.1:30012", "have one host and ports in a row"),
        ("http://127.0.0.1:30010,http://localhost:30011", "have one host and ports in a row"),
        (
            "http://10.0.0.7:30010",
            "nobody reaches http://10.0.0.7:30010 while servers listen at rollout.engine.servers.host=127.0.0.1: set",
        ),
    ],
)
def test_addresses_at_which_no_servers_of_this_machine_would_be_found(tmp_path: Path, urls: str, says: str) -> None:
    (key := tmp_path / "key").write_text("a-key")
    key.chmod(0o600)
    with pytest.raises(ConfigError, match=r"rollout\.engine\.urls") as caught:
        wanted(run(f"rollout.engine.urls=[{urls}]", f"rollout.engine.servers.api_key_file={key}"))
    assert says in str(caught.value)


def test_a_run_without_servers() -> None:
    with pytest.raises(ConfigError, match="talks to no server"):
        wanted(load("quickstart/distill", []))


def test_a_server_that_takes_weights_is_not_taken_for_hung() -> None:
    assert silent_seconds(run("rollout.engine.sync.timeout_seconds=900")) == SILENT_SECONDS + 900
