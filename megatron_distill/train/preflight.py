"""What can be known of a run's files before a process group starts: tokenizers, prompts, the checkpoint to go on from.

Slower than `config.check`, which reads no data: this runs once, in the process that starts the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_distill.config import RunConfig, mesh_folders, model_folders
from megatron_distill.data.prompts import Prompts, load_prompts
from megatron_distill.data.templates import compare, end_of_sequence, load_tokenizer, stop_ids
from megatron_distill.errors import DataError, DistillError, ModelError
from megatron_distill.models.hf.io import SafetensorsFolder
from megatron_distill.models.hf.stage import check_folder
from megatron_distill.models.spec import ModelLimits, ModelSpec
from megatron_distill.rollout.demonstrate import check_solutions, solution_lengths
from megatron_distill.rollout.engines.sglang import SGLang
from megatron_distill.rollout.sample import check_answers
from megatron_distill.rollout.server_settings import KEPT, read_api_key, server_python
from megatron_distill.rollout.sources._writing import Writing
from megatron_distill.rollout.sources.demonstrations import Demonstrations
from megatron_distill.rollout.sources.generate import Generate
from megatron_distill.rollout.sources.pairs import Pairs, check_pair_lengths, check_pairs
from megatron_distill.rollout.sources.prefix import Prefix, check_beginnings
from megatron_distill.rollout.sources.replay import Replay, Traces
from megatron_distill.teachers._views import check_hints
from megatron_distill.teachers.remote import RemotePart
from megatron_distill.train.resume import check_checkpoint, steps_done

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preflight(run: RunConfig) -> list[str]:
    """Look at every file that a run will read; what a person may like to know, e.g. how many prompts were left out.

    Raises:
        DistillError: one line for everything that is wrong.
    """
    wrong: list[str] = []
    notes: list[str] = []
    for checks in (
        check_weights,
        check_teachers,
        check_vocabulary,
        check_engine,
        check_prompts,
        check_evaluation,
        check_checkpoint,
    ):
        try:
            notes += checks(run)
        except DistillError as error:
            wrong += str(error).splitlines()
    if wrong:
        raise DistillError("\n".join(dict.fromkeys(wrong)))
    return notes


def check_weights(run: RunConfig) -> list[str]:
    """Every model folder that the ranks read holds safetensors, and those that its config.json asks for."""
    for _, folder in mesh_folders(run):
        check_folder(ModelSpec.from_folder(folder), SafetensorsFolder(folder))
    return []


def check_teachers(run: RunConfig) -> list[str]:
    """Every teacher reads the student's ids."""
    student = student_tokenizer(run)
    for teacher in run.teachers.values():
        if teacher.folder is None:
            continue
        if difference := compare(student, load_tokenizer(teacher.folder, getattr(teacher, "trust_remote_code", False))):
            raise DataError(difference)
    return []


def check_vocabulary(run: RunConfig) -> list[str]:
    """Every id of the tokenizer has a row in every model; models may have more rows, and many do."""
    tokenizer = student_tokenizer(run)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    for place, folder in model_folders(run):
        rows = ModelLimits.from_folder(folder).vocab_size
        if largest >= rows:
            raise ModelError(
                f"{run.student.model}: the tokenizer's id {largest} ({token!r}) is outside the vocabulary of {place}, "
                f"which has ids below {rows}; take the tokenizer that the model was made with, or resize its embedding"
            )
    return []


def check_engine(run: RunConfig) -> list[str]:
    """Servers that the run is to start have something to run with, and a key if they want one."""
    engine = served_by(run)
    if engine is not None:
        read_api_key(engine.servers.api_key_file)
        if not engine.urls:
            server_python(engine.servers.python)
    for teacher in run.teachers.values():
        if isinstance(teacher, RemotePart):
            teacher.check()
    return []


def served_by(run: RunConfig) -> SGLang | None:
    """The engine, where rollouts are written by servers."""
    engine = run.rollout.engine if isinstance(run.rollout, Writing) else None
    return engine if isinstance(engine, SGLang) else None


def check_prompts(run: RunConfig) -> list[str]:
    """The data loads, is not empty, fits the models, and has what the source of rollouts reads."""
    source, tokenizer = run.rollout, student_tokenizer(run)
    prompts = load_prompts(run.data, tokenizer)
    if isinstance(source, Writing):
        stop_ids(tokenizer, run.student.model)
        check_answers(run.reward, prompts.items)
        check_lengths(run, prompts, source.sampling.max_new_tokens, "rollout.sampling.max_new_tokens")
    if isinstance(source, Prefix):
        check_beginnings(source, prompts.items)
    if isinstance(source, Demonstrations):
        check_demonstrations(run, source.max_response_tokens, "rollout.max_response_tokens", prompts, tokenizer)
    if isinstance(source, Generate) and source.on_policy_fraction < 1:
        check_demonstrations(run, source.max_solution_tokens, "rollout.max_solution_tokens", prompts, tokenizer)
    if isinstance(source, Pairs):
        end_of_sequence(tokenizer)
        check_pairs(source, prompts.items)
        check_lengths(run, prompts, source.max_response_tokens, "rollout.max_response_tokens")
        if source.long_pairs == "refuse":
            check_pair_lengths(source, prompts.items, tokenizer)
    if isinstance(source, Replay):
        check_replay(run, source)
    else:
        for name, teacher in run.teachers.items():
            check_hints(name, teacher.view, prompts.items)
    return [f"data: {_counted(prompts)}"]


def check_evaluation(run: RunConfig) -> list[str]:
    """The held-out prompts likewise."""
    if run.eval.data is None:
        return []
    prompts = load_prompts(run.eval.data, student_tokenizer(run))
    check_answers(run.reward, prompts.items)
    check_lengths(run, prompts, run.eval.sampling.max_new_tokens, "eval.sampling.max_new_tokens")
    return [f"eval.data: {_counted(prompts)}"]


def check_lengths(run: RunConfig, prompts: Prompts, new_tokens: int, setting: str) -> None:
    """Prompts and responses are within what every model was made for.

    Raises:
        DataError: they are not.
    """
    longest = max(len(prompt.tokens) for prompt in prompts)
    place, positions = _fewest_positions(run)
    if longest + new_tokens > positions:
        raise DataError(
            f"{setting}={new_tokens}: with the longest prompt ({longest} tokens) more than the {positions} "
            f"positions of {place}: set it to {max(positions - longest, 0)} or less, or lower max_prompt_tokens"
        )


def check_demonstrations(
    run: RunConfig, most: int, setting: str, prompts: Prompts, tokenizer: PreTrainedTokenizerBase
) -> None:
    """There are solutions, within what every model was made for; they are cut into ids only if in doubt.

    Raises:
        DataError: they are not.
    """
    end_of_sequence(tokenizer)
    check_solutions(list(prompts))
    place, positions = _fewest_positions(run)
    asked = [len(prompt.tokens) for prompt in prompts]
    if max(asked) + most <= positions:
        return
    solved = solution_lengths(tokenizer, prompts.items, most)
    whole, index = max((both, index) for index, both in enumerate(map(sum, zip(asked, solved, strict=True))))
    worst = prompts.items[index].id
    if whole > positions:
        raise DataError(
            f"{setting}={most}: prompt {worst} and its solution are {whole} tokens, "
            f"more than the {positions} positions of {place}: set it to {max(positions - max(asked), 0)} or less, or "
            "lower max_prompt_tokens"
        )


def check_replay(run: RunConfig, source: Replay) -> None:
    """Recorded rollouts: every step that is still to be done, ids that all models have, lengths that they can read.

    Raises:
        DataError: something is missing or does not fit.
    """
    traces = Traces.read(source.path)
    traces.check_steps(range(steps_done(run), run.train.steps))
    traces.check_ids(shared_vocab(run))
    place, positions = _fewest_positions(run)
    traces.check_lengths(positions, place)


def shared_vocab(run: RunConfig) -> int:
    """Ids that the student and all teachers know: no other id gets probability anywhere in the run."""
    return min(ModelLimits.from_folder(folder).vocab_size for _, folder in model_folders(run))


def student_tokenizer(run: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the run."""
    return load_tokenizer(run.student.model, run.student.trust_remote_code)


def _fewest_positions(run: RunConfig) -> tuple[str, int]:
    """The model that was made for the shortest sequences, or a server that is told to, and their length."""
    positions = {place: ModelLimits.from_folder(folder).max_positions for place, folder in model_folders(run)}
    engine = served_by(run)
    if engine is not None and not engine.urls:
        context = engine.servers.context_length or positions["student.model"]
        place = f"rollout.engine.servers.context_length={context}, less {KEPT} that a server keeps"
        positions[place] = engine.room(context)
    return min(positions.items(), key=lambda item: item[1])


def _counted(prompts: Prompts) -> str:
    left_out = f", {prompts.skipped} over max_prompt_tokens left out" if prompts.skipped else ""
    return f"{len(prompts)} prompts{left_out}"
