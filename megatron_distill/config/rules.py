"""What fits together: every rule across sections, each a small function that says what is wrong or nothing.

All of it is known from the config and the models' config.json: no data, no weights, no process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_distill.config.read import kind_of
from megatron_distill.config.run import RunConfig
from megatron_distill.errors import ConfigError, ModelError
from megatron_distill.models.spec import ModelLimits, ModelSpec
from megatron_distill.rollout.sources._writing import Writing
from megatron_distill.runtime.backend import choose
from megatron_distill.runtime.start import world_size
from megatron_distill.types import Fidelity, Origin

REFERENCE = "reference"
"""The name of a teacher that the student is only kept near to."""

type Models = dict[str, ModelSpec]
"""Those that the ranks hold, by where the config names them."""
type Limits = dict[str, ModelLimits]
"""Of all models, by where the config names them."""


def check(run: RunConfig) -> None:
    """Apply every rule.

    Raises:
        ConfigError: one line for each rule that is broken.
    """
    broken = [rule(run) for rule in RULES]
    models: Models = {}
    limits: Limits = {}
    held = dict(mesh_folders(run))
    for place, folder in model_folders(run):
        try:
            if place in held:
                models[place] = ModelSpec.from_folder(folder)
            limits[place] = ModelLimits.from_folder(folder)
        except ModelError as error:
            broken.append(f"{place}: {error}")
    if models:
        broken += [rule(run, models) for rule in MODEL_RULES]
    if limits:
        broken += [rule(run, limits) for rule in LIMIT_RULES]
    if complaints := [complaint for complaint in broken if complaint]:
        raise ConfigError("\n".join(complaints))


def model_folders(run: RunConfig) -> Iterator[tuple[str, Path]]:
    """Where the config names a model, and the folder."""
    yield "student.model", run.student.model
    for name, teacher in run.teachers.items():
        if teacher.folder is not None:
            yield f"teachers.{name}.model", teacher.folder


def mesh_folders(run: RunConfig) -> Iterator[tuple[str, Path]]:
    """Those of `model_folders` whose weights the ranks read."""
    elsewhere = {f"teachers.{name}.model" for name, teacher in run.teachers.items() if not teacher.beside_student}
    yield from ((place, folder) for place, folder in model_folders(run) if place not in elsewhere)


def objective_needs_a_teacher(run: RunConfig) -> str | None:
    if run.objective.needs.teacher is None or run.teachers:
        return None
    return f"teachers: none is given, {_objective(run)} learns from one: set teachers.NAME.kind=frozen and its model"


def objective_reads_its_teachers(run: RunConfig) -> str | None:
    if run.objective.needs.teacher is not None or not run.teachers:
        return None
    names = ", ".join(run.teachers)
    nulls = " ".join(f"teachers.{name}=null" for name in run.teachers)
    return f"teachers: {names} given, {_objective(run)} learns from none: take them out ({nulls}) or change objective"


def teachers_say_enough(run: RunConfig) -> str | None:
    needed = run.objective.needs.teacher
    if needed is None:
        return None
    for name, teacher in run.teachers.items():
        if teacher.provides < needed:
            return (
                f"teachers.{name}.kind={kind_of(teacher)} with these settings gives "
                f"{_SIGNALS[teacher.provides]}, {_objective(run)} asks for {_SIGNALS[needed]}: "
                f"{_richer(run, name, needed)}, or kind=frozen"
            )
    return None


def teachers_name_as_many_ids_as_the_objective_compares(run: RunConfig) -> str | None:
    wanted = getattr(run.objective, "top_k", 0)
    if run.objective.needs.teacher is not Fidelity.TOP_K:
        return None
    for name, teacher in run.teachers.items():
        named = getattr(teacher, "top_k", 0)
        if teacher.provides is Fidelity.TOP_K and named < wanted:
            return (
                f"teachers.{name}.top_k={named}: {_objective(run)} with top_k={wanted} compares more ids than the "
                f"teacher names: set teachers.{name}.top_k={wanted}, or lower objective.top_k"
            )
    return None


def teachers_speak_at_the_temperature_of_the_objective(run: RunConfig) -> str | None:
    if run.objective.needs.teacher is None or run.objective.temperature == 1:
        return None
    for name, teacher in run.teachers.items():
        if teacher.provides < Fidelity.FULL:
            return (
                f"objective.temperature={run.objective.temperature}: teachers.{name}.kind={kind_of(teacher)} gives "
                "log-probs at temperature 1, and what it does not say would be needed to change that: set "
                "objective.temperature=1 (and rollout.sampling.temperature=1), or kind=frozen"
            )
    return None


def teachers_have_the_names_that_the_objective_uses(run: RunConfig) -> str | None:
    names = run.objective.needs.teacher_names
    if not names or names == run.teachers.keys():
        return None
    missing, surplus = sorted(names - run.teachers.keys()), sorted(run.teachers.keys() - names)
    return (
        f"teachers: {', '.join(run.teachers) or 'none'} given, {_objective(run)} with these settings uses "
        f"{', '.join(sorted(names))}: "
        + " and ".join(
            [f"add teachers.{name}" for name in missing]
            + [f"take out teachers.{name} (=null) or name it in the objective's settings" for name in surplus]
        )
    )


def teachers_are_shown_what_there_is(run: RunConfig) -> str | None:
    for name, teacher in run.teachers.items():
        if teacher.view.revision is not None and kind_of(run.reward) == "none" and kind_of(run.rollout) != "replay":
            return (
                f"teachers.{name}.view.revision: tells the teacher whether a response was right, reward.kind=none does "
                "not say: set reward.kind=math or exact"
            )
    return None


def teachers_know_more_than_the_student(run: RunConfig) -> str | None:
    """A copy of the student in the student's own context agrees with it from the first step on."""
    alike = [name for name, teacher in run.teachers.items() if teacher.folder is None and teacher.view.same]
    alone = [name for name in alike if name != REFERENCE] if len(alike) == len(run.teachers) else []
    live = [name for name in alike if getattr(run.teachers[name], "weights", "") == "live"]
    if not alone + live:
        return None
    return (
        f"teachers.{(alone + live)[0]}.kind=itself: with the student's own context it agrees with the student, and "
        "teaches nothing: set its view.privileged or view.revision, or another kind"
    )


def teachers_have_servers_of_their_own(run: RunConfig) -> str | None:
    """Those that write rollouts take the student's weights after every step."""
    writers = set(getattr(getattr(run.rollout, "engine", None), "urls", ()))
    for name, teacher in run.teachers.items():
        if both := writers & set(getattr(teacher, "urls", ())):
            return (
                f"teachers.{name}.urls: {min(both)} is one of rollout.engine.urls, which are given the student's "
                "weights: name servers of its own"
            )
    return None


def objective_needs_a_reward(run: RunConfig) -> str | None:
    if run.objective.needs.reward and kind_of(run.reward) == "none":
        return f"reward.kind=none gives no reward, {_objective(run)} learns from one: set reward.kind=math or exact"
    return None


def rollouts_are_chosen_by_a_reward(run: RunConfig) -> str | None:
    if run.rollout.needs_reward and kind_of(run.reward) == "none":
        return (
            f"reward.kind=none gives no reward, {_rollout(run)} with these settings chooses rollouts by theirs: "
            "set reward.kind=math or exact"
        )
    return None


def backend_can_run_it(run: RunConfig) -> str | None:
    return "\n".join(choose().refusals(run.parallel, run.precision)) or None


def losses_have_the_device_they_need(run: RunConfig) -> str | None:
    if run.train.losses == "triton" and choose().device.type == "cpu":
        return "train.losses=triton needs a GPU: set train.losses=compiled, or auto"
    return None


def launcher_started_as_many_ranks(run: RunConfig) -> str | None:
    started = world_size()
    if started in (1, run.parallel.world):
        return None
    return (
        f"parallel: tp x pp x cp x dp = {run.parallel.world} ranks, but {started} were started: "
        "start as many ranks, or change parallel"
    )


def objective_reads_log_probs_of_rollouts(run: RunConfig) -> str | None:
    if run.objective.needs.student_logprobs != "rollout" or run.rollout.gives_logprobs:
        return None
    kind = kind_of(run.rollout)
    return f"rollout.kind={kind} gives no log-probs, {_objective(run)} reads them: set rollout.kind=generate"


def objective_compares_rollouts_of_a_prompt(run: RunConfig) -> str | None:
    if not run.objective.needs.group or not isinstance(run.rollout, Writing) or run.rollout.samples_per_prompt > 1:
        return None
    return (
        f"rollout.samples_per_prompt={run.rollout.samples_per_prompt}: {_objective(run)} compares rollouts of one "
        "prompt: set 2 or more"
    )


def objective_learns_from_who_wrote(run: RunConfig) -> str | None:
    given, allowed = run.rollout.origins, run.objective.needs.origins
    if given is None or given <= allowed:
        return None
    return (
        f"{_rollout(run)} gives tokens of {_authors(given)}, {_objective(run)} with these settings learns only from "
        f"those of {_authors(allowed)}: change rollout.kind or rollout.on_policy_fraction, or objective.kind"
        f"{_or_the_whole_vocabulary(run)}"
    )


def objective_finds_whose_tokens_it_looks_for(run: RunConfig) -> str | None:
    given, looked_for = run.rollout.origins, run.objective.needs.holds
    if given is None or looked_for <= given:
        return None
    return (
        f"{_rollout(run)} gives tokens of {_authors(given)} alone, {_objective(run)} with these settings needs "
        f"responses with tokens of {_authors(looked_for - given)} too: set rollout.kind=revise (SD-Zero) or reflect "
        "(TAPO), or replay traces of such a run"
    )


def objective_and_rollouts_agree_on_pairs(run: RunConfig) -> str | None:
    given, needed = run.rollout.gives_pairs, run.objective.needs.pairs
    if given is None or given == needed:
        return None
    if needed:
        return (
            f"{_rollout(run)} gives no pairs, {_objective(run)} learns from a chosen and a rejected response to each "
            "prompt: set rollout.kind=pairs, or replay traces of pairs"
        )
    return (
        f"{_rollout(run)} gives a rejected response with each chosen one, {_objective(run)} would learn from both "
        "alike: set objective.kind=redi, dpo or simpo, or rollout.kind=demonstrations"
    )


def objective_learns_from_unfiltered_samples(run: RunConfig) -> str | None:
    if not run.objective.needs.unfiltered_samples or not isinstance(run.rollout, Writing):
        return None
    sampling, wanted = run.rollout.sampling, {"temperature": run.objective.temperature, "top_p": 1.0, "top_k": 0}
    wrong = {name: value for name, value in wanted.items() if getattr(sampling, name) != value}
    if not wrong:
        return None
    given = " ".join(f"rollout.sampling.{name}={getattr(sampling, name)}" for name in wrong)
    right = " ".join(f"rollout.sampling.{name}={value}" for name, value in wrong.items())
    return (
        f"{given}: {_objective(run)} with these settings needs samples of the student's own distribution at "
        f"objective.temperature={run.objective.temperature}: set {right}{_or_the_whole_vocabulary(run)}"
    )


def importance_is_not_corrected_for_twice(run: RunConfig) -> str | None:
    if run.train.importance.weights == "none" or run.objective.needs.student_logprobs != "rollout":
        return None
    return (
        f"train.importance.weights={run.train.importance.weights}: {_objective(run)} with old_logprobs=rollout weighs "
        "tokens by that ratio itself: set train.importance.weights=none, or another objective.old_logprobs"
    )


def importance_compares_with_the_engine(run: RunConfig) -> str | None:
    if run.train.importance.weights == "none" or run.rollout.gives_logprobs:
        return None
    return (
        f"train.importance.weights={run.train.importance.weights}: {_rollout(run)} gives no log-probs to compare "
        "with: set train.importance.weights=none"
    )


def rollouts_ahead_take_weights_as_the_engine_can(run: RunConfig) -> str | None:
    if not isinstance(run.rollout, Writing) or run.rollout.prefetch.on_update == "wait":
        return None
    if not run.rollout.engine.everywhere:
        return None
    return (
        f"rollout.prefetch.on_update=continue: rollout.engine.kind={kind_of(run.rollout.engine)} cannot take weights "
        "while it writes: set rollout.engine.kind=sglang, or rollout.prefetch.on_update=wait"
    )


def evaluation_has_prompts(run: RunConfig) -> str | None:
    if run.eval.every and run.eval.data is None:
        return f"eval.every={run.eval.every}: there is nothing to evaluate on: set eval.data.prompts, or eval.every=0"
    return None


def evaluation_has_a_judge(run: RunConfig) -> str | None:
    if run.eval.every and kind_of(run.reward) == "none":
        return (
            f"eval.every={run.eval.every}: reward.kind=none judges no answer: set reward.kind=math or exact, "
            "or eval.every=0"
        )
    return None


def tp_divides_the_models(run: RunConfig, models: Models) -> str | None:
    counts = [
        (number, f"{what} of {place}")
        for place, spec in models.items()
        for number, what in (
            (spec.num_heads, "attention heads"),
            (spec.num_kv_heads, "key-value heads"),
            (spec.ffn_hidden_size, "feed-forward columns"),
        )
    ]
    return _divides("parallel.tp", run.parallel.tp, counts)


def pp_divides_the_models(run: RunConfig, models: Models) -> str | None:
    return _divides(
        "parallel.pp", run.parallel.pp, [(spec.num_layers, f"layers of {place}") for place, spec in models.items()]
    )


def top_k_is_within_the_vocabulary(run: RunConfig, limits: Limits) -> str | None:
    smallest = min(model.vocab_size for model in limits.values())
    asked = {f"teachers.{name}.top_k": getattr(teacher, "top_k", 0) for name, teacher in run.teachers.items()}
    if getattr(run.objective, "support", "full") != "full":
        asked = {"objective.top_k": getattr(run.objective, "top_k", 0), **asked}
    for setting, k in asked.items():
        if k > smallest:
            return f"{setting}={k}: more than the {smallest} ids that all models have: set it to {smallest} or less"
    return None


RULES: tuple[Callable[[RunConfig], str | None], ...] = (
    objective_needs_a_teacher,
    objective_reads_its_teachers,
    teachers_say_enough,
    teachers_name_as_many_ids_as_the_objective_compares,
    teachers_speak_at_the_temperature_of_the_objective,
    teachers_have_the_names_that_the_objective_uses,
    teachers_are_shown_what_there_is,
    teachers_know_more_than_the_student,
    teachers_have_servers_of_their_own,
    objective_needs_a_reward,
    rollouts_are_chosen_by_a_reward,
    objective_reads_log_probs_of_rollouts,
    objective_compares_rollouts_of_a_prompt,
    objective_learns_from_who_wrote,
    objective_finds_whose_tokens_it_looks_for,
    objective_and_rollouts_agree_on_pairs,
    objective_learns_from_unfiltered_samples,
    importance_is_not_corrected_for_twice,
    importance_compares_with_the_engine,
    rollouts_ahead_take_weights_as_the_engine_can,
    evaluation_has_prompts,
    evaluation_has_a_judge,
    backend_can_run_it,
    losses_have_the_device_they_need,
    launcher_started_as_many_ranks,
)
MODEL_RULES: tuple[Callable[[RunConfig, Models], str | None], ...] = (
    tp_divides_the_models,
    pp_divides_the_models,
)
LIMIT_RULES: tuple[Callable[[RunConfig, Limits], str | None], ...] = (top_k_is_within_the_vocabulary,)


def _objective(run: RunConfig) -> str:
    return f"objective.kind={kind_of(run.objective)}"


_SIGNALS = {
    Fidelity.TOKEN: "the response token's log-prob",
    Fidelity.TOP_K: "the likeliest ids",
    Fidelity.FULL: "the whole distribution",
}


def _richer(run: RunConfig, name: str, needed: Fidelity) -> str:
    """What would make a teacher's signal enough."""
    if needed is Fidelity.TOP_K:
        return f"set teachers.{name}.top_k={getattr(run.objective, 'top_k', 64)}"
    if getattr(run.objective, "entropy_of", None) == "full":
        return f"set objective.entropy_of=top_k objective.support=top_k teachers.{name}.top_k={run.objective.top_k}"  # type: ignore[attr-defined]
    if getattr(run.objective, "support", None) == "full":
        return f"set objective.support=top_k objective.top_k=64 teachers.{name}.top_k=64"
    return "use another setting of objective"


def _rollout(run: RunConfig) -> str:
    return f"rollout.kind={kind_of(run.rollout)}"


def _or_the_whole_vocabulary(run: RunConfig) -> str:
    """The way out for objectives that may compare whole vocabularies instead of sampled tokens."""
    if getattr(run.objective, "divergence", None) != "sampled_token":
        return ""
    return ", or another objective.divergence, such as reverse_kl"


def _authors(origins: frozenset[Origin]) -> str:
    words = {Origin.STUDENT: "the student", Origin.TEACHER: "a teacher", Origin.CONSTRUCTED: "the data"}
    return " and ".join(words[origin] for origin in sorted(origins))


def _divides(setting: str, parts: int, counts: list[tuple[int, str]]) -> str | None:
    """One sentence for all that cannot be cut in so many parts, with the numbers that would do for everything."""
    broken = [f"the {number} {what}" for number, what in counts if number % parts]
    if not broken:
        return None
    common = math.gcd(*(number for number, _ in counts))
    allowed = ", ".join(str(part) for part in range(1, common + 1) if common % part == 0)
    return f"{setting}={parts}: does not divide {', '.join(broken)}; allowed: {allowed}"
