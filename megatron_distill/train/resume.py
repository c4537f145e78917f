"""Whether a run folder can be gone on from: its checkpoint is of this model, and its config learns the same thing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_distill.config import RunConfig, load, tree
from megatron_distill.config.compose import Place
from megatron_distill.errors import CheckpointError, ConfigError
from megatron_distill.models.checkpoint import check_model, latest, read_state
from megatron_distill.models.spec import ModelSpec

CONFIG = "config.yaml"
"""The resolved config in a run folder: that of the latest start."""

MAY_CHANGE = (
    "train.steps",  # how a run is extended; `linear` and `cosine` learning rates follow the new length
    "optimizer.lr",  # with the next, what a run that stopped for a NaN is told to look at
    "train.on_nonfinite",
    "train.tokens_per_micro_batch",
    "train.chunk_rows",
    "train.losses",
    "student.recompute",
    "rollout.engine",
    "rollout.record",
    "parallel",
    "checkpoint",
    "eval",
    "metrics",
    "paths",
)
"""Fields, and whole sections, that say how far and on what a run computes, not what it learns."""

_ABSENT = object()


def steps_done(run: RunConfig) -> int:
    """Updates behind the newest complete checkpoint of the run folder; 0 where there is none."""
    found = latest(run.paths.run)
    return 0 if found is None else int(read_state(found)["step"])


def finished(run: RunConfig) -> bool:
    """Whether a checkpoint holds all steps that the config asks for."""
    return latest(run.paths.run) is not None and steps_done(run) >= run.train.steps


def check_checkpoint(run: RunConfig) -> list[str]:
    """What the run folder holds can be gone on from with this student and these settings.

    Raises:
        CheckpointError: the checkpoint is of another model.
        ConfigError: one line for each setting that would change what is learned.
    """
    checkpoint = latest(run.paths.run)
    if checkpoint is None:
        return []
    check_model(checkpoint, ModelSpec.from_folder(run.student.model))
    if (run.paths.run / CONFIG).is_file():
        check_settings(_saved(run.paths.run / CONFIG), run, checkpoint)
    if finished(run):
        return [f"{checkpoint}: all {run.train.steps} steps are done; train.steps sets how many there are"]
    return [f"going on from {checkpoint}"]


def check_settings(saved: RunConfig, run: RunConfig, checkpoint: Path) -> None:
    """That a run that began with `saved` may go on with `run`.

    Raises:
        ConfigError: one line for each field that differs and is not in `MAY_CHANGE`.
    """
    before, now = (dict(_leaves(tree(config), ())) for config in (saved, run))
    places = [place for place in {**before, **now} if before.get(place, _ABSENT) != now.get(place, _ABSENT)]
    # the fields of a part follow from its kind
    kinds = {place[:-1] for place in places if place[-1] == "kind"}
    differing = [
        f"{'.'.join(place)}={_shown(now, place)}: {checkpoint} was made with {_shown(before, place)}; "
        "set it back to go on from there, or choose another paths.run"
        for place in places
        if not _may_change(place) and (place[-1] == "kind" or not any(place[: len(kind)] == kind for kind in kinds))
    ]
    if differing:
        raise ConfigError("\n".join(differing))


def _saved(path: Path) -> RunConfig:
    try:
        return load(path.resolve())
    except ConfigError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: what the run began with cannot be read: {reason}; choose another paths.run"
        ) from error


def _may_change(place: Place) -> bool:
    return any(".".join(place[:end]) in MAY_CHANGE for end in range(1, len(place) + 1))


def _shown(values: Mapping[Place, Any], place: Place) -> str:
    return json.dumps(values[place], ensure_ascii=False) if place in values else "nothing"


def _leaves(values: Mapping[str, Any], above: Place) -> Iterator[tuple[Place, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value
