"""A whole config: strict in what it takes, complete in what it complains of, and the same after a round trip."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_distill import plugins
from megatron_distill.config import check, dump, load, reference, save, schema, tree
from megatron_distill.config.run import ENGINES, PARTS
from megatron_distill.errors import ConfigError
from megatron_distill.rollout.engines.embedded import Embedded


def complaints(run_file, *overrides):
    with pytest.raises(ConfigError) as caught:
        check(load(run_file, overrides))
    return str(caught.value).splitlines()


def test_the_resolved_config_loads_to_the_same_run(run_file):
    run = load(run_file, ["optimizer.lr=3e-4", "precision={dtype: bf16}", "paths.run=elsewhere"])
    assert run.optimizer.lr == 3e-4
    assert run.paths.run == Path("elsewhere")
    save(run, run.paths.run / "config.yaml")
    again = load(run.paths.run / "config.yaml")
    assert again == run
    assert dump(again) == dump(run)
    check(again)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.stepz=3", "train.stepz=3: unknown key; did you mean 'steps'? (command line)"),
        ("train.lr=3", "train.lr=3: unknown key; did you mean 'optimizer.lr'? (command line)"),
        ("trian.steps=3", "trian={\"steps\": 3}: unknown key; did you mean 'train'?"),
        ("train.steps=many", 'train.steps="many": must be a valid integer (command line)'),
        ("train.steps=2.5", "train.steps=2.5: must be a valid integer (command line)"),
        ("train.steps='5'", 'train.steps="5": must be a valid integer (command line)'),
        ("train.steps=null", "train.steps=null: must be a valid integer (command line)"),
        ("train=5", "train=5: must be a mapping (command line)"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: required, and not given (command line)"),
        (
            "precision.dtype=bf61",
            "precision.dtype=\"bf61\": must be 'fp32' or 'bf16'; did you mean 'bf16'? (command line)",
        ),
        ("precision.fp8={recipee: mxfp8}", "precision.fp8.recipee=\"mxfp8\": unknown key; did you mean 'recipe'?"),
        ("parallel.tp=0", "parallel.tp=0: must be at least 1"),
        ("objective.kind=odp", 'objective.kind="odp": no such part in megatron_distill.objectives; allowed: '),
        ("objective=opd", 'objective="opd": must be a mapping with a `kind` (command line)'),
        ("objective.beta=0.5", "objective.beta=0.5: unknown key; allowed: "),
        ("teachers.big.modle=x", "teachers.big.modle=\"x\": unknown key; did you mean 'model'? (command line)"),
        ("teachers.small={model: x}", "teachers.small.kind: required, and not given; allowed kinds: frozen"),
        ("teachers=big", 'teachers="big": must be a mapping from names to parts'),
        ("student=null", "student.model: required, and not given"),
        ("data.prompts=3", "data.prompts=3: must be a valid string"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_path_and_what_is_allowed(run_file, override, complaint):
    (line,) = complaints(run_file, override)
    assert line.startswith(complaint)


def test_everything_wrong_is_told_at_once_one_line_each(run_file):
    run_file.write_text(run_file.read_text() + "optimizer: {lr: fast, learning: 1}\n")
    lines = complaints(run_file, "train.steps=x", "objective.kind=nothing", "parallel.cpp=1")
    assert [line.split("=")[0] for line in lines] == [
        "objective.kind",
        "optimizer.lr",
        "optimizer.learning",
        "train.steps",
        "parallel.cpp",
    ]
    assert "(run.yaml)" in lines[1]


def test_null_takes_out_a_teacher_of_a_base_file(run_file):
    assert not load(run_file, ["teachers.big=null"]).teachers


@pytest.mark.parametrize("package", [parts.package for parts in (*PARTS.values(), ENGINES)])
def test_every_kind_loads_and_its_fields_are_told(package):
    base = next(parts.base for parts in (*PARTS.values(), ENGINES) if parts.package == package)
    for kind in plugins.kinds(package):
        assert issubclass(plugins.load(package, kind, base), base)
        assert f".kind = {kind}\n" in reference()


def test_every_field_has_a_text():
    lines = reference().splitlines()
    silent = [
        line for line, below in zip(lines, [*lines[1:], ""], strict=True) if line and line[0] != " " and not below
    ]
    assert not silent


def test_the_schema_has_every_section_and_kind():
    told = json.loads(json.dumps(schema()))
    assert {"student", "teachers", "objective", "base"} <= told["properties"].keys()
    kinds = [told["$defs"][one["$ref"].rpartition("/")[2]] for one in told["properties"]["objective"]["oneOf"]]
    assert {one["properties"]["kind"]["const"] for one in kinds} >= {"sft", "opd", "gkd"}
    assert not any(one["additionalProperties"] for one in kinds)


def test_loading_a_config_needs_no_megatron_and_no_engine(run_file):
    code = f"""
import sys
from megatron_distill.config import check, load
check(load({str(run_file)!r}))
heavy = {{"megatron", "transformer_engine", "sglang", "nemo_run", "transformers", "datasets"}}
print(sorted(heavy & {{name.split(".")[0] for name in sys.modules}}))
"""
    project = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=project)
    assert done.stdout == "[]\n"


def test_the_shipped_objective_configs_load(run_file, models):
    folder = Path(__file__).parents[3] / "configs" / "objectives"
    for file in sorted(folder.glob("*.yaml")):
        kind = yaml.safe_load(file.read_text())["objective"]["kind"]
        assert file.stem in (kind, "rft") or file.stem.startswith(f"{kind}_"), "a preset is named after its objective"
        run_file.write_text(
            f"base: [base, objectives/{file.stem}]\nstudent: {{model: {models / 'student'}}}\ndata: {{prompts: a}}\n"
        )
        load(run_file)


def test_a_part_inside_a_part_has_a_kind_of_its_own(run_file):
    run = load(run_file, ["rollout.engine.batch_size=3"])
    assert run.rollout.engine == Embedded(batch_size=3), "without a kind it is of the field's default"
    assert load(run_file, ["rollout.engine={kind: embedded, batch_size: 3}"]) == run
    assert tree(run)["rollout"]["engine"] == {"kind": "embedded", "batch_size": 3}
    assert tree(load(run_file))["rollout"]["engine"]["kind"] == "embedded"
    save(run, run.paths.run / "config.yaml")
    assert load(run.paths.run / "config.yaml") == run


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "rollout.engine.kind=embeded",
            'rollout.engine.kind="embeded": no such part in megatron_distill.rollout.engines; allowed: embedded',
        ),
        ("rollout.engine.batchsize=3", "rollout.engine.batchsize=3: unknown key; did you mean 'batch_size'? (command"),
        ("rollout.engine.batch_size=0", "rollout.engine.batch_size=0: must be at least 1 (command line)"),
        ("rollout.engine.batch_size=x", 'rollout.engine.batch_size="x": must be a valid integer (command line)'),
        ("rollout.engine=sglang", 'rollout.engine="sglang": must be a mapping with a `kind` (command line)'),
        ("rollout.engin.kind=embedded", 'rollout.engin={"kind": "embedded"}: unknown key; did you mean \'engine\'?'),
    ],
)
def test_complaints_about_a_part_inside_a_part_have_its_path(run_file, override, complaint):
    (line,) = complaints(run_file, override)
    assert line.startswith(complaint)


def test_what_is_wrong_inside_and_outside_is_told_together(run_file):
    lines = complaints(run_file, "rollout.samples_per_prompt=0", "rollout.engine.batch_size=0")
    assert [line.split("=")[0] for line in lines] == ["rollout.samples_per_prompt", "rollout.engine.batch_size"]


def test_engines_are_told_once_and_checked_by_editors():
    lines = reference().splitlines()
    assert lines.count("rollout.engine.kind = embedded") == 1
    told = schema()
    generate = next(body for body in told["$defs"].values() if _kind_in(body) == "generate")
    engines = [told["$defs"][one["$ref"].rpartition("/")[2]] for one in generate["properties"]["engine"]["oneOf"]]
    by_kind = {_kind_in(one): one for one in engines}
    assert by_kind["embedded"]["properties"]["batch_size"]["type"] == "integer"
    assert "required" not in by_kind["embedded"], "it is what a config without a kind means"
    assert all(one["required"] == ["kind"] for kind, one in by_kind.items() if kind != "embedded")


def _kind_in(body):
    """The kind that a definition of the schema is of, if it is a part's."""
    return body.get("properties", {}).get("kind", {}).get("const")
