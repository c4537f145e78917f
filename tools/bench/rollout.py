"""`python -m tools.bench.rollout`: tokens per second of the SGLang client, against what the server can give.

The ceiling is the same load sent by a bare aiohttp loop: the same bodies, the same number in flight, answers read as
bytes and thrown away. What the client does on top is validation, ids that must never be drawn, one name per request,
reading every log-prob and version, and looking after the server. Rounds of both are interleaved; figures are medians
of wall time, since most of the work is another process's.

Without `--url` it starts a server of its own, with a small model of random weights that never ends a response early.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console

from megatron_distill.rollout import wire
from megatron_distill.rollout.base import Request, Sampling
from megatron_distill.rollout.fleet import Fleet
from megatron_distill.rollout.servers import ServerGroup, ServerSettings
from megatron_distill.rollout.sglang import Address, Client
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.types import Stop
from tools.bench.machine import write_results
from tools.bench.timing import Method, interleave, ratio

CLIENT, BARE = "client", "bare loop"
BAR = 0.95
"""Least share of the bare loop's tokens/s that the client must reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked in one round."""

    requests: int
    in_flight: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Written in a round."""
        return self.requests * self.new_tokens

    def make(self, vocab_size: int) -> list[Request]:
        """The requests, the same in every round."""
        rng = np.random.default_rng(0)
        sampling = Sampling(max_new_tokens=self.new_tokens)
        return [
            Request(
                tokens=tuple(rng.integers(3, vocab_size, self.prompt_tokens).tolist()), sampling=sampling, key=(index,)
            )
            for index in range(self.requests)
        ]


class WallTime:
    """A stopwatch for work that another process does."""

    def time(self, run: Callable[[], Any]) -> float:
        """Milliseconds."""
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON."""
    chosen = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    load = Load(
        requests=chosen.requests,
        in_flight=chosen.in_flight,
        prompt_tokens=chosen.prompt_tokens,
        new_tokens=chosen.new_tokens,
    )
    with _server(chosen.url) as url:
        found = measure(url, load, chosen.rounds)
    console.print(describe(found), highlight=False)
    if not chosen.no_write:
        path = write_results("rollout", found)
        console.print(f"written: {path.relative_to(Path(__file__).parents[2])}", highlight=False)
    return 0 if found["passed"] else 1


def measure(url: str, load: Load, rounds: int) -> dict[str, Any]:
    """Tokens per second of the client and of the bare loop, in interleaved rounds."""
    with asyncio.Runner() as runner:
        fleet = Fleet([Client(Address(url))], in_flight=load.in_flight)
        runner.run(fleet.__aenter__())
        try:
            info = runner.run(fleet.clients[0].info())
            runner.run(fleet.clients[0].set_version("0"))
            fleet.announce(0)
            requests = load.make(info.vocab_size)
            _check(runner.run(fleet.generate_all(requests)), load)
            times = interleave(
                [
                    Method(name=CLIENT, run=lambda: runner.run(fleet.generate_all(requests))),
                    Method(name=BARE, run=lambda: runner.run(_bare(url, requests, load.in_flight))),
                ],
                rounds,
                WallTime(),
                warm_up=1,
            )
        finally:
            runner.run(fleet.__aexit__(None, None, None))
    compared = ratio(times, BARE, CLIENT)
    return {
        "clock": f"wall, medians of {rounds} interleaved rounds",
        "server": f"SGLang {info.version}, one server on the same machine",
        "load": asdict(load),
        "tokens_per_s": {name: round(load.tokens / samples.median * 1e3) for name, samples in times.items()},
        "best_tokens_per_s": {name: round(load.tokens / samples.best * 1e3) for name, samples in times.items()},
        "milliseconds": {name: [round(ms, 1) for ms in samples.ms] for name, samples in times.items()},
        "share_of_ceiling": round(compared.median, 4),
        "share_of_ceiling_best": round(compared.best, 4),
        "bar": BAR,
        "passed": compared.median >= BAR,
    }


def describe(found: dict[str, Any]) -> str:
    """The figures in words."""
    speeds = found["tokens_per_s"]
    return (
        f"client {speeds[CLIENT]} tokens/s, bare loop {speeds[BARE]} tokens/s: {found['share_of_ceiling']:.3f} of the "
        f"server's ceiling (bar {found['bar']}): {'met' if found['passed'] else 'MISSED'}"
    )


async def _bare(url: str, requests: Sequence[Request], in_flight: int) -> None:
    """The same load with nothing around it."""
    places = asyncio.Semaphore(in_flight)
    bodies = [
        wire.generation(request, f"bare-{time.time_ns()}-{index}", (), {}) for index, request in enumerate(requests)
    ]

    async def one(session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        async with places, session.post(f"{url}/generate", json=body) as response:
            assert response.status == 200
            await response.read()

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        await asyncio.gather(*(one(session, body) for body in bodies))


def _check(done: Sequence[Any], load: Load) -> None:
    """Every response has all its tokens, or the figures would compare different amounts of work."""
    if any(one.stop is not Stop.LENGTH or len(one.tokens) != load.new_tokens for one in done):
        raise SystemExit("bench: a response ended early; serve a model whose config.json names no eos_token_id")


@contextmanager
def _server(url: str | None) -> Iterator[str]:
    """The one that was named, or one that lives as long as the bench."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder / "model", "qwen3")
        tiny_tokenizer(model)
        forget_the_end(model)
        settings = ServerSettings(max_total_tokens=65536)
        with ServerGroup(settings, model, "cpu", name="bench", logs=folder / "logs") as group:
            yield group.urls[0]


def forget_the_end(model: Path) -> None:
    """Take the end of a response out of a model folder: every response then has all the tokens it may have."""
    for name in ("config.json", "generation_config.json"):
        path = model / name
        if path.is_file():
            told = json.loads(path.read_text(encoding="utf-8"))
            told.pop("eos_token_id", None)
            path.write_text(json.dumps(told), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.rollout", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--url", help="a server that runs already, whose model names no eos_token_id")
    parser.add_argument("--requests", type=int, default=128, help="in a round")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-write", action="store_true", help="print, and leave the results file as it is")
    return parser


if __name__ == "__main__":
    sys.exit(main())
