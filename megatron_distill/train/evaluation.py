"""Evaluate a model as it lies on disk, a model folder or a checkpoint of a run, without training it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_distill.config import RunConfig
from megatron_distill.config.read import kind_of
from megatron_distill.data.prompts import load_prompts
from megatron_distill.data.templates import load_tokenizer
from megatron_distill.errors import ConfigError
from megatron_distill.eval.runner import evaluate
from megatron_distill.files import write_atomically
from megatron_distill.models.checkpoint import check_model, load_weights, read_state
from megatron_distill.models.hf.io import SafetensorsFolder
from megatron_distill.models.hf.mapping import rules
from megatron_distill.models.hf.stage import check_folder
from megatron_distill.models.network import Network
from megatron_distill.models.spec import ModelSpec
from megatron_distill.models.student import Student
from megatron_distill.rollout.base import HoldsWeights, WholeWeights
from megatron_distill.rollout.engines.base import EnginePart, Serving
from megatron_distill.rollout.engines.embedded import Embedded
from megatron_distill.rollout.sample import Tools
from megatron_distill.rollout.sources._writing import Writing
from megatron_distill.runtime.backend import choose
from megatron_distill.runtime.mesh import Mesh, Ranks
from megatron_distill.runtime.start import start, start_ranks
from megatron_distill.train.metrics import jsonable
from megatron_distill.train.preflight import check_engine, check_evaluation, check_vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an evaluation found."""

    model: Path
    problems: int
    metrics: Mapping[str, float]

    def write(self, path: Path) -> None:
        """As JSON, in one atomic replacement."""
        metrics = {name: jsonable(value) for name, value in self.metrics.items()}
        told = {"model": str(self.model), "problems": self.problems, "metrics": metrics}
        write_atomically(path, json.dumps(told, indent=2, allow_nan=False) + "\n")


def check_evaluable(run: RunConfig, checkpoint: Path | None = None) -> list[str]:
    """What an evaluation reads, before any process group.

    Raises:
        DistillError: no held-out prompts are named, or something cannot be read.
    """
    if run.eval.data is None:
        raise ConfigError("eval.data: nothing to evaluate on; set eval.data.prompts")
    if kind_of(run.reward) == "none":
        raise ConfigError("reward.kind=none: judges no answer; set reward.kind=math or exact")
    spec = ModelSpec.from_folder(run.student.model)
    check_folder(spec, SafetensorsFolder(run.student.model))
    if checkpoint is not None:
        check_model(checkpoint, spec)
    # only the student answers, whatever teachers the config names
    alone = replace(run, teachers={})
    return [*check_vocabulary(alone), *check_engine(alone), *check_evaluation(alone)]


def evaluate_model(run: RunConfig, checkpoint: Path | None = None, responses: Path | None = None) -> Report | None:
    """Ask a model every prompt of `run.eval`; ranks share the prompts, and only the first reports.

    Args:
        run: each of its `parallel.dp` ranks holds a whole copy of the model.
        checkpoint: whose weights in place of those of `run.student.model`.
        responses: folder for what the model wrote.
    """
    assert run.eval.data is not None
    folder = run.student.model
    with _weights(run, checkpoint) as (ranks, model):
        tokenizer = load_tokenizer(folder, run.student.trust_remote_code)
        prompts = load_prompts(run.eval.data, tokenizer)
        valid = None if checkpoint is None else read_state(checkpoint).get("valid_vocab")
        serving = Serving(
            folder=folder,
            tokenizer=tokenizer,
            ranks=ranks,
            mesh=ranks if isinstance(ranks, Mesh) else None,
            valid_vocab=valid,
            device=choose().device,
        )
        with closing(engine_part(run).connect(serving)) as engine, closing(run.reward.connect()) as judge:
            engine.load_weights(model, version=0)
            tools = Tools(engine=engine, judge=judge, tokenizer=tokenizer, ranks=ranks)
            metrics = evaluate(tools, prompts, run.eval, step=0, seed=run.train.seed, folder=responses)
        if ranks.rank != 0:
            return None
    values = {metric.name: metric.value for metric in metrics}
    return Report(model=checkpoint or folder, problems=len(prompts), metrics=values)


def engine_part(run: RunConfig) -> EnginePart:
    """The engine that the run writes its rollouts with, where it writes any."""
    return run.rollout.engine if isinstance(run.rollout, Writing) else Embedded()


@contextmanager
def _weights(run: RunConfig, checkpoint: Path | None) -> Iterator[tuple[Ranks, HoldsWeights]]:
    """The ranks, and whose weights to take; only a checkpoint needs Megatron to be read."""
    spec = ModelSpec.from_folder(run.student.model)
    if checkpoint is None:
        reader = SafetensorsFolder(run.student.model)
        # a folder may hold more, such as the rotary frequencies of old Llama models
        names = [name for rule in rules(spec) if rule.exported for name in rule.hf]
        with start_ranks() as ranks:
            yield ranks, WholeWeights(lambda: ((name, reader.read(name)) for name in names), folder=run.student.model)
    else:
        with start(run.parallel, run.precision, run.train.seed) as runtime:
            network = Network.empty(spec, runtime)
            load_weights(checkpoint, network)
            # nobody trains it, and engines push weights of students
            yield runtime.mesh, Student(network=network, optimizer=None, lr_schedule=None, chunk_rows=1024)
