"""The guide's example works as it stands there: pasted into a copy of the project, it loads and is certified."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
GUIDE = PROJECT / "docs" / "guides" / "add-an-objective.md"
PLACES = ["megatron_distill/objectives/unsure.py", "configs/objectives/unsure.yaml", "tests/oracles/unsure.py"]
CUTS = "whole;tp=2, fp64, chunks of 40"


def files_of(guide: str) -> dict[str, str]:
    """By path: the fenced blocks whose first line is a comment that names a file."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", guide, flags=re.MULTILINE | re.DOTALL)
    found = {}
    for block in blocks:
        first, _, rest = block.partition("\n")
        if re.fullmatch(r"# [\w/]+\.\w+", first):
            found[first.removeprefix("# ")] = rest
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, and the guide's files in it."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("megatron_distill", "configs", "tests"):
        shutil.copytree(PROJECT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in files_of(GUIDE.read_text()).items():
        assert not (root / path).exists(), f"{path}: the guide's example must not be shipped"
        (root / path).write_text(text)
    return root


def python(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def certify(root: Path, cuts: str) -> subprocess.CompletedProcess[str]:
    return python(root, "-m", "tests.certify.run", "--objectives", "unsure", "--on", "table", "--cuts", cuts)


def test_the_guide_holds_three_files() -> None:
    assert list(files_of(GUIDE.read_text())) == PLACES


def test_the_example_is_loaded_by_its_name(copy: Path) -> None:
    (copy / "run.yaml").write_text(GUIDE.read_text().split("```yaml\nbase:")[1].split("```")[0].join(["base:", ""]))
    told = "from megatron_distill.config import load; print(load('run.yaml').objective)"
    done = python(copy, "-c", told)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Unsure(temperature=1.0"), done.stdout
    assert "below=0.5" in done.stdout


@pytest.mark.slow
def test_the_example_is_certified(copy: Path) -> None:
    done = certify(copy, CUTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "certified: unsure"


@pytest.mark.slow
def test_a_slip_in_the_example_is_not_certified(copy: Path) -> None:
    objective = copy / PLACES[0]
    text = objective.read_text()
    objective.write_text(text.replace("logp_R < math.log(self.below)", "logp_R > math.log(self.below)"))
    assert objective.read_text() != text
    done = certify(copy, "whole")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "broken bar: unsure (" in done.stdout
