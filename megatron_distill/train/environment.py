"""environment.json: what a run ran on, so that its numbers can be had again."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import megatron_distill
from megatron_distill.files import write_atomically

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "datasets", "numpy", "transformer-engine", "sglang")


def environment() -> dict[str, object]:
    """Commit of this project where it is a git checkout, versions, and the machine."""
    installed = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "git_sha": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {"megatron-distill": _version("megatron-distill"), **installed},
        "platform": platform.platform(),
        "argv": sys.argv,
    }


def write_environment(folder: Path) -> None:
    """Write environment.json into a run folder, which is made; the latest start of a run counts."""
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    project = Path(megatron_distill.__file__).parent.parent
    if not (project / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *words], cwd=project, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
