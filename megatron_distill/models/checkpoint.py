"""Checkpoints of a run: written so that half of one is never read, and readable at another tp, pp or dp.

    <run>/checkpoints/step_000100/  model/  optimizer/   Megatron's distributed format, reshardable
                                    teachers/<name>/     likewise, of teachers with weights of their own
                                    state.json           step, architecture, and whatever else the loop keeps
                                    COMPLETE             written last, after the folder has its name

Megatron's format holds pickled metadata. It is read only from a run folder, or a path, that the user named as a
checkpoint; model folders never pass through here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

import torch

from megatron_distill.errors import CheckpointError
from megatron_distill.models.network import Network
from megatron_distill.models.spec import ModelSpec
from megatron_distill.models.student import Student
from megatron_distill.runtime.mesh import Mesh

COMPLETE = "COMPLETE"

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Optimizer state by parameter, so that another layout can read it."""

_SURPLUS, _SMALL_FILES = 1.02, 2 * 2**20
"""What a checkpoint takes besides its tensors: as a factor, and in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSection:
    """Section `checkpoint`."""

    every: int = 50
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 2
    """How many of the newest stay on disk."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ValueError(f"every={self.every}, keep={self.keep}: every must be >= 0 and keep >= 1")

    def due(self, step: int) -> bool:
        """Whether to save after `step` updates."""
        return self.every > 0 and step % self.every == 0


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return run / "checkpoints" / f"step_{step:06d}"


def complete(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [mark.parent for mark in run.glob(f"checkpoints/step_*/{COMPLETE}") if mark.parent.suffix == ""]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step_")))


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    found = complete(run)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`, besides the step.

    Raises:
        CheckpointError: no complete checkpoint there.
    """
    if not (checkpoint / COMPLETE).is_file():
        raise CheckpointError(
            f"{checkpoint}: no complete checkpoint there (a file {COMPLETE} marks one); name a step_* folder"
        )
    return json.loads((checkpoint / "state.json").read_text())


def check_model(checkpoint: Path, spec: ModelSpec) -> None:
    """That the checkpoint holds weights of this architecture; reads no pickles.

    Raises:
        CheckpointError: it does not, or is not complete.
    """
    saved, asked = read_state(checkpoint)["spec"], json.loads(json.dumps(asdict(spec)))
    differing = [
        f"{name} {saved.get(name)} there, {value} here" for name, value in asked.items() if saved.get(name) != value
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint}: checkpoint of another model ({'; '.join(differing)}); "
            "choose another paths.run, or the student.model that it was made with"
        )


def save(
    run: Path,
    step: int,
    student: Student,
    state: Mapping[str, Any],
    keep: int,
    teachers: Mapping[str, Network] = MappingProxyType({}),
) -> Path:
    """Write the checkpoint after `step` updates; collective. Older ones beyond `keep` go once it is complete.

    Raises:
        CheckpointError: on every rank, the same; the disk is full, say. Older ones are what they were.
    """
    mesh, final = student.mesh, folder_of(run, step)
    partial = final.with_suffix(".partial")
    try:
        with writing(partial, mesh):
            _fresh(final, partial, mesh, [f"teachers/{name}" for name in teachers])
        save_weights(partial, student.network)
        for name, network in teachers.items():
            _save(partial / "teachers" / name, _model_state(network), network)
        _save_optimizer(partial, student)
        with writing(partial, mesh):
            if mesh.rank == 0:
                finish(partial, final, {**state, "step": step, "spec": asdict(student.spec)})
    except CheckpointError:
        # all ranks are here, and whoever has to say so may need the room
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    with writing(final.parent, mesh):
        if mesh.rank == 0:
            for old in complete(run)[:-keep]:
                # unmark first: a half-deleted folder must not look complete
                (old / COMPLETE).unlink()
                shutil.rmtree(old)
    return final


def save_weights(folder: Path, network: Network) -> None:
    """The model's part of a checkpoint into `folder/model`; collective."""
    _save(folder / "model", _model_state(network), network)


def load_weights(checkpoint: Path, network: Network) -> None:
    """Weights of a checkpoint into a network of any layout; collective.

    Raises:
        CheckpointError: not complete, or of another model.
    """
    check_model(checkpoint, network.spec)
    _fill(checkpoint / "model", network)


def load(checkpoint: Path, student: Student, teachers: Mapping[str, Network] = MappingProxyType({})) -> dict[str, Any]:
    """Weights, optimizer state and place in the schedule into a student of any layout; gives `state`; collective.

    Settings are not a checkpoint's: learning rate, decay, length of the schedule are those the student was built with.

    Raises:
        CheckpointError: not complete, or of another model.
    """
    load_weights(checkpoint, student.network)
    for name, network in teachers.items():
        if not (checkpoint / "teachers" / name).is_dir():
            raise CheckpointError(
                f"{checkpoint}: holds no weights of teachers.{name}; go on with the teachers that the run began with"
            )
        _fill(checkpoint / "teachers" / name, network)
    with torch.no_grad():
        asked = _optimizer_state(student, loading=True)
        state = _load(checkpoint / "optimizer", asked, student.network)
        settings = [_settings(group) for group in student.optimizer.param_groups]
        for group in state["optimizer"]["optimizer"]["param_groups"]:
            # Megatron looks a group up by these among others, and finds none where a setting has changed
            group |= {name: settings[0][name] for name in ("max_lr", "min_lr")}
        with student.network.runtime.backend.megatron():
            student.optimizer.load_state_dict(state["optimizer"])
        for group, ours in zip(student.optimizer.param_groups, settings, strict=True):
            group.update(ours)
    kept = read_state(checkpoint)
    student.lr_schedule.step(increment=kept["step"])
    return kept


def finish(partial: Path, final: Path, record: Mapping[str, Any]) -> None:
    """Give a written checkpoint its record, its name and its mark, in an order that survives a crash anywhere."""
    (partial / "state.json").write_text(json.dumps(record, indent=1))
    for written in partial.rglob("*"):
        _flush(written)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(final.parent)
    (final / COMPLETE).touch()
    _flush(final / COMPLETE)
    _flush(final)


def _fill(folder: Path, network: Network) -> None:
    with torch.no_grad():
        state = _load(folder, _model_state(network), network)
        network.model.load_state_dict(state["model"])


def _fresh(final: Path, partial: Path, mesh: Mesh, beside: Iterable[str] = ()) -> None:
    """An empty folder to write into; what saves or deletions that were cut off have left goes."""
    if mesh.rank == 0:
        for folder in final.parent.glob("step_*"):
            whole = (folder / COMPLETE).is_file() and folder != final and folder.suffix != ".partial"
            if folder.is_dir() and not whole:
                shutil.rmtree(folder)
        for part in ("model", "optimizer", *beside):
            (partial / part).mkdir(parents=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _model_state(network: Network) -> dict[str, Any]:
    with network.runtime.backend.megatron():
        return {"model": network.model.sharded_state_dict(metadata=dict(_SHARDING))}


def _optimizer_state(student: Student, loading: bool) -> dict[str, Any]:
    weights = _model_state(student.network)["model"]
    with student.network.runtime.backend.megatron():
        state = student.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=dict(_SHARDING))
    return {"optimizer": state}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter group holds besides its parameters and how far it is."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _save_optimizer(folder: Path, student: Student) -> None:
    _save(folder / "optimizer", _optimizer_state(student, loading=False), student.network)


def _save(folder: Path, state: dict[str, Any], network: Network) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint.api import CheckpointException

    if filesystem_async._results_queue is None:
        # Megatron would spawn a whole process for the queue that its writer threads report to
        filesystem_async._results_queue = queue.Queue()
    _check_room(folder, state, network.runtime.mesh)
    with network.runtime.backend.megatron(), torch.no_grad():
        try:
            dist_checkpointing.save(state, str(folder), content_metadata=dict(_SHARDING))
        except CheckpointException as error:  # of any rank, on all of them; the reason is lost on the way
            raise CheckpointError(f"{folder}: a rank could not write its part; make room there") from error


def _check_room(folder: Path, state: dict[str, Any], mesh: Mesh) -> None:
    """Before anything is written: a rank that then finds no room would leave the others waiting for it.

    Raises:
        CheckpointError: on every rank, the same; a file system that all write to holds less than they have.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    own = sum(
        one.data.nbytes
        for one in nested_values(state)
        if isinstance(one, ShardedTensor | ShardedTensorFactory)
        and one.data is not None
        and is_main_replica(one.replica_id)
    )
    found = mesh.gather_objects((own, shutil.disk_usage(folder).free))
    needed, free = sum(own for own, _ in found), min(free for _, free in found)
    if free < needed * _SURPLUS + _SMALL_FILES:
        raise CheckpointError(
            f"{folder}: cannot be written: {needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB free; make "
            "room there"
        )


@contextlib.contextmanager
def writing(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Within, a rank writes what is its own and exchanges nothing; collective at the end.

    Raises:
        CheckpointError: on every rank, the same; the system refused to write somewhere.
    """
    failed: OSError | None = None
    try:
        yield
    except OSError as error:
        failed = error
    told = mesh.gather_objects(None if failed is None else str(failed.strerror or failed))
    if reasons := [one for one in told if one is not None]:
        raise CheckpointError(f"{folder}: cannot be written: {reasons[0]}; make room there") from failed


def _load(folder: Path, state: dict[str, Any], network: Network) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    with network.runtime.backend.megatron(), reading(folder):
        return dist_checkpointing.load(state, str(folder))


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Within: files that are gone or torn are told in one line.

    Raises:
        CheckpointError: Megatron or torch could not read the checkpoint.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, CheckpointingException, OSError, EOFError, UnpicklingError) as error:
        last = (str(error).strip().splitlines() or [repr(error)])[-1]
        raise CheckpointError(f"{folder}: incomplete or damaged ({last}); use another checkpoint") from error
