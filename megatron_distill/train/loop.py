"""The loop: rollout, pack, teacher, score, train, sync. Data goes one way; two arrows go back, both at `publish`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megatron_distill.config import RunConfig
from megatron_distill.data.packing import pack
from megatron_distill.data.prompts import load_prompts
from megatron_distill.errors import CheckpointError, EngineStopped
from megatron_distill.losses import backend
from megatron_distill.models import checkpoint
from megatron_distill.models.network import Network
from megatron_distill.models.student import Student
from megatron_distill.objectives.base import Scope, State
from megatron_distill.rollout.prefetch import Prefetch
from megatron_distill.rollout.sources._writing import Writing
from megatron_distill.rollout.sources.base import Source, Surroundings
from megatron_distill.runtime.start import Runtime, start
from megatron_distill.teachers.base import Teacher
from megatron_distill.train.describe import describe_cuts, describe_engine, describe_rollouts, describe_step
from megatron_distill.train.heldout import HeldOut
from megatron_distill.train.metrics import Clock, Metrics
from megatron_distill.train.mismatch import mismatch_of
from megatron_distill.train.preflight import shared_vocab, student_tokenizer
from megatron_distill.train.resume import steps_done
from megatron_distill.train.step import Signals, bind, corrected, token_stats
from megatron_distill.types import Batch, Metric, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands, besides its weights and optimizer."""

    step: int = 0
    """Updates done."""
    saved: int = 0
    """Updates behind the newest checkpoint."""
    source: Mapping[str, int] = field(default_factory=dict)
    """The source's place after as many steps: a step that fails in the middle has taken prompts from it."""
    objective: State = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A run's live parts on this rank."""

    runtime: Runtime
    student: Student
    teachers: Mapping[str, Teacher]
    source: Source
    held_out: HeldOut | None


def train(run: RunConfig) -> None:
    """Train, or go on from the newest complete checkpoint of the run folder; the same bits either way."""
    folder, steps = run.paths.run, run.train.steps
    with start(run.parallel, run.precision, run.train.seed) as runtime, connect(run, runtime) as parts:
        backend.use(runtime.backend.losses if run.train.losses == "auto" else run.train.losses)
        progress = resume(run, parts)
        parts.source.publish(parts.student, progress.step)
        opened = Metrics.open(folder, run.metrics, rank=runtime.mesh.rank, done=progress.step, steps=steps)
        with saved_if_stopped(run, parts, progress), opened as metrics:
            for step in range(progress.step, steps):
                with metrics.step(step + 1) as clock:
                    metrics.add(*one_step(run, parts, progress, clock))
                    with clock("sync"):
                        parts.source.publish(parts.student, progress.step)
                if parts.held_out is not None and parts.held_out.section.due(step + 1):
                    metrics.write(step + 1, *parts.held_out.ask(parts.student, step + 1))
                if run.checkpoint.due(step + 1) or step + 1 == steps:
                    save(run, parts, progress)


def one_step(run: RunConfig, parts: Parts, progress: Progress, clock: Clock) -> list[Metric]:
    """Rollout to update; collective. The student and `progress` move on by one step."""
    step, student, runtime = progress.step, parts.student, parts.runtime
    with clock("rollout"):
        scored = parts.source.next(step)
    with clock("pack"):
        fitting = fit(scored, parts.teachers)
        batch = pack_for(runtime, run, fitting)
    with clock("teacher"):
        signals: Signals = {name: teacher.signal(batch) for name, teacher in parts.teachers.items()}
    with clock("score"):
        stats = token_stats(student, batch, signals, run.objective.needs, run.objective.temperature)
    scope = Scope(seed=run.train.seed, step=step, data_group=runtime.mesh.groups.dp)
    plan, progress.objective = run.objective.prepare(stats, batch, scope, progress.objective)
    with clock("score"):
        plan = corrected(plan, run.train.importance, stats, run.objective, batch, scope, student)
    with clock("train"):
        loss = bind(run.objective, signals, plan, batch, student.partition, mismatch_of(batch, scope))
        report = student.step(batch, loss, skip_nonfinite=run.train.on_nonfinite == "skip")
    for teacher in parts.teachers.values():
        teacher.after_step(student, step + 1)
    # the step is done, whatever becomes of the engine when it is given the weights
    progress.step, progress.source = step + 1, parts.source.state()
    memory = runtime.backend.peak_memory()
    return [
        *describe_rollouts(scored, step),
        *describe_cuts(scored, fitting),
        *plan.metrics,
        *describe_step(batch.counts, report, memory),
        *describe_engine(parts.source.engine),
    ]


@contextmanager
def connect(run: RunConfig, runtime: Runtime) -> Iterator[Parts]:
    """Build and load every part; give processes and memory back on the way out."""
    tokenizer = student_tokenizer(run)
    student = Student.build(
        run.student,
        run.optimizer,
        runtime,
        steps=run.train.steps,
        chunk_rows=run.train.chunk_rows,
        valid_vocab=shared_vocab(run),
    )
    logs = run.paths.run / "logs"
    with ExitStack() as stack:
        teachers = {
            name: stack.enter_context(closing(part.connect(student, tokenizer, logs / f"teacher-{name}")))
            for name, part in run.teachers.items()
        }
        source = stack.enter_context(closing(connect_source(run, runtime, student, tokenizer)))
        held_out = HeldOut.connect(run, student, tokenizer, source.engine)
        if held_out is not None:
            stack.enter_context(closing(held_out))
        yield Parts(runtime=runtime, student=student, teachers=teachers, source=source, held_out=held_out)


def connect_source(run: RunConfig, runtime: Runtime, student: Student, tokenizer: PreTrainedTokenizerBase) -> Source:
    """The source of rollouts, ahead of training where the config asks for it."""
    around = surroundings(run, runtime, student, tokenizer)
    if not isinstance(run.rollout, Writing) or run.rollout.prefetch.depth == 0:
        return run.rollout.connect(around)
    # its thread exchanges over a group of its own, and a tokenizer serves one thread
    apart = replace(around, ranks=runtime.mesh.apart(), tokenizer=deepcopy(tokenizer))
    return Prefetch(run.rollout.connect(apart), run.rollout.prefetch, runtime.mesh, run.train.steps)


def surroundings(
    run: RunConfig, runtime: Runtime, student: Student, tokenizer: PreTrainedTokenizerBase
) -> Surroundings:
    """What a rollout source is told of the run."""
    return Surroundings(
        ranks=runtime.mesh,
        mesh=runtime.mesh,
        tokenizer=tokenizer,
        prompts=load_prompts(run.data, tokenizer),
        verifier=run.reward,
        student_folder=run.student.model,
        valid_vocab=student.partition.valid,
        run_folder=run.paths.run,
        seed=run.train.seed,
        prompts_per_step=run.train.prompts_per_step,
        steps=run.train.steps,
        device=runtime.backend.device,
    )


def fit(scored: list[Scored], teachers: Mapping[str, Teacher]) -> list[Scored]:
    """The rollouts of a step as every teacher can read them."""
    for teacher in teachers.values():
        scored = teacher.fit(scored)
    return scored


def pack_for(runtime: Runtime, run: RunConfig, scored: list[Scored]) -> Batch:
    """This rank's share of a step; `scored` is equal on all ranks."""
    return pack(
        scored,
        dp_rank=runtime.mesh.dp_rank,
        dp_size=run.parallel.dp,
        tokens_per_micro_batch=run.train.tokens_per_micro_batch,
        sequence_multiple=run.parallel.sequence_multiple,
        total_multiple=run.parallel.total_multiple,
        device=runtime.backend.device,
        version=min(one.rollout.version for one in scored),
    )


def resume(run: RunConfig, parts: Parts) -> Progress:
    """The state of the newest complete checkpoint, or of a fresh run."""
    found = checkpoint.latest(run.paths.run)
    if found is None:
        return Progress(source=parts.source.state(), objective=run.objective.initial())
    kept = checkpoint.load(found, parts.student, teacher_weights(parts))
    parts.source.restore(kept["source"])
    for teacher in parts.teachers.values():
        teacher.restored()
    done = kept["step"]
    return Progress(step=done, saved=done, source=parts.source.state(), objective=kept["objective"])


def save(run: RunConfig, parts: Parts, progress: Progress) -> None:
    """Everything that `resume` reads, and the size of the vocabulary that an evaluation samples from."""
    state = {
        "source": dict(progress.source),
        "objective": dict(progress.objective),
        "valid_vocab": parts.student.partition.valid,
    }
    weights = teacher_weights(parts)
    checkpoint.save(run.paths.run, progress.step, parts.student, state, keep=run.checkpoint.keep, teachers=weights)
    progress.saved = progress.step


@contextmanager
def saved_if_stopped(run: RunConfig, parts: Parts, progress: Progress) -> Iterator[None]:
    """An engine that cannot go on costs no step that is done: all ranks meet the error together, and save first."""
    try:
        yield
    except (EngineStopped, OSError) as error:
        stopped = stop_behind(error)
        if stopped is None:
            raise
        lines = [str(stopped)]
        if progress.step > progress.saved:
            try:
                save(run, parts, progress)
            except CheckpointError as full:
                lines.append(f"the checkpoint of step {progress.step} could not be saved: {full}")
        lines.append(what_is_saved(run, parts))
        raise EngineStopped("\n".join(lines)) from stopped


def stop_behind(error: BaseException | None) -> EngineStopped | None:
    """The stop that all ranks met, also where the first one then could not write metrics: others know nothing of it."""
    while error is not None and not isinstance(error, EngineStopped):
        error = error.__context__
    return error


def what_is_saved(run: RunConfig, parts: Parts) -> str:
    """Where the same command goes on, as the first rank finds it; collective."""
    done = parts.runtime.mesh.gather_objects(steps_done(run))[0]
    if done == 0:
        return "no step is saved: the same command begins anew"
    return f"{done} steps are saved in {run.paths.run}: the same command goes on from there"


def teacher_weights(parts: Parts) -> dict[str, Network]:
    """By teacher's name: weights that follow neither from the student's nor from a model folder."""
    return {name: teacher.kept for name, teacher in parts.teachers.items() if teacher.kept is not None}
