"""Weights from a sharded trainer into a real SGLang server, against a plain broadcast of the same bytes.

    python -m tools.bench.weight_sync

Both in the same world of two ranks, in turn: `push` sends all weights of a model to one server; `broadcast` is
`torch.distributed.broadcast` of the same tensors, one after another, from rank 0 to rank 1, into memory that is there
already and has been used before. A push does more: it brings shards together, stops the server, announces buckets over
HTTP, and the server loads what it got into its own layout. The bar is a share of the plain broadcast's speed
nevertheless, for both transports that no disk slows: `broadcast`, and `tensor`, which `sync.transport=auto` takes here.

How much the bar leaves to a push over sockets is measured too: `loading` is the plain broadcast once more, to a rank
that does what servers do, copying each bucket to where it belongs before it receives the next one. No pause, no HTTP.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.rollout.servers import ServerGroup, ServerSettings
from megatron_distill.rollout.sglang import Address
from megatron_distill.rollout.sync import SyncSettings, WeightSync
from megatron_distill.rollout.transports.buckets import buckets
from megatron_distill.runtime.backend import choose
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import start
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.testing.world import Worlds
from tools.bench.machine import write_results
from tools.bench.timing import order

BAR = 0.8
"""Least share of the plain broadcast's MB/s."""
BOUND = ("broadcast", "tensor")
"""Transports that it holds for."""
ROUNDS, WARM_UP = 7, 2
LAYOUTS = {"tp=1": ParallelSizes(dp=2), "tp=2": ParallelSizes(tp=2)}
"""Of two ranks: with tp=1 the second only receives the plain broadcast."""
_RANKS = 2
_PUSH_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of the model; about as wide as a real one's layers, so that tensors are as large as theirs, and few of them."""

    hidden: int = 1024
    layers: int = 20
    vocab: int = 16384


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON; 1 if the bar is missed."""
    chosen = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    size = Size(hidden=chosen.hidden, layers=chosen.layers, vocab=chosen.vocab)
    runs = measure(size, chosen.transports, chosen.layouts, chosen.rounds, chosen.bucket_mb)
    console.print(_table(runs))
    bars = [
        {name: run[name] for name in ("transport", "layout", "ratio")}
        | {"at_least": BAR, "passed": run["ratio"] >= BAR}
        for run in runs
        if run["transport"] in BOUND
    ]
    if not chosen.no_write:
        path = write_results(
            "weight_sync",
            {
                "clock": "wall, medians over rounds in which both ran",
                "rounds": {"counted": chosen.rounds, "not_counted": WARM_UP},
                "model": asdict(size),
                "bucket_mb": chosen.bucket_mb,
                "bars": bars,
                "passed": all(bar["passed"] for bar in bars),
                "runs": runs,
            },
        )
        console.print(f"written: {path.relative_to(Path(__file__).parents[2])}", highlight=False)
    return 0 if all(bar["passed"] for bar in bars) else 1


def measure(
    size: Size, transports: Sequence[str], layouts: Sequence[str], rounds: int, bucket_mb: float
) -> list[dict[str, Any]]:
    """One server, one world of two ranks; each transport and layout in turn."""
    runs = []
    with tempfile.TemporaryDirectory() as name, Worlds(Path(name), limit=_RANKS) as worlds:
        folder = tiny_model(
            Path(name) / "student",
            "qwen3",
            hidden=size.hidden,
            layers=size.layers,
            vocab_size=size.vocab,
            heads=16,
            kv_heads=8,
        )
        with ServerGroup(ServerSettings(max_total_tokens=1024), folder, choose().device.type) as servers:
            for layout in layouts:
                for transport in transports:
                    settings = SyncSettings(
                        transport=transport,  # type: ignore[arg-type]
                        bucket_mb=bucket_mb,
                        folder=Path(name) / "weights",
                        canary=False,
                    )
                    limit = 60 + 2 * (rounds + WARM_UP) * _PUSH_SECONDS
                    found = worlds(_RANKS).run(
                        _on_a_rank, folder, layout, settings, servers.urls, rounds, init=False, timeout=limit
                    )[0]
                    runs.append({"transport": transport, "layout": layout, **found})
    return runs


def _on_a_rank(folder: Path, layout: str, settings: SyncSettings, urls: list[str], rounds: int) -> dict[str, Any]:
    addresses = [Address(url) for url in urls]
    with start(LAYOUTS[layout], Precision()) as runtime:
        student = Student.build(StudentSection(model=folder), OptimizerSection(), runtime, steps=1)
        tensors = [torch.ones(plan.shape, dtype=plan.dtype) for plan in student.stage_plan()]
        receives = runtime.mesh.rank == 1
        loaded = [torch.zeros_like(tensor) for tensor in tensors] if receives else tensors
        pairs = list(zip(tensors, loaded, strict=True))
        sync = WeightSync(settings, runtime.mesh)

        def push(version: int) -> None:
            sync.push(student, addresses, version)

        def broadcast(version: int) -> None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

        def loading(version: int) -> None:
            for bucket in buckets(pairs, round(settings.bucket_mb * 2**20) // 2, lambda pair: pair[0].nbytes):
                for tensor, _ in bucket:
                    dist.broadcast(tensor, src=0)
                for tensor, place in bucket if receives else ():
                    place.copy_(tensor)

        def timed(work: Callable[[int], None], version: int) -> float:
            runtime.mesh.barrier()
            begun = time.perf_counter()
            work(version)
            runtime.mesh.barrier()  # rank 0 is done when rank 1 has everything
            return time.perf_counter() - begun

        ways = (push, broadcast, loading)
        seconds: dict[str, list[float]] = {way.__name__: [] for way in ways}
        for number in range(WARM_UP + rounds):
            for way in order(ways, number):
                seconds[way.__name__].append(timed(way, number))
        sync.close()
    counted = {name: times[WARM_UP:] for name, times in seconds.items()}
    return summarise(sum(tensor.nbytes for tensor in tensors), **counted)


def summarise(size: int, push: Sequence[float], broadcast: Sequence[float], loading: Sequence[float]) -> dict[str, Any]:
    """MB/s (10^6 bytes) of medians of seconds, ratios to the plain broadcast, and the push's of single rounds."""
    seconds = {"push": push, "broadcast": broadcast, "loading": loading}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    single = [two / one for one, two in zip(push, broadcast, strict=True)]
    return {
        "megabytes": size / 1e6,
        **{f"{name}_s": median for name, median in medians.items()},
        **{f"{name}_mb_per_s": size / 1e6 / median for name, median in medians.items()},
        "ratio": medians["broadcast"] / medians["push"],
        "ratio_of_single_rounds": [min(single), max(single)],
        "ratio_of_loading": medians["broadcast"] / medians["loading"],
    }


def _table(runs: Sequence[dict[str, Any]]) -> Table:
    table = Table("transport", "student")
    for column in ("MB", "push s", "MB/s", "plain broadcast MB/s", "ratio", "rounds", "loading: ratio"):
        table.add_column(column, justify="right")
    for run in runs:
        low, high = run["ratio_of_single_rounds"]
        table.add_row(
            run["transport"],
            run["layout"],
            f"{run['megabytes']:.0f}",
            f"{run['push_s']:.2f}",
            f"{run['push_mb_per_s']:.0f}",
            f"{run['broadcast_mb_per_s']:.0f}",
            f"{run['ratio']:.2f}",
            f"{low:.2f} .. {high:.2f}",
            f"{run['ratio_of_loading']:.2f}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.weight_sync", description=(__doc__ or "").split("\n\n")[0]
    )
    transports = ["broadcast", "tensor", "disk"]
    parser.add_argument("--transports", nargs="+", default=transports, choices=transports)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--bucket-mb", type=float, default=SyncSettings().bucket_mb)
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the model; default {value}")
    parser.add_argument("--no-write", action="store_true", help="print, and leave the results file as it is")
    return parser


if __name__ == "__main__":
    sys.exit(main())
