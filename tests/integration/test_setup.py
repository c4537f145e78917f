"""The set-up scripts on small imitations of bare machines: uv is a script that writes down what it was asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
UV = """#!/bin/sh
echo "$@" >> "$UV_CALLS"
case "$*" in
    *--help*) echo "--require-hashes" ;;
    "python find"*) exit 1 ;;
    venv*) mkdir -p "$5/bin" && ln -s "$(realpath "$4")" "$5/bin/python" ;;
esac
"""
REFUSING_SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"


@dataclass(frozen=True)
class Machine:
    """A clone of the project in a folder with a space, a PATH, and a record of what uv was asked."""

    project: Path
    programs: Path
    home: Path

    def setup(self, script: str = "setup.sh", **environment: str) -> subprocess.CompletedProcess[str]:
        """One call of a script of tools/."""
        path = f"{self.programs}:/usr/bin:/bin"
        return subprocess.run(
            ["sh", f"tools/{script}"],
            cwd=self.project,
            env={"PATH": path, "HOME": str(self.home), "UV_CALLS": str(self.home / "calls"), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[str]:
        """What uv was asked to do, without the questions about its version."""
        asked = (self.home / "calls").read_text().splitlines()
        return [call for call in asked if "--help" not in call]


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    project = tmp_path / "a clone"
    (project / "tools").mkdir(parents=True)
    for script in ("setup.sh", "setup_parts.sh", "setup_sglang.sh"):
        shutil.copy(PROJECT / "tools" / script, project / "tools")
    shutil.copytree(PROJECT / "tools/sglang_cpu", project / "tools/sglang_cpu")
    shutil.copytree(PROJECT / "requirements", project / "requirements")
    shutil.copy(PROJECT / "pyproject.toml", project)
    programs, home = tmp_path / "bin", tmp_path / "home"
    program(programs / "uv", UV)
    # Whatever Python the machine under the tests has on its PATH must not decide them.
    for name in ("python3.12", "python3.13", "python3", "python"):
        program(programs / name, REFUSING_SHIM)
    home.mkdir()
    return Machine(project, programs, home)


def test_pyenv_python_is_found_behind_a_shim_that_refuses(machine: Machine) -> None:
    found = machine.home / ".pyenv/versions/3.12.10/bin/python"
    program(found, f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program(machine.home / ".pyenv/versions/3.12.9/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')

    done = machine.setup()

    assert done.returncode == 0, done.stderr
    assert f"venv --quiet --python {found} .venv" in machine.calls()
    assert "pip sync --python .venv/bin/python --require-hashes requirements/dev.txt" in machine.calls()


def test_packages_are_compiled_where_python_may_not_keep_what_it_compiles(machine: Machine) -> None:
    assert machine.setup(PYTHON=sys.executable, PYTHONDONTWRITEBYTECODE="1").returncode == 0
    assert (
        "pip sync --python .venv/bin/python --require-hashes requirements/dev.txt --compile-bytecode" in machine.calls()
    )


def test_second_call_is_silent_and_quick_until_the_requirements_change(machine: Machine) -> None:
    assert machine.setup(PYTHON=sys.executable).returncode == 0
    first = machine.calls()

    started = time.monotonic()
    again = machine.setup(PYTHON=sys.executable)

    assert time.monotonic() - started < 1.0
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert machine.calls() == first

    with (machine.project / "requirements/dev.txt").open("a") as requirements:
        requirements.write("another==1.0\n")
    assert machine.setup(PYTHON=sys.executable).returncode == 0
    assert len(machine.calls()) > len(first)


def test_environment_that_was_cut_off_is_finished_by_the_next_call(machine: Machine) -> None:
    program(machine.programs / "uv", UV.replace("esac", '    "pip sync"*) exit 3 ;;\nesac'))
    assert machine.setup(PYTHON=sys.executable).returncode != 0

    program(machine.programs / "uv", UV)
    assert machine.setup(PYTHON=sys.executable).returncode == 0
    assert machine.calls()[-1].startswith("pip install")


def test_no_python_and_no_leave_to_fetch_one_says_what_to_do(machine: Machine) -> None:
    done = machine.setup(UV_PYTHON_DOWNLOADS="never")

    assert done.returncode != 0
    assert "PYTHON=/path/to/python3.12" in done.stderr
    assert not (machine.project / ".venv").exists()


def test_named_python_that_does_not_fit_is_refused_by_name(machine: Machine) -> None:
    done = machine.setup(PYTHON=str(machine.programs / "python3"))

    assert done.returncode != 0
    assert f"PYTHON={machine.programs / 'python3'}" in done.stderr


WORKING = "#!/bin/sh\nexit 0\n"


def test_servers_environment_is_made_beside_the_trainers_and_once(machine: Machine) -> None:
    program(machine.project / ".venv/bin/python", WORKING)

    first = machine.setup("setup_sglang.sh")

    assert first.returncode == 0, first.stderr
    asked = machine.calls()
    assert asked[0] == "venv --quiet --python .venv/bin/python .venv-sglang"
    assert asked[1] == "pip sync --python .venv-sglang/bin/python --require-hashes requirements/sglang.txt"
    assert asked[2].endswith("--no-deps --no-build-isolation --editable tools/sglang_cpu")
    again = machine.setup("setup_sglang.sh")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert machine.calls() == asked


def test_servers_environment_that_cannot_import_the_server_is_not_finished(machine: Machine) -> None:
    broken = '#!/bin/sh\ncase "$*" in *launch_server*) echo "libcuda is from the moon" >&2; exit 1 ;; esac\n'
    program(machine.project / ".venv/bin/python", broken)

    for _ in range(2):
        done = machine.setup("setup_sglang.sh")
        assert done.returncode != 0
        assert "libcuda is from the moon" in done.stderr


def test_servers_environment_asks_for_the_trainers_first(machine: Machine) -> None:
    done = machine.setup("setup_sglang.sh")

    assert done.returncode != 0
    assert "make setup" in done.stderr


def test_tests_with_the_real_server_are_left_out_in_one_line_that_says_how_to_run_them() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not sglang", "tests/sglang/test_servers.py"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if "left out" in line]
    assert len(lines) == 1, done.stdout + done.stderr
    assert re.fullmatch(r"tests with the real SGLang server were left out: make (sglang|served) .*", lines[0])


def test_requirement_files_are_hashed_and_name_no_index() -> None:
    for file in sorted((PROJECT / "requirements").glob("*.txt")):
        text = file.read_text()
        pins = re.findall(r"^[\w.-]+(?:\[[^]]*\])?==", text, re.MULTILINE)
        assert pins, file
        assert len(re.findall(r"^ +--hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)) >= len(pins), file
        assert "://" not in text, file
        assert "index-url" not in text, file


def test_ci_runs_its_targets_in_turn_and_keeps_the_exit_code_of_the_first_that_fails(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / ".ci", tmp_path / ".ci")
    targets = ["test", "slow", "certify", "served"]
    for failing in [None, *targets]:
        recipes = [f"{name}:\n\t@echo ran {name}; exit {2 * (name == failing)}\n" for name in targets]
        (tmp_path / "Makefile").write_text("".join(recipes))
        done = subprocess.run([tmp_path / ".ci/run"], capture_output=True, text=True, env=dict(os.environ), check=False)
        expected = targets if failing is None else targets[: targets.index(failing) + 1]
        assert [line.removeprefix("ran ") for line in done.stdout.splitlines() if line.startswith("ran ")] == expected
        assert done.returncode == (0 if failing is None else 2)
