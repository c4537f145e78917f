"""The certificates as data and as a page; nobody edits either by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

JSON, PAGE = Path("docs/certificates.json"), Path("docs/certificates.md")

_HEAD = """# Certificates

Made by `make certify`; do not edit. `docs/certificates.json` holds the same. Every objective that ships is here.

Each loss and each gradient is held to a float64 oracle (`tests/oracles/`): dense, whole, written from the mathematics,
without anything of this package's losses or objectives. Numbers are the largest relative error (largest difference
over largest magnitude) of any setting that the oracle lists, on any rank; where the terms of a loss cancel, as
advantages do, its error is relative to the sum of their magnitudes. A bar that breaks fails the command.

* **Table**: rows of logits come from a table, so that any cut is cheap. Real packing, plan, losses and chunked output
  layer; gradients of embeddings, positions and output weight, each by itself. The vocabulary has {vocabulary} ids in
  {padded} columns; padding must get a gradient of exactly 0, and one of four tensor-parallel ranks holds only padding.
  Eager losses, and compiled ones for the default. Bar: {table32} in fp32, {table64} in fp64.
* **Megatron**: a Qwen3 of two layers with tied embeddings, through Megatron's schedules, distributed data parallel and
  distributed optimizer, with teachers of other families, widths and vocabularies, which give full signals. The truth
  runs sequence by sequence through `transformers` in float64; the gradient is of all weights together, by Hugging Face
  name, and its norm counts with it. Of each objective the default, another temperature, several teachers if it takes
  them, and each sort of data. Bar: {network}.

Each row says how many of the objective's settings were tried in that cut, and what their teachers gave.
"""


def merge(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One entry per cut: the worst of its settings."""
    rows = list(rows)
    assert rows, "nothing was tried"
    loss = gradient = 0.0
    worst, badness = "", -1.0
    fidelities: set[str] = set()
    settings: set[str] = set()
    for row in rows:
        loss, gradient = max(loss, row["loss"], key=_order), max(gradient, row["gradient"], key=_order)
        fidelities.add(row["fidelity"])
        settings.add(row["setting"])
        if (bad := max(_order(row["loss"]), _order(row["gradient"]))) > badness:
            worst, badness = row["setting"], bad
    return {
        "loss": _short(loss),
        "gradient": _short(gradient),
        "settings": len(settings),
        "fidelities": sorted(fidelities - {""}),
        "worst": worst,
    }


def _order(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _short(error: float) -> float:
    return float(f"{error:.1e}")


def render(content: Mapping[str, Any]) -> str:
    """The page of the JSON."""
    objectives: Mapping[str, Any] = content["objectives"]
    lines = [_HEAD.format(**content["facts"]), "## Summary", ""]
    lines += ["| objective | settings | table, fp32 | table, fp64 | Megatron |", "|---|---|---|---|---|"]
    for name, entry in objectives.items():
        cells = [_worst(entry["cuts"], kind) for kind in ("table, fp32", "table, fp64", "Megatron")]
        lines.append(f"| [{name}](#{name}) | {entry['settings']} | {' | '.join(cells)} |")
    lines += ["", "The larger of loss and gradient, over all cuts.", ""]
    for name, entry in objectives.items():
        lines += [f"## {name}", ""]
        if entry["micro_batch"]:
            lines += ["Defined by their micro-batches, and so certified only where there is one:", ""]
            lines += [f"* {_fields(name, one)}" for one in entry["micro_batch"]] + [""]
        lines += ["| on | cut | settings | teachers give | loss | gradient | worst setting |", "|" + "---|" * 7]
        lines += [f"| {' | '.join(_cells(name, entry['settings'], one))} |" for one in entry["cuts"]]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cells(name: str, settings: int, one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        one["on"],
        one["cut"],
        f"{one['settings']} of {settings}",
        ", ".join(one["fidelities"]) or "-",
        f"{one['loss']:.1e}",
        f"{one['gradient']:.1e}",
        _fields(name, one["worst"]),
    )


def _fields(name: str, setting: str) -> str:
    return setting.removeprefix(f"{name} (").removesuffix(")")


def _worst(cuts: Iterable[Mapping[str, Any]], on: str) -> str:
    errors = [max(one["loss"], one["gradient"], key=_order) for one in cuts if one["on"] == on]
    return f"{max(errors, key=_order):.1e}" if errors else "-"


def write(content: Mapping[str, Any], root: Path) -> None:
    """Both files."""
    (root / JSON).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (root / PAGE).write_text(render(content))
