"""Teachers under every cut: what they read in their own view comes back on the student's response axis, row by row.

The truth is `transformers` in float64, one sequence at a time, over the tokens that the view names. Weights of a
self-teacher are followed through real optimizer steps, and through a checkpoint to another layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_distill.data.packing import pack
from megatron_distill.data.phrases import Phrases
from megatron_distill.data.templates import load_tokenizer, render
from megatron_distill.errors import CheckpointError, DataError
from megatron_distill.losses.signal import teacher_logprob
from megatron_distill.models import checkpoint
from megatron_distill.models.network import Network
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.objectives.base import Scope
from megatron_distill.objectives.sft import SFT
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import start
from megatron_distill.teachers._views import Privileged, Revision, View
from megatron_distill.teachers.base import TeacherPart
from megatron_distill.teachers.frozen import FrozenPart
from megatron_distill.teachers.itself import ItselfPart
from megatron_distill.testing.tiny import BYTE_VOCAB_SIZE, tiny_model, tiny_tokenizer
from megatron_distill.testing.world import Worlds
from megatron_distill.train.step import bind, token_stats
from megatron_distill.types import Batch, Full, Origin, Prompt, Rollout, Scored, Stop

RESPONSES = ("four", "it is 17", "so: 5\n", "", "2+2 is 4", "no idea at all", "a")
VIEWS = {
    "same": View(),
    "privileged": View(privileged=Privileged(template="{problem} ({solution})")),
    "revision": View(revision=Revision(phrases=Phrases(right="Good.", wrong="Wrong, once more:"))),
}
LAYOUTS = {
    "one": ParallelSizes(),
    "tp=2 sp": ParallelSizes(tp=2, sequence_parallel=True),
    "pp=2": ParallelSizes(pp=2),
    "cp=2": ParallelSizes(cp=2),
    "dp=2": ParallelSizes(dp=2),
}
OPTIMIZER = OptimizerSection(lr=1e-2)
DECAY = 0.9

type Where = tuple[str, int]
"""(group, sample) of a sequence."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    tiny_model(root / "student", "qwen3", tied=True, hidden=32, heads=4, kv_heads=4)
    tiny_model(root / "other", "llama", hidden=64, heads=8, kv_heads=4, vocab_size=BYTE_VOCAB_SIZE + 200, seed=3)
    for name in ("student", "other"):
        tiny_tokenizer(root / name)
    return root


def scored_of(folder: Path, count: int = len(RESPONSES)) -> list[Scored]:
    tokenizer = load_tokenizer(folder)
    found = []
    for number, text in enumerate(RESPONSES[:count]):
        messages = ({"role": "user", "content": f"{number} and {number}?"},)
        end = (2,) if number % 3 != 1 else ()
        tokens = (*tokenizer(text, add_special_tokens=False)["input_ids"], *end)
        rollout = Rollout(
            prompt=Prompt(
                id=str(number),
                messages=messages,
                tokens=render(tokenizer, messages),
                hints={"solution": "x" * (3 * number + 1)},
            ),
            group=f"g{number // 2}",
            sample=number % 2,
            tokens=tokens,
            logprobs=None,
            origin=(Origin.STUDENT,) * len(tokens),
            stop=Stop.EOS if end else Stop.LENGTH,
            version=0,
        )
        found.append(Scored(rollout=rollout, reward=float(number % 2)))
    return found


def where(one: Scored) -> Where:
    return one.rollout.group, one.rollout.sample


@dataclass(frozen=True)
class World:
    """A student and the batch that this rank holds of the step."""

    student: Student
    batch: Batch
    tokenizer: Any

    def logits(self, part: TeacherPart) -> dict[Where, Tensor]:
        """This rank's columns of the teacher's logits, by sequence; nothing off the last stage."""
        found: dict[Where, Tensor] = {}
        for micro, signal in zip(self.batch.micro, self.connect(part).signal(self.batch), strict=False):
            assert isinstance(signal, Full)
            assert signal.hidden_RH.shape[0] == micro.rows
            raw_Rv = signal.hidden_RH @ signal.head_vH.T
            lengths = [len(one.rollout.tokens) for one in micro.sequences]
            for one, rows_Rv in zip(micro.sequences, raw_Rv.split(lengths), strict=True):
                found[where(one)] = rows_Rv
        return found

    def connect(self, part: TeacherPart) -> Any:
        return part.connect(self.student, self.tokenizer)


@contextmanager
def world(root: Path, sizes: ParallelSizes, count: int = len(RESPONSES), dtype: str = "fp32") -> Iterator[World]:
    with start(sizes, Precision(dtype=dtype)) as runtime:
        student = Student.build(
            StudentSection(model=root / "student"),
            OPTIMIZER,
            runtime,
            steps=10,
            chunk_rows=16,
            valid_vocab=BYTE_VOCAB_SIZE,
        )
        batch = pack(
            scored_of(root / "student", count),
            dp_rank=runtime.mesh.dp_rank,
            dp_size=sizes.dp,
            tokens_per_micro_batch=80,
            sequence_multiple=sizes.sequence_multiple,
            total_multiple=sizes.total_multiple,
            device=torch.device("cpu"),
            version=0,
        )
        yield World(student, batch, load_tokenizer(root / "student"))


def step(here: World) -> None:
    """One update, on the batch as it is."""
    objective, student = SFT(), here.student
    stats = token_stats(student, here.batch, {}, objective.needs, 1.0)
    scope = Scope(seed=0, step=0, data_group=student.mesh.groups.dp)
    plan, _ = objective.prepare(stats, here.batch, scope, {})
    student.step(here.batch, bind(objective, {}, plan, here.batch, student.partition))


# --- what a teacher reads ---------------------------------------------------------------------------------------------


def read_everything(root: Path, sizes: ParallelSizes, count: int) -> tuple[int, dict[str, dict[Where, Tensor]]]:
    """The first vocabulary column of this rank, and its logits by teacher and view."""
    with world(root, sizes, count) as here:
        parts: dict[str, TeacherPart] = {}
        for name, view in VIEWS.items():
            parts[f"student {name}"] = ItselfPart(weights="live", view=view)
            parts[f"other {name}"] = FrozenPart(model=root / "other", view=view)
        return here.student.partition.start, {name: here.logits(part) for name, part in parts.items()}


@torch.no_grad()
def truth(root: Path, count: int) -> dict[str, dict[Where, Tensor]]:
    """The same, uncut: every sequence alone through `transformers`, in float64."""
    found: dict[str, dict[Where, Tensor]] = {}
    tokenizer = load_tokenizer(root / "student")
    for folder in ("student", "other"):
        model = AutoModelForCausalLM.from_pretrained(root / folder, dtype=torch.float64, attn_implementation="eager")
        for name, view in VIEWS.items():
            logits = found[f"{folder} {name}"] = {}
            for one in scored_of(root / "student", count):
                context, response = view.context(tokenizer, one), one.rollout.tokens
                if name == "revision":
                    assert len(context) > len(one.rollout.prompt.tokens) + len(response) - 1
                rows = model(torch.tensor([[*context, *response]])).logits[0]
                logits[where(one)] = rows[len(context) - 1 : len(context) + len(response) - 1, :BYTE_VOCAB_SIZE]
    return found


@pytest.mark.parametrize(("layout", "count"), [*((layout, len(RESPONSES)) for layout in LAYOUTS), ("dp=2", 1)])
def test_every_view_is_read_as_if_each_sequence_were_alone(worlds: Worlds, root: Path, layout: str, count: int) -> None:
    """With one sequence, a data-parallel rank has none and still answers."""
    sizes = LAYOUTS[layout]
    expected = truth(root, count)
    seen: dict[str, set[Where]] = {name: set() for name in expected}
    for start_column, found in worlds(sizes.world).run(read_everything, root, sizes, count, init=False):
        for name, rows in found.items():
            for place, logits_Rv in rows.items():
                right = expected[name][place][:, start_column : start_column + logits_Rv.shape[1]]
                seen[name].add(place)
                torch.testing.assert_close(
                    logits_Rv[:, : right.shape[1]].double(), right, rtol=1e-4, atol=1e-4, msg=f"{name} {place}"
                )
    assert all(places == set(expected[name]) for name, places in seen.items())


def compare_with_itself(root: Path, sizes: ParallelSizes) -> float:
    """Largest error of a log-prob against the student's own score."""
    with world(root, sizes) as here:
        signals = here.connect(ItselfPart(weights="live")).signal(here.batch)
        scores = here.student.score(here.batch, temperature=1.3)
        errors = [
            float((teacher_logprob(signal, micro.target_R, 1.3) - logp_R).abs().max())
            for micro, signal, logp_R in zip(here.batch.micro, signals, scores, strict=False)
            if micro.rows
        ]
        return max(errors, default=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_live_teacher_with_the_students_context_is_the_student(worlds: Worlds, root: Path, layout: str) -> None:
    sizes = LAYOUTS[layout]
    for error in worlds(sizes.world).run(compare_with_itself, root, sizes, init=False):
        assert error <= 1e-5


# --- whose weights they are -------------------------------------------------------------------------------------------


def parameters(network: Network) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in network.parameters().items()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def follow(root: Path, sizes: ParallelSizes, dtype: str) -> dict[str, float]:
    """Errors of each kind of teacher over three updates; 0 or next to it is right."""
    with world(root, sizes, dtype=dtype) as here:
        weights = ("live", "frozen", "ema", "refreshed")
        teachers = {name: here.connect(ItselfPart(weights=name, decay=DECAY, every=2)) for name in weights}
        beginning = parameters(here.student.network)
        average = {name: one.double() for name, one in beginning.items()}
        history = [beginning]
        errors = {"before, all agree": max(distance(parameters(t.network), beginning) for t in teachers.values())}
        for number in range(1, 4):
            step(here)
            for teacher in teachers.values():
                teacher.after_step(here.student, number)
            history.append(parameters(here.student.network))
            for name, now in history[-1].items():
                average[name] = DECAY * average[name] + (1 - DECAY) * now.double()
        moved = distance(history[-1], beginning)
        assert moved > 1e-3, "the student did not learn: nothing would be tested"
        read = {name: parameters(teacher.network) for name, teacher in teachers.items()}
        errors["live"] = distance(read["live"], history[3])
        errors["frozen"] = distance(read["frozen"], beginning)
        errors["refreshed after 2 of 3 steps"] = distance(read["refreshed"], history[2])
        errors["average"] = distance(parameters(teachers["ema"].averages), average) / moved
        assert all(one.dtype == torch.float32 for one in parameters(teachers["ema"].averages).values())
        narrow = {name: one.to(read["ema"][name].dtype) for name, one in average.items()}
        errors["what reads is the average, rounded"] = distance(read["ema"], narrow) / moved
        assert distance(read["ema"], history[3]) > 0.1 * moved
        return errors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_follow_the_student_as_they_should(worlds: Worlds, root: Path, layout: str) -> None:
    sizes = LAYOUTS[layout]
    for errors in worlds(sizes.world).run(follow, root, sizes, "fp32", init=False):
        assert errors.pop("average") <= 1e-5
        assert errors.pop("what reads is the average, rounded") <= 1e-5
        assert not any(errors.values()), errors


def test_averages_of_bf16_weights_are_kept_in_fp32(worlds: Worlds, root: Path) -> None:
    (errors,) = worlds(1).run(follow, root, ParallelSizes(), "bf16", init=False)
    assert errors.pop("average") <= 1e-5, "an average in bf16 would be off by a hundredth of the way, and stand still"
    assert errors.pop("what reads is the average, rounded") <= 0.2
    assert not any(errors.values()), errors


def keep(root: Path, run: Path, sizes: ParallelSizes) -> dict[str, dict[str, Tensor]]:
    """Two steps, a checkpoint; whole weights of the teachers by Hugging Face name."""
    with world(root, sizes) as here:
        teachers = {name: here.connect(part) for name, part in PARTS.items()}
        for number in (1, 2):
            step(here)
            for teacher in teachers.values():
                teacher.after_step(here.student, number)
        kept = {name: teacher.kept for name, teacher in teachers.items() if teacher.kept is not None}
        checkpoint.save(run, 2, here.student, {}, keep=2, teachers=kept)
        return {name: whole(teacher.network) for name, teacher in teachers.items()}


def go_on(root: Path, run: Path, sizes: ParallelSizes) -> dict[str, dict[str, Tensor]]:
    with world(root, sizes) as here:
        teachers = {name: here.connect(part) for name, part in PARTS.items()}
        kept = {name: teacher.kept for name, teacher in teachers.items() if teacher.kept is not None}
        checkpoint.load(run / "checkpoints" / "step_000002", here.student, kept)
        for teacher in teachers.values():
            teacher.restored()
        return {name: whole(teacher.network) for name, teacher in teachers.items()}


def whole(network: Network) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.weights()}


PARTS = {
    "mean": ItselfPart(weights="ema", decay=0.7),
    "copy": ItselfPart(weights="refreshed", every=2),
    "start": ItselfPart(weights="frozen"),
    "now": ItselfPart(weights="live"),
}


def test_a_resumed_run_has_the_same_teachers_at_another_layout(worlds: Worlds, root: Path, tmp_path: Path) -> None:
    saved, _ = worlds(2).run(keep, root, tmp_path / "run", ParallelSizes(tp=2), init=False)
    assert sorted(one.name for one in (tmp_path / "run/checkpoints/step_000002/teachers").iterdir()) == ["copy", "mean"]
    for resumed in worlds(2).run(go_on, root, tmp_path / "run", ParallelSizes(pp=2), init=False):
        assert resumed.keys() == saved.keys()
        for teacher, weights in resumed.items():
            for name, tensor in weights.items():
                assert torch.equal(tensor, saved[teacher][name]), f"{teacher} {name}"


def resume_with_a_teacher_too_many(root: Path, run: Path) -> str:
    with world(root, ParallelSizes()) as here:
        checkpoint.save(run, 2, here.student, {}, keep=2)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(
                run / "checkpoints" / "step_000002", here.student, {"mean": here.connect(PARTS["mean"]).kept}
            )
        return str(caught.value)


def test_a_checkpoint_without_a_teacher_says_so(worlds: Worlds, root: Path, tmp_path: Path) -> None:
    (message,) = worlds(1).run(resume_with_a_teacher_too_many, root, tmp_path / "run", init=False)
    assert "holds no weights of teachers.mean" in message


# --- responses that do not fit ----------------------------------------------------------------------------------------


def fit_some(root: Path) -> tuple[list[int], list[int], str]:
    with world(root, ParallelSizes()) as here:
        scored = scored_of(root / "student")
        whole_view = here.connect(ItselfPart(view=VIEWS["revision"]))
        assert whole_view.fit(scored) == scored
        assert here.connect(ItselfPart()).fit(scored) is scored
        view = View(revision=Revision(phrases=Phrases(right="Good.", wrong="Bad!!")), max_tokens=60)
        cut = here.connect(ItselfPart(view=view)).fit(scored)
        reads = [view.reading(here.tokenizer, one).rollout for one in cut]
        with pytest.raises(DataError) as caught:
            here.connect(ItselfPart(view=View(max_tokens=3))).fit(scored)
        return (
            [len(one.rollout.tokens) for one in cut],
            [len(one.prompt.tokens) + len(one.tokens) for one in reads],
            str(caught.value),
        )


def test_responses_are_cut_to_what_the_teacher_can_read(worlds: Worlds, root: Path) -> None:
    ((lengths, reads, message),) = worlds(1).run(fit_some, root, init=False)
    whole_lengths = [len(one.rollout.tokens) for one in scored_of(root / "student")]
    assert max(reads) <= 60
    assert lengths != whole_lengths
    assert all(length <= most for length, most in zip(lengths, whole_lengths, strict=True))
    assert "no response of the step fits" in message
