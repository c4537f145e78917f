"""What can be known of a run's files before a process group starts: tokenizers, prompts, the checkpoint to go on from.

Slower than `config.check`, which reads no data: this runs once, in the process that starts the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_distill.config import RunConfig, model_folders
from megatron_distill.data.prompts import Prompts, load_prompts
from megatron_distill.data.templates import compare, load_tokenizer
from megatron_distill.data.traces import read_traces
from megatron_distill.errors import DataError, DistillError
from megatron_distill.models.checkpoint import check_model, latest
from megatron_distill.models.hf.io import SafetensorsFolder
from megatron_distill.models.spec import ModelSpec
from megatron_distill.rollout.demonstrate import check_solutions
from megatron_distill.rollout.sample import check_answers
from megatron_distill.rollout.sources.demonstrations import Demonstrations
from megatron_distill.rollout.sources.generate import Generate
from megatron_distill.rollout.sources.replay import Replay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preflight(run: RunConfig) -> list[str]:
    """Look at every file that a run will read; what a person may like to know, e.g. how many prompts were left out.

    Raises:
        DistillError: one line for everything that is wrong.
    """
    wrong: list[str] = []
    notes: list[str] = []
    for checks in (check_weights, check_teachers, check_prompts, check_evaluation, check_checkpoint):
        try:
            notes += checks(run)
        except DistillError as error:
            wrong += str(error).splitlines()
    if wrong:
        raise DistillError("\n".join(dict.fromkeys(wrong)))
    return notes


def check_weights(run: RunConfig) -> list[str]:
    """Every model folder holds safetensors."""
    for _, folder in model_folders(run):
        SafetensorsFolder(folder)
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


def check_prompts(run: RunConfig) -> list[str]:
    """The data loads, is not empty, fits the models, and has what the source of rollouts reads."""
    source, prompts = run.rollout, load_prompts(run.data, student_tokenizer(run))
    if isinstance(source, Generate):
        check_answers(run.reward, prompts.items)
        check_lengths(run, prompts, source.sampling.max_new_tokens, "rollout.sampling.max_new_tokens")
    if isinstance(source, Demonstrations) or (isinstance(source, Generate) and source.on_policy_fraction < 1):
        check_solutions(list(prompts))
    if isinstance(source, Replay):
        read_traces(source.path)
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
    for place, folder in model_folders(run):
        positions = ModelSpec.from_folder(folder).max_positions
        if longest + new_tokens > positions:
            raise DataError(
                f"{setting}={new_tokens}: with the longest prompt ({longest} tokens) more than the {positions} "
                f"positions of {place}: set it to {max(positions - longest, 0)} or less, or lower max_prompt_tokens"
            )


def check_checkpoint(run: RunConfig) -> list[str]:
    """What the run folder holds can be gone on from with this student."""
    checkpoint = latest(run.paths.run)
    if checkpoint is None:
        return []
    check_model(checkpoint, ModelSpec.from_folder(run.student.model))
    return [f"going on from {checkpoint}"]


def student_tokenizer(run: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the run."""
    return load_tokenizer(run.student.model, run.student.trust_remote_code)


def _counted(prompts: Prompts) -> str:
    left_out = f", {prompts.skipped} over max_prompt_tokens left out" if prompts.skipped else ""
    return f"{len(prompts)} prompts{left_out}"
