"""The launcher: ranks as torchrun would start them, and one line about the one that failed first."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megatron_distill.cli import ranks
from megatron_distill.errors import ConfigError, DistillError


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a program on ranks of its own: the program is a module `work` that behaves as a rank of this project."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))

    def write_and_start(code, world=2):
        begin = "import os, sys, time, pathlib\nfrom megatron_distill.cli import ranks\n"
        begin += "ranks.become_worker(pathlib.Path(sys.argv[sys.argv.index('--worker') + 1]))\n"
        (tmp_path / "work.py").write_text(begin + textwrap.dedent(code))
        return ranks.start(["go"], world, tmp_path, module="work")

    return write_and_start


def test_ranks_know_their_world_and_only_the_first_has_the_screen(start, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    says = "print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'])\n"
    assert start(says + "print('a warning', file=sys.stderr)") == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    out, err = capfd.readouterr()
    assert out == f"rank 0 of 2 {threads}\n"
    assert err == ""
    assert ranks.log_of(tmp_path, 0).read_text() == "a warning\n"
    assert sorted(ranks.log_of(tmp_path, 1).read_text().splitlines()) == ["a warning", f"rank 1 of 2 {threads}"]


def test_a_rank_that_raises_gives_one_line(start, tmp_path, capfd):
    code = """
        if os.environ["RANK"] == "1":
            raise RuntimeError("boom")
        time.sleep(60)
    """
    assert start(code) == 1
    log = ranks.log_of(tmp_path, 1)
    assert capfd.readouterr().err == f"error: rank 1 failed: RuntimeError: boom; its log: {log}\n"
    assert "Traceback" in log.read_text()


def test_a_killed_rank_is_named(start, capfd):
    code = """
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), 9)
        time.sleep(60)
    """
    assert start(code) == 128 + 9
    assert capfd.readouterr().err.startswith("error: rank 0 was killed by SIGKILL")


def test_an_error_to_put_right_reads_as_without_ranks(start, tmp_path):
    ranks.log_of(tmp_path, 0).parent.mkdir()
    ranks.log_of(tmp_path, 0).write_text("error: of an earlier start\n")
    with pytest.raises(DistillError, match=r"^checkpoint of another model$"):
        start("print('error: checkpoint of another model', file=sys.stderr)\nsys.exit(2)", world=1)


def test_srun_alone_is_refused(monkeypatch):
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert not ranks.launched()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ConfigError, match=r"srun started 4 of this command, .* start torchrun with it"):
        ranks.launched()
    monkeypatch.setenv("RANK", "0")
    assert ranks.launched()


def test_ctrl_c_ends_the_ranks_too(tmp_path):
    (tmp_path / "work.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    parent = "import pathlib, sys; from megatron_distill.cli import ranks\n"
    parent += "ranks.start(['go'], 1, pathlib.Path(sys.argv[1]), module='work')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", parent, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
        deadline = time.monotonic() + 10
        while os.path.exists(f"/proc/{child}"):
            assert time.monotonic() < deadline, "the rank outlived its launcher"
            time.sleep(0.1)
