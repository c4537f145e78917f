"""A run folder belongs to one run at a time, and can be written before anything starts."""

import os
import subprocess
import sys

import pytest

from megatron_distill.errors import ConfigError
from megatron_distill.train.folder import check_writable, claim


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    with claim(tmp_path / "run"):
        with pytest.raises(ConfigError, match=rf"run is in use by process {os.getpid()} on .*choose another"):
            claim(tmp_path / "run").__enter__()
        with claim(tmp_path / "other"):
            pass
    with claim(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").read_text().count("\n") == 1


def test_a_holder_that_was_killed_holds_nothing(tmp_path):
    code = "import os, pathlib, sys\nfrom megatron_distill.train.folder import claim\n"
    code += "with claim(pathlib.Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    with claim(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^paths\.run: .*file/run cannot be written \(Not a directory\); name a fol"):
        claim(tmp_path / "file" / "run").__enter__()
    with pytest.raises(ConfigError, match=r"^--output: "):
        check_writable(tmp_path / "file", "--output")


def test_looking_leaves_an_empty_folder(tmp_path):
    check_writable(tmp_path / "a" / "b", "--output")
    assert list((tmp_path / "a" / "b").iterdir()) == []
