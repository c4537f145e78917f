"""The launcher: ranks as torchrun would start them, and one line about the one that failed first."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_distill.cli import ranks
from megatron_distill.errors import DistillError

WORKER = "import os, sys; from megatron_distill.cli import ranks; ranks.become_worker(__import__('pathlib').Path({!r}))"


def start(folder, code, world=2):
    return ranks.start(["-c", f"{WORKER.format(str(folder))}\n{code}"], world, folder)


def test_ranks_know_their_world_and_only_the_first_has_the_screen(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    says = "print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'])"
    assert start(tmp_path, f"{says}; print('a warning', file=sys.stderr)") == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    out, err = capfd.readouterr()
    assert out == f"rank 0 of 2 {threads}\n"
    assert err == ""
    assert ranks.log_of(tmp_path, 0).read_text() == "a warning\n"
    assert sorted(ranks.log_of(tmp_path, 1).read_text().splitlines()) == ["a warning", f"rank 1 of 2 {threads}"]


def test_a_rank_that_raises_gives_one_line(tmp_path, capfd):
    code = "import time\nif os.environ['RANK'] == '1': raise RuntimeError('boom')\ntime.sleep(60)"
    assert start(tmp_path, code) == 1
    log = ranks.log_of(tmp_path, 1)
    assert capfd.readouterr().err == f"error: rank 1 failed: RuntimeError: boom; its log: {log}\n"
    assert "Traceback" in log.read_text()


def test_a_killed_rank_is_named(tmp_path, capfd):
    code = "import time\nif os.environ['RANK'] == '0': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    assert start(tmp_path, code) == 128 + 9
    assert capfd.readouterr().err.startswith("error: rank 0 was killed by SIGKILL")


def test_an_error_to_put_right_reads_as_without_ranks(tmp_path):
    ranks.log_of(tmp_path, 0).parent.mkdir()
    ranks.log_of(tmp_path, 0).write_text("error: of an earlier start\n")
    with pytest.raises(DistillError, match=r"^checkpoint of another model$"):
        start(tmp_path, "print('error: checkpoint of another model', file=sys.stderr); sys.exit(2)", world=1)


def test_ctrl_c_ends_the_ranks_too(tmp_path):
    code = f"{WORKER.format(str(tmp_path))}\nprint(os.getpid(), flush=True)\nimport time\ntime.sleep(60)"
    parent = (
        "import pathlib; from megatron_distill.cli import ranks\n"
        f"ranks.start(['-c', {code!r}], 1, pathlib.Path({str(tmp_path)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
        deadline = time.monotonic() + 10
        while os.path.exists(f"/proc/{child}"):
            assert time.monotonic() < deadline, "the rank outlived its launcher"
            time.sleep(0.1)
