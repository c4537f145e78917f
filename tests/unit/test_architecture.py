"""The rooms of docs/architecture.md: who may import whom, and who may touch the machine. Source is read, not run."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_distill"

FLOORS = [
    {"types", "errors", "plugins", "files"},
    {"runtime"},
    {"losses"},
    {"data", "rewards", "models"},
    {"rollout"},
    {"teachers", "objectives", "eval"},
    {"config"},
    {"train", "estimate", "report"},
    {"cli"},
]
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

ONLY_IN = {
    "megatron": {"runtime", "models"},
    "transformer_engine": {"runtime"},
    "sglang": set(),
    "aiohttp": {"rollout"},
    "nemo_run": set(),
    "launch": set(),
    "tools": set(),
    "pydantic": {"config"},
    "yaml": {"config"},
    "math_verify": {"rewards"},
    "tensorboard": {"train"},
    "triton": {"losses"},
}
"""A package from outside, and the parts that may import it."""

TOUCHED_ONLY_IN = {"torch.cuda": {"runtime"}, "os.environ": {"runtime", "cli"}, "os.getenv": {"runtime", "cli"}}
"""A name of the machine, and the parts that may use it."""

MODULES: dict[str, list[Path]] = {}
for module in sorted(PACKAGE.rglob("*.py")):
    MODULES.setdefault(module.relative_to(PACKAGE).with_suffix("").parts[0], []).append(module)
PARTS = sorted(MODULES.keys() - {"__init__", "testing"})


def imported(path: Path) -> set[str]:
    """Absolute names of all modules imported anywhere in a file, in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by absolute name"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("part", PARTS)
def test_imports_go_down(part):
    assert part in FLOOR, f"{part}: which floor is it on?"
    for path in MODULES[part]:
        for name in imported(path):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package == PACKAGE.name and other in FLOOR and other != part:
                below = FLOOR[other] < FLOOR[part] or FLOOR[part] == FLOOR[other] == 0
                assert below, f"{path}: {part} (floor {FLOOR[part]}) imports {name} (floor {FLOOR[other]})"
            assert part in ONLY_IN.get(package, {part}), f"{path} imports {name}: only {ONLY_IN[package]} may"


@pytest.mark.parametrize("part", PARTS)
def test_the_machine_is_touched_in_one_place(part):
    banned = {name for name, parts in TOUCHED_ONLY_IN.items() if part not in parts}
    for path in MODULES[part]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)} | imported(path)
        touched = {ban for ban in banned for name in names if f"{name}.".startswith(f"{ban}.")}
        assert not touched, f"{path} uses {touched}: only {[TOUCHED_ONLY_IN[ban] for ban in touched]} may"


def test_a_paper_knows_no_other_paper():
    """Modules that begin with an underscore are what several papers share."""
    stems = {path.stem for path in MODULES.get("objectives", [])}
    papers = {stem for stem in stems if stem != "base" and not stem.startswith("_")}
    for path in MODULES.get("objectives", []):
        others = {f"megatron_distill.objectives.{paper}" for paper in papers - {path.stem}}
        assert not {name for name in imported(path) if {name, name.rpartition(".")[0]} & others}
