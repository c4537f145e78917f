"""The certificates that are committed: the page is the JSON's, and every objective has one at every cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_distill.testing.assertions import TOLERANCE
from tests.certify import network, table
from tests.certify.report import JSON, PAGE, merge, render
from tests.certify.run import main
from tests.certify.settings import network_settings, objectives, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / JSON).read_text())
    return found


def test_the_page_is_what_the_data_say(content: dict[str, Any]) -> None:
    assert (ROOT / PAGE).read_text() == render(content), "run `make certify`; neither file is edited by hand"


def test_every_objective_is_certified_and_no_unknown_one(content: dict[str, Any]) -> None:
    assert sorted(content["objectives"]) == objectives(), "run `make certify`"


@pytest.mark.parametrize("kind", objectives())
def test_every_cut_and_setting_is_certified(content: dict[str, Any], kind: str) -> None:
    entry = content["objectives"][kind]
    assert entry["settings"] == len({str(one) for one in settings(kind)}), "settings have changed: run `make certify`"
    tables = {name for name, cut in table.CUTS.items() if any(map(cut.suits, settings(kind)))}
    networks = {name for name, cut in network.CUTS.items() if any(map(cut.suits, network_settings(kind)))}
    assert {one["cut"] for one in entry["cuts"] if one["on"].startswith("table")} == tables
    assert {one["cut"] for one in entry["cuts"] if one["on"] == "Megatron"} == networks


@pytest.mark.parametrize(
    "words",
    [
        ["--cuts", "no such cut"],
        ["--objectives", "no_such_objective"],
        ["--on", "paper"],
        ["--on", "network", "--cuts", "whole"],
        ["--write", "--cuts", "whole"],
        ["--write", "--objectives", "sft"],
        ["--write", "--on", "table"],
    ],
)
def test_a_run_that_would_certify_less_than_it_says_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert "error: --" in capsys.readouterr().err


@pytest.mark.parametrize("kind", objectives())
def test_no_committed_number_is_above_its_bar(content: dict[str, Any], kind: str) -> None:
    for one in content["objectives"][kind]["cuts"]:
        bar = TOLERANCE[torch.float64 if "fp64" in one["on"] else torch.float32]
        assert one["loss"] <= bar, one
        assert one["gradient"] <= bar, one


def test_the_worst_of_some_settings_is_told() -> None:
    def row(setting: str, loss: float, gradient: float) -> dict[str, Any]:
        return {"setting": setting, "fidelity": "full", "loss": loss, "gradient": gradient}

    merged = merge([row("a", 1e-8, 2e-7), row("b", 3.04e-7, 1e-9), row("a", 0.0, 0.0)])
    assert merged == {"loss": 3.0e-7, "gradient": 2e-7, "settings": 2, "fidelities": ["full"], "worst": "b"}
    broken = merge([row("a", 1.0, 1.0), row("b", math.nan, 0.0), row("c", 2.0, 2.0)])
    assert math.isnan(broken["loss"])
    assert broken["worst"] == "b"
    with pytest.raises(AssertionError, match="nothing was tried"):
        merge([])
