"""Teachers that servers run: what they cannot say is refused when a config is checked, what they need not is not."""

import json
import shutil

import pytest

from megatron_distill.config import check, load
from megatron_distill.errors import ConfigError


def complaints(run_file, *overrides):
    with pytest.raises(ConfigError) as caught:
        check(load(run_file, overrides))
    return str(caught.value).splitlines()


REMOTE = "teachers.big={kind: remote, model: %s, urls: [http://127.0.0.1:1]}"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["objective={kind: gkd}"],
            "teachers.big.kind=remote with these settings gives the response token's log-prob, objective.kind=gkd "
            "asks for the whole distribution: set objective.support=top_k objective.top_k=64 teachers.big.top_k=64, or",
        ),
        (
            ["objective={kind: gkd, support: top_k, top_k: 8}"],
            "teachers.big.kind=remote with these settings gives the response token's log-prob, objective.kind=gkd "
            "asks for the likeliest ids: set teachers.big.top_k=8, or kind=frozen",
        ),
        (
            ["objective={kind: gkd, support: top_k, top_k: 8}", "teachers.big.top_k=4"],
            "teachers.big.top_k=4: objective.kind=gkd with top_k=8 compares more ids than the teacher names: set",
        ),
        (
            ["objective={kind: eopd}", "teachers.big.top_k=16"],
            "teachers.big.kind=remote with these settings gives the likeliest ids, objective.kind=eopd asks for "
            "the whole distribution: set objective.entropy_of=top_k",
        ),
        (
            ["rollout.engine={kind: sglang, urls: [http://127.0.0.1:1]}"],
            "teachers.big.urls: http://127.0.0.1:1 is one of rollout.engine.urls, which are given the",
        ),
        (["teachers.big.top_k=260"], "teachers.big.top_k=260: more than the 259 ids that all models have: set it to"),
        (
            ["objective.temperature=0.7", "rollout.sampling.temperature=0.7"],
            "objective.temperature=0.7: teachers.big.kind=remote gives log-probs at temperature 1, and",
        ),
    ],
)
def test_what_a_served_teacher_cannot_say_is_refused(run_file, models, overrides, complaint):
    first, *_ = complaints(run_file, REMOTE % (models / "teacher"), *overrides)
    assert first.startswith(complaint)


def test_a_served_teacher_is_cut_by_nobody_and_of_any_family(run_file, models, tmp_path):
    """Four stages do not divide the teacher's layers, and need not; its weights are not looked at."""
    remote = REMOTE % (models / "teacher")
    check(load(run_file, [remote]))
    check(load(run_file, [remote, "objective={kind: gkd, support: top_k, top_k: 8}", "teachers.big.top_k=8"]))
    shutil.copytree(models / "teacher", tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    config |= {"architectures": ["SomeMoE"], "model_type": "some_moe", "num_attention_heads": 7}
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    check(load(run_file, [REMOTE % (tmp_path / "moe"), "parallel.tp=2"]))
    (line,) = complaints(run_file, f"teachers.big.model={tmp_path / 'moe'}")
    assert "SomeMoE" in line
