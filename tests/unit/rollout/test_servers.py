"""Servers as processes, shown on programs that fail to be one: they end, hang, or leave others behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_distill.errors import EngineError
from megatron_distill.rollout.server_settings import choose_ports, server_command, server_environment
from megatron_distill.rollout.servers import ServerGroup, ServerSettings, read_api_key, server_python


def program(path: Path, text: str) -> Path:
    """A file that can be run in the interpreter's place."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def group(python: Path, folder: Path, **settings: object) -> ServerGroup:
    return ServerGroup(ServerSettings(python=python, **settings), folder / "model", "cpu", logs=folder / "logs")


def running(process: int) -> bool:
    """Whether it is there and not only waits to be buried."""
    try:
        return " Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2][:3]
    except FileNotFoundError:
        return False


def eventually(fact: Callable[[], object], seconds: float = 20) -> None:
    """Return when it is so."""
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def test_server_that_ends_while_starting_is_reported_with_its_last_words(tmp_path: Path) -> None:
    broken = program(tmp_path / "python", "seq 100; echo 'no room for the key-value cache' >&2; exit 3")
    servers = group(broken, tmp_path)

    with pytest.raises(EngineError, match="exit code 3 before it was ready") as caught, servers:
        pass

    said = str(caught.value)
    assert servers.urls[0] in said
    assert str(tmp_path / "logs" / "rollout-0.log") in said
    assert said.endswith("no room for the key-value cache")
    assert len(said.splitlines()) < 20


def test_server_that_never_answers_is_given_up_and_ended(tmp_path: Path) -> None:
    silent = program(tmp_path / "python", "echo loading; exec sleep 100")
    servers = group(silent, tmp_path, start_seconds=0.5)

    with pytest.raises(EngineError, match=r"start_seconds=0\.5.*\n  loading"), servers:
        pass

    assert not servers.processes[0].alive()


def test_one_of_two_that_ends_takes_the_other_along(tmp_path: Path) -> None:
    first = f'case "$*" in *"--random-seed 1 "*) exit 1 ;; *) echo $$ > {tmp_path}/second; exec sleep 100 ;; esac'
    servers = group(program(tmp_path / "python", first), tmp_path, count=2)

    with pytest.raises(EngineError, match=r"rollout-0 .* exit code 1"), servers:
        pass

    assert not any(process.alive() for process in servers.processes)


def test_restart_keeps_the_address_and_counts(tmp_path: Path) -> None:
    servers = group(program(tmp_path / "python", "exec sleep 100"), tmp_path)
    [process] = servers.processes
    with pytest.raises(EngineError, match="not started yet"):
        _ = process.pid
    servers.start()
    url, pid = process.url, process.pid

    process.kill()
    assert not process.alive()
    process.start()

    assert (process.url, process.starts) == (url, 2)
    assert process.pid != pid
    with pytest.raises(EngineError, match="runs already"):
        process.start()
    servers.stop()


def test_killed_server_takes_its_workers_along(tmp_path: Path) -> None:
    worker = tmp_path / "worker"
    servers = group(program(tmp_path / "python", f"sleep 100 & echo $! > {worker}; exec sleep 100"), tmp_path)
    servers.start()
    eventually(lambda: worker.is_file() and worker.read_text().strip())

    os.kill(servers.processes[0].pid, signal.SIGKILL)

    eventually(lambda: not running(int(worker.read_text())))
    servers.stop()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_killed_trainer_leaves_no_server_behind(tmp_path: Path, end: signal.Signals) -> None:
    """Started in a thread that has ended: the trainer's life counts and not the thread's."""
    started = tmp_path / "started"
    server = program(tmp_path / "python", "exec sleep 100")
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(server), str(tmp_path), str(started)], stdout=subprocess.DEVNULL
    )
    eventually(lambda: started.is_file() and started.read_text(), seconds=60)
    server_pid = int(started.read_text())
    assert running(server_pid)

    trainer.send_signal(end)
    trainer.wait()

    eventually(lambda: not running(server_pid))


TRAINER = """
import sys, time
from pathlib import Path
from threading import Thread
from megatron_distill.rollout.servers import ServerGroup, ServerSettings
python, folder, started = map(Path, sys.argv[1:])
servers = ServerGroup(ServerSettings(python=python), folder / "model", "cpu", logs=folder / "logs")
thread = Thread(target=servers.start)
thread.start()
thread.join()
time.sleep(0.3)
started.write_text(str(servers.processes[0].pid))
time.sleep(100)
"""


def test_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=rf"127\.0\.0\.1:{port}: .*Address already in use.*servers\.port"):
            group(program(tmp_path / "python", "exit 1"), tmp_path, port=port)


def test_port_that_is_taken_between_two_starts_is_named_too(tmp_path: Path) -> None:
    servers = group(program(tmp_path / "python", "exec sleep 100"), tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", servers.processes[0].port))
        taken.listen()
        with pytest.raises(EngineError, match="Address already in use"):
            servers.start()


def test_free_ports_differ_and_leave_those_of_outgoing_connections_alone() -> None:
    ports = choose_ports("127.0.0.1", 0, 50)

    assert len(set(ports)) == 50
    assert max(ports) < 32768


def test_key_stays_out_of_the_command_line_and_away_from_others(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a-secret\n")
    key.chmod(0o600)
    shown = tmp_path / "shown"
    showing = f'echo "$@" > {shown}; eval file=\\${{$#}}; (ls -l "$file"; cat "$file") >> {shown}; exec sleep 100'
    servers = group(program(tmp_path / "python", showing), tmp_path, api_key_file=key, host="127.0.0.1")
    servers.start()
    eventually(lambda: shown.is_file() and len(shown.read_text().splitlines()) == 3)

    arguments, rights, content = shown.read_text().splitlines()
    assert "a-secret" not in arguments
    assert rights.startswith("-rw-------")
    assert content == 'api-key: "a-secret"'
    assert "--log-level warning" in arguments
    assert servers.processes[0].log.stat().st_mode & 0o077 == 0
    file = Path(arguments.split()[-1])
    servers.stop()
    assert not file.exists()


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        ("secret", 0o644, "chmod 600"),
        ("", 0o600, "one key"),
        ("two words", 0o600, "one key"),
        ("-dash", 0o600, "one key"),
        ("schlüssel", 0o600, "one key"),
    ],
)
def test_key_file_that_cannot_be_used(tmp_path: Path, content: str, mode: int, complaint: str) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(EngineError, match=complaint):
        read_api_key(file)


def test_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="No such file"):
        read_api_key(tmp_path / "none")


def test_no_key_is_no_key() -> None:
    assert read_api_key(None) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "a-node"])
def test_host_that_others_can_reach_needs_a_key(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="api_key_file"):
        ServerSettings(host=host)
    ServerSettings(host=host, api_key_file=tmp_path / "key")


@pytest.mark.parametrize(
    "wrong",
    [{"count": 0}, {"tp": 0}, {"port": 65536}, {"port": -1}, {"start_seconds": 0}, {"arguments": ("--api-key=x",)}],
)
def test_settings_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
        ServerSettings(**wrong)


def test_commands_for_cpu_and_gpu(tmp_path: Path) -> None:
    python = program(tmp_path / "python", "exit 0")
    settings = ServerSettings(python=python, tp=2, context_length=64, arguments=("--mem-fraction-static", "0.5"))

    cpu = " ".join(server_command(settings, Path("model"), "cpu", 30001, seed=1))
    gpu = " ".join(server_command(settings, Path("model"), "cuda", 30001, seed=1))

    assert cpu.startswith(f"{python} -m sglang.launch_server --model-path model --host 127.0.0.1 --port 30001")
    for flag in ("--dtype float32", "--device cpu", "--max-total-tokens 16384", "--attention-backend torch_native"):
        assert flag in cpu
    assert "--dtype bfloat16" in gpu
    assert not any(flag in gpu for flag in ("--device", "torch_native", "--max-total-tokens", "--disable-overlap"))
    for command in (cpu, gpu):
        assert command.endswith("--mem-fraction-static 0.5")
        for flag in ("--tp-size 2", "--context-length 64", "--skip-tokenizer-init", "--sleep-on-idle"):
            assert flag in command


def test_gpus_are_dealt_out_by_tensor_parallel_size() -> None:
    settings = ServerSettings(count=2, tp=2, devices=("4", "5", "6", "7"))

    given = [server_environment(settings, "cuda", index)["CUDA_VISIBLE_DEVICES"] for index in range(2)]

    assert given == ["4,5", "6,7"]


def test_too_few_gpus_are_counted() -> None:
    with pytest.raises(EngineError, match="need 4 GPUs, there are 1"):
        server_environment(ServerSettings(count=2, tp=2, devices=("0",)), "cuda", 0)


def test_gpus_that_this_process_sees_are_the_ones_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert server_environment(ServerSettings(count=2), "cuda", 1)["CUDA_VISIBLE_DEVICES"] == "3"


def test_weights_arrive_over_loopback_where_the_server_listens_there(tmp_path: Path) -> None:
    assert server_environment(ServerSettings(), "cpu", 0)["GLOO_SOCKET_IFNAME"] == "lo"
    elsewhere = ServerSettings(host="0.0.0.0", api_key_file=tmp_path / "key")
    assert "GLOO_SOCKET_IFNAME" not in server_environment(elsewhere, "cpu", 0)


def test_server_does_not_inherit_that_its_starter_is_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    shown = tmp_path / "shown"
    servers = group(
        program(tmp_path / "python", f"env > {shown}.new; mv {shown}.new {shown}; exec sleep 100"), tmp_path
    )
    servers.start()
    eventually(shown.is_file)
    servers.stop()

    names = {line.partition("=")[0] for line in shown.read_text().splitlines()}
    assert not names & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"}
    assert names >= {"SGLANG_PLATFORM", "HTTP_PROXY", "PATH"}


def test_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"servers.python={tmp_path}/none"):
        server_python(tmp_path / "none")


def test_logs_without_a_place_go_with_the_group(tmp_path: Path) -> None:
    servers = ServerGroup(ServerSettings(python=program(tmp_path / "python", "exec sleep 100")), tmp_path, "cpu")
    servers.start()
    log = servers.processes[0].log
    assert log.is_file()
    started = time.monotonic()
    servers.stop()
    assert not log.exists()
    assert time.monotonic() - started < 5
