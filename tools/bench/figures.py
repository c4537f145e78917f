"""`python -m tools.bench.figures`: the results files as tables in docs/guides/bench.md, between its two marks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_distill.files import write_atomically
from tools.bench.comparisons import FLOOR, OURS
from tools.bench.machine import RESULTS
from tools.bench.step import PHASES
from tools.bench.work import Shape

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "bench.md"
BEGIN, END = "<!-- figures: made by tools.bench.figures -->", "<!-- end of figures -->"


def main() -> int:
    """Rewrite the guide's figures."""
    write_atomically(GUIDE, with_figures(GUIDE.read_text(encoding="utf-8")))
    return 0


def with_figures(guide: str, results: Path = RESULTS) -> str:
    """The guide with its figures from all results files there are."""
    before, _, rest = guide.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{''.join(f'{line}\n' for line in figures(results))}\n{END}{after}"


def figures(results: Path) -> Iterator[str]:
    """Lines of Markdown: for each machine the losses, the bars, the steps."""
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        for name, tables in (("losses", _losses), ("step", _steps)):
            path = folder / f"{name}.json"
            if path.is_file():
                yield from tables(json.loads(path.read_text(encoding="utf-8")), folder.name)


def _losses(found: Mapping[str, Any], hardware: str) -> Iterator[str]:
    known = found["machine"]
    against = ", ".join(f"{name} {version}" for name, version in found["compared_with"].items())
    yield f"### Losses on {known['device']}, {known['cores']} cores ({known['vector_instructions']})"
    yield ""
    yield f"torch {known['packages']['torch']}, {against}; one thread; `tools/bench/results/{hardware}/losses.json`."
    yield "Times are medians of CPU milliseconds, with the best round in brackets; memory is the peak beyond inputs."
    for shape, of_shape in groupby(found["comparisons"], key=lambda one: Shape(**one["shape"]).name):
        comparisons = list(of_shape)
        when = sorted({f"{one['measured']['rounds']} rounds, {one['measured']['date'][:10]}" for one in comparisons})
        yield ""
        yield f"**{shape}** ({'; '.join(when)})"
        yield ""
        yield "| loss | method | ms | ours / this | memory, [T, V] fp32 copies | error of loss | of gradient |"
        yield "|---|---|---|---|---|---|---|"
        for one in comparisons:
            for name, told in one["methods"].items():
                yield f"| {one['loss']} {_row(name, told, one['methods'][OURS])}"
    yield ""
    yield "| bar | shape | limit | measured | best round | |"
    yield "|---|---|---|---|---|---|"
    for bar in found["bars"]:
        verdict = "not measured" if bar["measured"] is None else "met" if bar["passed"] else "**missed**"
        numbers = f"{bar['limit']:g} | {_short(bar['measured'])} | {_short(bar['best'])}"
        yield f"| {bar['what']} | {bar['shape']} | {numbers} | {' '.join([verdict, bar['note']]).strip()} |"
    yield ""


def _row(name: str, told: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    if told["refused"]:
        return f"| {name} | left out: {told['refused']} | | | | |"
    share = f"{mine['median_ms'] / told['median_ms']:.2f} ({mine['best_ms'] / told['best_ms']:.2f})"
    of_errors = "| | |" if name == FLOOR else f"| {told['loss_error']:.0e} | {told['gradient_error']:.0e} |"
    peak = "" if told.get("peak_copies") is None else f"{told['peak_copies']:.3f}"
    return f"| {name} | {told['median_ms']:.0f} ({told['best_ms']:.0f}) | {share} | {peak} {of_errors}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _steps(found: Mapping[str, Any], hardware: str) -> Iterator[str]:
    known = found["machine"]
    yield f"### Training steps on {known['device']}, {known['cores']} cores"
    yield ""
    yield f"Wall seconds, median of {found['steps']['counted']} steps; `tools/bench/results/{hardware}/step.json`,"
    yield f"{known['date']}."
    yield ""
    yield f"| run | response tokens | tokens/s | step | {' | '.join(PHASES)} | peak GiB of a rank |"
    yield "|---|" + "---|" * (len(PHASES) + 4)
    for run in found["runs"]:
        seconds = " | ".join(f"{run['phases_s'][phase]:.2f}" for phase in PHASES)
        speed = f"{run['tokens']:.0f} | {run['tokens_per_s']:.0f} | {run['step_s']:.2f}"
        yield f"| {run['name']} | {speed} | {seconds} | {run['peak_gib']:.2f} |"
    yield ""


if __name__ == "__main__":
    sys.exit(main())
