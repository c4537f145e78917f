"""The real server as a process: what it lets in, where it listens, what it tells of its key, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.servers import Watch
from megatron_distill.rollout.servers import ServerGroup, ServerSettings

KEY = "a-key-that-nobody-may-see"


def ask(url: str, key: str | None = None) -> list[int]:
    """Four tokens after three."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["output_ids"]


def members(group: int) -> list[int]:
    """Processes of a process group that are not only waiting to be buried."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(folder.name))
    return found


def eventually(fact: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)


def test_servers_answer_at_addresses_of_this_machine_alone(served: ServerGroup) -> None:
    assert len(served.urls) == 2
    for process in served.processes:
        assert process.url.startswith("http://127.0.0.1:")
        assert len(ask(process.url)) == 4
        # the server itself; its workers' sockets are torch's
        listening = Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]
        addresses = {line.split()[1] for line in listening if line.split()[3] == "0A"}
        assert f"0100007F:{process.port:04X}" in addresses
        assert f"00000000:{process.port:04X}" not in addresses


def test_a_server_whose_scheduler_hangs_is_started_anew(
    server_python: Path, tiny_served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ServerGroup(ServerSettings(python=server_python), tiny_served, "cpu", logs=tmp_path) as group:
        watch = Watch([group], silent_seconds=6)
        watch.wait_ready()
        watch.look()
        [process] = group.processes
        first = process.pid
        [scheduler] = [one for one in members(first) if "scheduler" in Path(f"/proc/{one}/cmdline").read_text()]
        os.kill(scheduler, signal.SIGSTOP)
        assert process.answers()  # so that asking whether it is there is not enough
        eventually(lambda: watch.look() or process.pid != first, 30)
        eventually(lambda: watch.look() or process.reacts(), 400)
        assert process.starts == 2
    assert "has not answered for 6 s; starting it anew" in capsys.readouterr().out


class Launched:
    """`python -m launch.servers`, and what it has said so far."""

    def __init__(self, words: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.servers", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(iter(self.process.stdout.readline, ""))

    def heard(self, pattern: str) -> re.Match[str] | None:
        assert self.process.poll() is None, "".join(self.said)
        return re.search(pattern, "".join(self.said))

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reading.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def launched(server_python: Path, tiny_served: Path, tmp_path: Path) -> Iterator[Launched]:
    """One server with a key for the student of a run."""
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    command = Launched(
        [
            "configs/quickstart/sglang.yaml",
            f"student.model={tiny_served}",
            f"paths.run={tmp_path / 'run'}",
            "rollout.engine.servers.count=1",
            f"rollout.engine.servers.python={server_python}",
            f"rollout.engine.servers.api_key_file={key}",
        ]
    )
    yield command
    if command.process.poll() is None:
        command.end()


def test_launched_server_keeps_its_key_to_itself_comes_back_when_killed_and_ends_with_its_launcher(
    launched: Launched, tmp_path: Path
) -> None:
    eventually(lambda: launched.heard(r"ready: rollout\.engine\.urls="), 400)
    found = launched.heard(r"urls=\[(http://127\.0\.0\.1:(\d+))\]")
    assert found is not None
    url = found[1]

    assert len(ask(url, KEY)) == 4
    for wrong in (None, "another"):
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            ask(url, wrong)
        refused.value.close()

    children = Path(f"/proc/{launched.process.pid}/task/{launched.process.pid}/children").read_text().split()
    [server] = map(int, children)
    everybody = members(server)
    assert len(everybody) >= 4  # server, scheduler, detokenizer, keeper
    for process in everybody:
        for shown in ("cmdline", "environ"):
            assert KEY not in Path(f"/proc/{process}/{shown}").read_text(errors="replace")
    log = tmp_path / "run" / "servers" / "rollout-0.log"
    assert KEY not in log.read_text()
    assert KEY not in "".join(launched.said)

    os.kill(server, signal.SIGKILL)

    eventually(lambda: launched.heard("has ended; starting it anew"), 20)
    eventually(lambda: not members(server), 20)
    eventually(lambda: launched.heard(f"{url}: ready again"), 400)
    assert len(ask(url, KEY)) == 4
    assert KEY not in log.read_text()
    [server] = map(int, Path(f"/proc/{launched.process.pid}/task/{launched.process.pid}/children").read_text().split())

    assert launched.end() == 0
    assert "no server runs any more" in launched.said[-1]
    assert not members(server)
