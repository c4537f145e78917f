"""SD-Zero's control phrases: what a student was trained to revise after is what its teacher reads later."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from megatron_distill.config import load
from megatron_distill.data.phrases import Phrases
from megatron_distill.rollout.sources.revise import Revise

PHASES = {"sdzero": "sdzero_revision", "sdzero_paper": "sdzero_revision", "sdzero_released": "sdzero_revision_released"}
"""Preset of phase 2, and the preset of phase 1 whose export it starts from."""


def shipped(name: str, folder: Path) -> Phrases:
    """What a preset says."""
    file = folder / f"{name}.yaml"
    file.write_text(f"base: [base, objectives/{name}]\nstudent: {{model: {folder}}}\ndata: {{prompts: a}}\n")
    run = load(file)
    if isinstance(run.rollout, Revise):
        return run.rollout.phrases
    revision = run.teachers["self"].view.revision
    assert revision is not None
    return cast(Phrases, revision.phrases)


@pytest.mark.parametrize("later", PHASES)
def test_shipped_presets_say_the_same_in_both_phases(later: str, tmp_path: Path) -> None:
    assert shipped(later, tmp_path) == shipped(PHASES[later], tmp_path)


def test_every_shipped_preset_of_sdzero_has_its_other_phase() -> None:
    presets = Path(__file__).parents[3] / "configs" / "objectives"
    assert {file.stem for file in presets.glob("sdzero*.yaml")} == PHASES.keys() | set(PHASES.values())
