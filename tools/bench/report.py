"""The results of a bench as one document, and the tables that are printed of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tools.bench import bars, rivals
from tools.bench.comparisons import OURS
from tools.bench.work import Shape


def merged(before: dict[str, Any] | None, now: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons of an earlier results document, each replaced by its newer self where there is one; by shape."""
    found = {_key(one): one for one in [*(before["comparisons"] if before else []), *now]}
    shapes = [shape for shape, _ in found]
    return sorted(found.values(), key=lambda one: shapes.index(_key(one)[0]))


def _key(comparison: dict[str, Any]) -> tuple[str, str]:
    return Shape(**comparison["shape"]).name, comparison["loss"]


def assemble(comparisons: Sequence[dict[str, Any]], counts: dict[str, Any]) -> dict[str, Any]:
    """Everything measured and what it says of the bars."""
    verdicts = [
        verdict for one in comparisons for verdict in bars.judge(Shape(**one["shape"]), one["loss"], one["methods"])
    ]
    verdicts += bars.judge_collectives(counts)
    return {
        "clock": "CUDA events" if torch.cuda.is_available() else "CPU time of the process, one thread",
        "compared_with": rivals.versions(),
        "bars": [asdict(verdict) | {"passed": verdict.passed} for verdict in verdicts],
        "passed": bars.all_passed(verdicts),
        "collectives": counts,
        "comparisons": list(comparisons),
    }


def show_methods(comparisons: Sequence[dict[str, Any]], console: Console) -> None:
    """Times, memory and errors of everybody."""
    for one in comparisons:
        console.print(_methods(one))


def show_bars(found: dict[str, Any], console: Console) -> None:
    """Collectives, and every bar."""
    console.print(_collectives(found["collectives"]))
    console.print(_bars(found["bars"]))
    missed = sum(not bar["passed"] for bar in found["bars"])
    console.print("every bar was met" if not missed else f"{missed} of {len(found['bars'])} bars were MISSED")


def _methods(comparison: dict[str, Any]) -> Table:
    shape = Shape(**comparison["shape"])
    table = Table("method", title=f"{comparison['loss']}, {shape.name}", title_justify="left")
    for column in (
        "ms, median",
        "best",
        "ours / theirs",
        "best",
        "peak copies",
        "resident",
        "loss off",
        "grad off",
        "",
    ):
        table.add_column(column, justify="right" if column else "left")
    mine = comparison["methods"][OURS]
    for name, told in comparison["methods"].items():
        if told["refused"]:
            table.add_row(name, *["-"] * 8, f"left out: {told['refused']}", style="dim")
            continue
        table.add_row(
            name,
            f"{told['median_ms']:.0f}",
            f"{told['best_ms']:.0f}",
            _over(mine, told, "median_ms"),
            _over(mine, told, "best_ms"),
            _number(told.get("peak_copies"), "{:.3f}"),
            _number(told.get("resident_copies"), "{:.2f}"),
            f"{told['loss_error']:.1e}",
            f"{told['gradient_error']:.1e}",
        )
    return table


def _over(mine: dict[str, Any], theirs: dict[str, Any], key: str) -> str:
    return f"{mine[key] / theirs[key]:.2f}" if key in mine else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _collectives(counts: dict[str, Any]) -> Table:
    table = Table("collectives, TP=2", "forward", "backward")
    for name, taken in counts.items():
        table.add_row(name, str(taken["forward"]), str(taken["backward"]))
    return table


def _bars(verdicts: Sequence[dict[str, Any]]) -> Table:
    table = Table("bar", "shape", title="bars", title_justify="left")
    for column in ("limit", "measured", "best"):
        table.add_column(column, justify="right")
    table.add_column("")
    for bar in verdicts:
        word = "not measured:" if bar["measured"] is None else "met" if bar["passed"] else "MISSED"
        table.add_row(
            bar["what"],
            bar["shape"],
            f"{bar['limit']:g}",
            _number(bar["measured"], "{:.3g}"),
            _number(bar["best"], "{:.3g}"),
            f"{word} {bar['note']}".strip(),
            style=None if bar["passed"] else "bold red",
        )
    return table
