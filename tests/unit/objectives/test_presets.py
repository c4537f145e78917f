"""What shipped presets say beside their objective's own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_distill.config import RunConfig, load


def _preset(name: str, folder: Path) -> RunConfig:
    file = folder / f"{name}.yaml"
    teachers = "teachers: {large: {kind: frozen, model: a}}\n" if name.startswith("renio") else ""
    file.write_text(f"base: [base, objectives/{name}]\nstudent: {{model: {folder}}}\ndata: {{prompts: a}}\n{teachers}")
    return load(file)


@pytest.mark.parametrize("name", ["opsd_paper", "renio_paper", "renio_released", "tapo"])
def test_students_that_papers_have_not_think_aloud_do_not(name: str, tmp_path: Path) -> None:
    assert _preset(name, tmp_path).data.thinking is False


def test_redi_leaves_out_prompts_as_its_data_did(tmp_path: Path) -> None:
    data = _preset("redi", tmp_path).data
    assert (data.max_prompt_tokens, data.long_prompts) == (800, "skip")
