"""What does not fit together is refused when a config is checked: one line that says what to do."""

import shutil

import pytest

from megatron_distill.config import check, load
from megatron_distill.config.rules import RULES
from megatron_distill.errors import ConfigError


def complaints(run_file, *overrides):
    with pytest.raises(ConfigError) as caught:
        check(load(run_file, overrides))
    return str(caught.value).splitlines()


def test_a_sound_config_passes(run_file):
    check(load(run_file))
    check(load(run_file, ["parallel={tp: 2, pp: 2, dp: 3, sequence_parallel: true}", "precision.dtype=bf16"]))


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("teachers.big=null", "teachers: none is given, objective.kind=opd learns from one: set teachers.NAME.kind"),
        (
            "objective={kind: sft}",
            "teachers: big given, objective.kind=sft learns from none: take them out (teachers.big=null)",
        ),
        (
            "objective.teacher_weights={small: 1}",
            "teachers: big given, objective.kind=opd with these settings uses small: add teachers.small and take out "
            "teachers.big (=null)",
        ),
        (
            "objective={kind: opd, teacher_sources: {math: big, code: coder}}",
            "teachers: big given, objective.kind=opd with these settings uses big, coder: add teachers.coder",
        ),
        (
            "objective={kind: dpo}",
            "teachers: big given, objective.kind=dpo with these settings uses reference: add teachers.reference and",
        ),
        ("rollout={kind: pairs}", "rollout.kind=pairs gives tokens of the data, objective.kind=opd"),
        ("parallel.tp=4", "parallel.tp=4: does not divide the 2 key-value heads of student.model; allowed: 1, 2"),
        ("parallel.pp=4", "parallel.pp=4: does not divide the 2 layers of student.model; allowed: 1, 2"),
        (
            "rollout={kind: demonstrations}",
            "rollout.kind=demonstrations gives tokens of the data, objective.kind=opd with these settings learns only",
        ),
        ("rollout.on_policy_fraction=0.5", "rollout.kind=generate gives tokens of the student and the data, objective"),
        (
            "rollout.sampling.top_p=0.9",
            "rollout.sampling.top_p=0.9: objective.kind=opd with these settings needs samples of the student's own",
        ),
        ("rollout.sampling={top_k: 5, temperature: 0.5}", "rollout.sampling.temperature=0.5 rollout.sampling.top_k=5"),
        ("objective.temperature=2", "rollout.sampling.temperature=1.0: objective.kind=opd with these settings needs"),
        ("eval.every=5", "eval.every=5: there is nothing to evaluate on"),
        ("student.model=nowhere", "student.model: nowhere: no such"),
        ("train.losses=triton", "train.losses=triton needs a GPU: set train.losses=compiled, or auto"),
        ("precision={dtype: bf16, fp8: {}}", "precision.fp8 needs TransformerEngine on a GPU"),
    ],
)
def test_what_cannot_run_here_is_refused(run_file, override, complaint):
    assert complaints(run_file, override)[0].startswith(complaint)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["train.importance.weights=truncated", "objective.old_logprobs=rollout"],
            "train.importance.weights=truncated: objective.kind=opd with old_logprobs=rollout weighs tokens by that",
        ),
        (
            [
                "train.importance.weights=truncated",
                "objective={kind: opd, divergence: reverse_kl}",
                "rollout={kind: demonstrations}",
            ],
            "train.importance.weights=truncated: rollout.kind=demonstrations gives no log-probs to compare with",
        ),
        (
            ["rollout.prefetch={depth: 1, on_update: continue}"],
            "rollout.prefetch.on_update=continue: rollout.engine.kind=embedded cannot take weights while it writes",
        ),
    ],
)
def test_rollouts_ahead_and_their_correction_are_refused_where_they_do_not_fit(run_file, overrides, complaint):
    assert complaints(run_file, *overrides)[0].startswith(complaint)


def test_rollouts_ahead_and_their_correction_pass_where_they_fit(run_file):
    check(load(run_file, ["rollout.prefetch.depth=2", "train.importance={weights: truncated, cap: 3}"]))
    check(load(run_file, ["rollout.prefetch={depth: 1, on_update: continue}", "rollout.engine={kind: sglang}"]))


NO_TEACHER = "teachers.big=null"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["objective={kind: redi}", NO_TEACHER],
            "rollout.kind=generate gives no pairs, objective.kind=redi learns from a chosen and a rejected response",
        ),
        (
            ["objective={kind: sft}", "rollout={kind: pairs}", NO_TEACHER],
            "rollout.kind=pairs gives a rejected response with each chosen one, objective.kind=sft would learn from",
        ),
        (
            ["objective={kind: grpo}", "rollout.samples_per_prompt=4", "reward={kind: none}", NO_TEACHER],
            "reward.kind=none gives no reward, objective.kind=grpo learns from one: set reward.kind=math or exact",
        ),
        (
            ["objective={kind: grpo}", NO_TEACHER],
            "rollout.samples_per_prompt=1: objective.kind=grpo compares rollouts of one prompt: set 2 or more",
        ),
        (
            ["rollout={samples_per_prompt: 4, keep_groups: mixed}", "reward={kind: none}"],
            "reward.kind=none gives no reward, rollout.kind=generate with these settings chooses rollouts by theirs",
        ),
        (
            ["objective={kind: tapo}", "rollout.samples_per_prompt=8", NO_TEACHER],
            "rollout.kind=generate gives tokens of the student alone, objective.kind=tapo with these settings needs",
        ),
        (
            ["objective={kind: sdzero, phase: revision}", NO_TEACHER],
            "rollout.kind=generate gives tokens of the student alone, objective.kind=sdzero with these settings needs",
        ),
        (
            ["objective={kind: sdzero}", "rollout={kind: revise}"],
            "rollout.kind=revise gives tokens of the student and the data, objective.kind=sdzero with these settings",
        ),
        (
            ["teachers={big: null, self: {kind: itself}}", "objective={kind: gkd}"],
            "teachers.self.kind=itself: with the student's own context it agrees with the student, and teaches nothing",
        ),
        (
            ["teachers.self={kind: itself, weights: live}", "objective={kind: gkd}"],
            "teachers.self.kind=itself: with the student's own context it agrees with the student, and teaches nothing",
        ),
        (
            ["objective={kind: gkd, support: top_k, top_k: 1000}"],
            "objective.top_k=1000: more than the 259 ids that all models have: set it to 259 or less",
        ),
        (
            ["objective={kind: tropd}", "rollout={kind: demonstrations}"],
            "rollout.kind=demonstrations gives tokens of the data, objective.kind=tropd with these settings learns",
        ),
    ],
)
def test_what_an_objective_needs_and_nobody_gives_is_refused(run_file, overrides, complaint):
    assert complaints(run_file, *overrides)[0].startswith(complaint)


def test_samples_may_be_filtered_where_the_loss_is_over_the_vocabulary(run_file):
    check(load(run_file, ["rollout.sampling={top_p: 0.9, temperature: 0.7}", "objective.divergence=reverse_kl"]))
    check(load(run_file, ["rollout.sampling.temperature=0.7", "objective.temperature=0.7"]))


def test_a_teacher_needs_something_to_show(run_file):
    revision = [
        "teachers.big=null",
        "teachers.me={kind: itself, view: {revision: {}}}",
        "objective.divergence=reverse_kl",
    ]
    check(load(run_file, revision))
    (line,) = complaints(run_file, *revision, "reward={kind: none}")
    assert line.startswith(
        "teachers.me.view.revision: tells the teacher whether a response was right, reward.kind=none"
    )
    live = ["teachers.big=null", "teachers.me={kind: itself, weights: live}"]
    (line,) = complaints(run_file, *live)
    assert line.startswith("teachers.me.kind=itself: with the student's own context it agrees with the student")
    check(load(run_file, [*live, "teachers.me.view={privileged: {}}"]))


def test_an_evaluation_nobody_judges_is_refused(run_file):
    asked = ["reward={kind: none}", "eval.data.prompts=data.jsonl"]
    check(load(run_file, asked))
    (line,) = complaints(run_file, *asked, "eval.every=2")
    assert line == "eval.every=2: reward.kind=none judges no answer: set reward.kind=math or exact, or eval.every=0"


def test_every_broken_rule_is_one_line_whatever_the_number_of_models(run_file):
    lines = complaints(run_file, "parallel={tp: 3, pp: 3}", "objective={kind: sft}")
    assert [line.split(":")[0] for line in lines] == ["teachers", "parallel.tp=3", "parallel.pp=3"]
    assert "the 4 attention heads of student.model" in lines[1]
    assert "the 8 attention heads of teachers.big.model" in lines[1]


def test_a_launcher_must_have_started_as_many_ranks(run_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    (line,) = complaints(run_file, "parallel.tp=2")
    assert "= 2 ranks, but 4 were started" in line
    check(load(run_file, ["parallel={tp: 2, dp: 2}"]))


def test_a_folder_that_is_no_model_is_refused(run_file, models, tmp_path):
    shutil.copytree(models / "student", tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "gpt2"}')
    (line,) = complaints(run_file, f"student.model={tmp_path / 'broken'}")
    assert line.startswith("student.model: ")
    assert "gpt2" in line


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_say_nothing_of_a_sound_config(rule, run_file):
    assert rule(load(run_file)) is None
