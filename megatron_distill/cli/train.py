"""`train CONFIG`: check everything that can be checked, then start the ranks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from megatron_distill.cli import ranks
from megatron_distill.cli.arguments import add_config, add_verb, add_worker

if TYPE_CHECKING:
    from megatron_distill.config import RunConfig


def add_to(verbs: Any) -> None:
    """Describe the verb."""
    parser = add_verb(verbs, "train", "train a student, or go on with a run that was cut off", run)
    add_config(parser)
    add_worker(parser)


def run(chosen: argparse.Namespace) -> int:
    """In a rank: train. Otherwise check, write the resolved config into the run folder, and start the ranks."""
    from megatron_distill.config import check, load

    run = load(chosen.config, chosen.overrides)
    if chosen.worker:
        return _train(run)
    check(run)
    speaks = not ranks.launched() or ranks.is_first()
    if speaks:
        from megatron_distill.train.preflight import preflight

        for note in preflight(run):
            print(note, flush=True)
    from megatron_distill.train.resume import finished

    if finished(run):
        return 0
    with _prepared(run) if speaks else nullcontext():
        if ranks.launched() or run.parallel.world == 1:
            return _train(run)
        return ranks.start(["train", str(run.paths.run / "config.yaml")], run.parallel.world, run.paths.run)


@contextmanager
def _prepared(run: RunConfig) -> Iterator[None]:
    """The run folder, held for this run, with what its numbers came from in it."""
    from megatron_distill.config import save
    from megatron_distill.train.environment import write_environment
    from megatron_distill.train.folder import claim

    with claim(run.paths.run):
        save(run, run.paths.run / "config.yaml")
        write_environment(run.paths.run)
        yield


def _train(run: RunConfig) -> int:
    from megatron_distill.train.loop import train

    train(run)
    return 0
