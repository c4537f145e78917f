"""`eval TARGET`: how many held-out problems a model solves."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_distill.cli import ranks
from megatron_distill.cli.arguments import OVERRIDE, add_verb, add_worker
from megatron_distill.errors import ConfigError

if TYPE_CHECKING:
    from megatron_distill.config import RunConfig
    from megatron_distill.train.evaluation import Report


def add_to(verbs: Any) -> None:
    """Describe the verb."""
    parser = add_verb(verbs, "eval", "ask a model held-out problems, on parallel.tp x pp x cp x dp processes", run)
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a run folder (its newest checkpoint), a Hugging Face model folder, or a config (its student.model)",
    )
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help=OVERRIDE)
    parser.add_argument("--config", metavar="CONFIG", help="whose sections eval and reward, for a model folder")
    parser.add_argument("--checkpoint", metavar="FOLDER", type=Path, help="a step_* folder, not the newest of the run")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the numbers there as JSON as well")
    parser.add_argument("--responses", metavar="FOLDER", type=Path, help="write what the model answered there")
    add_worker(parser)


def run(chosen: argparse.Namespace) -> int:
    """In a rank: evaluate. Otherwise check, and start the ranks."""
    from megatron_distill.train.evaluation import check_evaluable

    run = _resolve(chosen)
    if chosen.worker:
        return _evaluate(run, chosen)
    if not ranks.launched() or ranks.is_first():
        check_evaluable(run, chosen.checkpoint)
        _check_outputs(chosen)
    if ranks.launched() or run.parallel.world == 1:
        return _evaluate(run, chosen)
    return _start(run, chosen)


def _resolve(chosen: argparse.Namespace) -> RunConfig:
    """The config that the target means; of a run folder, the checkpoint goes into `chosen`."""
    from megatron_distill.config import load
    from megatron_distill.models.checkpoint import latest
    from megatron_distill.runtime.mesh import ParallelSizes

    target = Path(chosen.target)
    config, model = chosen.config or chosen.target, []
    if (target / "config.json").is_file():
        if chosen.config is None:
            raise ConfigError(f"{target}: a model folder has no eval section; name a config with --config")
        model = [f"student.model={target}"]
    elif (target / "config.yaml").is_file():
        config = chosen.config or target / "config.yaml"
        chosen.checkpoint = chosen.checkpoint or latest(target)
        if chosen.checkpoint is None:
            raise ConfigError(f"{target}: no complete checkpoint in this run folder yet")
    elif target.is_dir() or chosen.config:
        raise ConfigError(f"{target}: neither a model folder (config.json) nor a run folder (config.yaml)")
    run = load(config, [*model, *chosen.overrides])
    # each rank holds a whole model, so all of them are data-parallel
    return dataclasses.replace(run, parallel=ParallelSizes(dp=run.parallel.world))


def _check_outputs(chosen: argparse.Namespace) -> None:
    """What was asked for can be written: after hours of answers it is too late to say no."""
    from megatron_distill.train.folder import check_writable

    if chosen.output:
        if chosen.output.is_dir():
            raise ConfigError(f"--output: {chosen.output} is a folder; name a file, e.g. {chosen.output / 'eval.json'}")
        check_writable(chosen.output.parent, "--output")
    if chosen.responses:
        check_writable(chosen.responses, "--responses")


def _start(run: RunConfig, chosen: argparse.Namespace) -> int:
    """Ranks of an evaluation meet in a folder of their own, which stays only if something went wrong."""
    from megatron_distill.config import save

    scratch = Path(tempfile.mkdtemp(prefix="megatron-distill-eval-"))
    run = dataclasses.replace(run, paths=dataclasses.replace(run.paths, run=scratch))
    save(run, scratch / "config.yaml")
    words = ["eval", str(scratch / "config.yaml")]
    for option in ("checkpoint", "output", "responses"):
        if path := getattr(chosen, option):
            words += [f"--{option}", str(path)]
    code = ranks.start(words, run.parallel.world, scratch)
    if code == 0:
        shutil.rmtree(scratch)
    return code


def _evaluate(run: RunConfig, chosen: argparse.Namespace) -> int:
    from megatron_distill.train.evaluation import evaluate_model

    report = evaluate_model(run, chosen.checkpoint, chosen.responses)
    if report is not None:
        _show(report)
        if chosen.output:
            report.write(chosen.output)
    return 0


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    for name, value in report.metrics.items():
        share = not name.endswith(("_mean", "_max"))
        counted = f"{value:.1%}" if share else f"{value:.1f}"
        table.add_row(name, "-" if math.isnan(value) else counted)
    console = Console()
    console.print(f"{report.model}: {report.problems} problems", highlight=False, soft_wrap=True)
    console.print(table)
