"""`make certify`: every objective, under every setting and every cut, against its oracle; writes docs/certificates.*

    python -m tests.certify.run [--objectives opd,gkd] [--on table,network] [--cuts "whole;tp=2"] [--write]

Exit code 1: a bar is broken, and the output names the case. Any other failure is an error of the run itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import megatron_distill
from megatron_distill.testing.assertions import TOLERANCE
from megatron_distill.testing.world import Worlds
from tests.certify import network, report, table
from tests.certify.settings import network_settings, objectives, settings

ROOT = Path(__file__).resolve().parents[2]
LONG = 1200.0
"""Seconds after which a cut counts as stuck."""


def main(words: Sequence[str] | None = None) -> int:
    arguments = _arguments(words)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    assert Path(megatron_distill.__file__).is_relative_to(ROOT), f"{megatron_distill.__file__} is not under {ROOT}"
    kinds = arguments.objectives or objectives()
    found: dict[str, Any] = {kind: _entry(kind) for kind in kinds}
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as folder, Worlds(Path(folder)) as worlds:
        runs = {"table": _on_table, "network": _on_network}
        for place in arguments.on:
            for kind, on, cut, bar, rows in runs[place](worlds, kinds, arguments.cuts, Path(folder)):
                found[kind]["cuts"].append({"on": on, "cut": cut, **report.merge(rows)})
                broken += [
                    f"broken bar: {row['setting']} {row['fidelity']} on {on}, {cut}: "
                    f"loss {row['loss']:.1e}, gradient {row['gradient']:.1e}, allowed {bar:.0e}"
                    for row in rows
                    if not (row["loss"] <= bar and row["gradient"] <= bar)
                ]
    broken = list(dict.fromkeys(broken))  # ranks of a group say the same
    print("\n".join(broken) if broken else f"certified: {', '.join(kinds)}", flush=True)
    if arguments.write and not broken:
        report.write({"facts": _facts(), "objectives": found}, ROOT)
    return 1 if broken else 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", help="comma-separated; default: all", type=lambda names: names.split(","))
    parser.add_argument("--on", help="table or network; default: both", type=lambda names: names.split(","))
    parser.add_argument("--cuts", help="names, with ; between them; default: all", type=lambda names: names.split(";"))
    parser.add_argument("--write", action="store_true", help="write docs/certificates.* unless a bar is broken")
    arguments = parser.parse_args(words)
    on = arguments.on or ["table", "network"]
    cuts = {"table": table.CUTS, "network": network.CUTS}
    allowed = {
        "objectives": objectives(),
        "on": list(cuts),
        "cuts": [name for place in on for name in cuts.get(place, ())],
    }
    for option, names in allowed.items():
        if unknown := set(getattr(arguments, option) or ()) - set(names):
            parser.error(f"--{option}: {', '.join(sorted(unknown))}: allowed are {'; '.join(names)}")
    if arguments.write and (arguments.objectives or arguments.on or arguments.cuts):
        parser.error("--write: a certificate is of everything, leave the other options out")
    arguments.on = on
    return arguments


def _entry(kind: str) -> dict[str, Any]:
    all_of_it = {str(setting): setting for setting in settings(kind)}
    return {
        "settings": len(all_of_it),
        "micro_batch": [name for name, setting in all_of_it.items() if setting.one_micro_batch],
        "cuts": [],
    }


def _facts() -> dict[str, Any]:
    return {
        "vocabulary": table.VALID,
        "padded": table.PADDED,
        "table32": f"{TOLERANCE[torch.float32]:.0e}",
        "table64": f"{TOLERANCE[torch.float64]:.0e}",
        "network": f"{TOLERANCE[torch.float32]:.0e}",
    }


type Rows = tuple[str, str, str, float, list[dict[str, Any]]]
"""Objective, kind of model, cut, bar, errors of every rank."""


def _on_table(worlds: Worlds, kinds: Sequence[str], names: Sequence[str] | None, _: Path) -> Iterator[Rows]:
    cuts = _chosen(table.CUTS, names)
    for kind in kinds:
        started = time.monotonic()
        answers = [table.expected(setting) for setting in settings(kind)]
        for ranks in sorted({cut.ranks for cut in cuts.values()}):
            here = {name: cut for name, cut in cuts.items() if cut.ranks == ranks}
            by_rank = worlds(ranks).run(table.errors, list(here.values()), answers, timeout=LONG)
            for place, (name, cut) in enumerate(here.items()):
                on = "table, fp64" if cut.dtype == torch.float64 else "table, fp32"
                rows = [asdict(error) for by_cut in by_rank for error in by_cut[place]]
                if any(map(cut.suits, settings(kind))):
                    yield kind, on, name, TOLERANCE[cut.dtype], rows
        _tell(f"{kind}: {len(answers)} settings on the table", started)


def _on_network(worlds: Worlds, kinds: Sequence[str], names: Sequence[str] | None, folder: Path) -> Iterator[Rows]:
    started = time.monotonic()
    chain = network.Chain(network.make_folders(folder))
    answers = {kind: [chain.expected(setting) for setting in network_settings(kind)] for kind in kinds}
    flat = [answer for kind in kinds for answer in answers[kind]]
    _tell(f"{len(flat)} settings through transformers in float64", started)
    for name, cut in _chosen(network.CUTS, names).items():
        started = time.monotonic()
        by_rank = worlds(cut.ranks).run(network.errors, folder, cut, flat, init=False, timeout=LONG)
        for kind in kinds:
            rows = [asdict(error) for errors in by_rank for error in errors if error.setting.split(" ")[0] == kind]
            if any(map(cut.suits, network_settings(kind))):
                yield kind, "Megatron", name, TOLERANCE[torch.float32], rows
        _tell(f"Megatron, {name}", started)


def _chosen[Cut](cuts: Mapping[str, Cut], names: Sequence[str] | None) -> Mapping[str, Cut]:
    return {name: cut for name, cut in cuts.items() if names is None or name in names}


def _tell(what: str, started: float) -> None:
    print(f"{what}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
