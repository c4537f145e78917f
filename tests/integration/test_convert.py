"""`python -m tools.convert`: there and back without a changed bit or a second copy; mistakes in one line."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_distill.models import checkpoint
from megatron_distill.models.hf.io import SafetensorsFolder
from megatron_distill.models.optimizer import OptimizerSection
from megatron_distill.models.student import Student, StudentSection
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import start
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer
from megatron_distill.testing.world import Worlds
from tools.convert import main

MEMORY_FACTOR = 1.6
"""Most that a conversion may take beyond what it takes for a tiny model, in sizes of the model."""

MEASURE = """
import re, sys
from pathlib import Path
from tools.convert import main

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

if __name__ == "__main__":
    verb, tiny, tiny_out, large, large_out = sys.argv[1:]
    assert main([verb, tiny, tiny_out]) == 0
    before = peak()
    assert main([verb, large, large_out]) == 0
    print("beyond", peak() - before)
"""


def run(*words: object) -> tuple[int, str]:
    """Exit code and standard output of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main([str(word) for word in words])
    return code, said.getvalue()


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = SafetensorsFolder(one), SafetensorsFolder(other)
    assert a.names == b.names
    for name in a.names:
        left, right = a.read(name), b.read(name)
        assert left.dtype == right.dtype, name
        assert torch.equal(left, right), name


@pytest.mark.parametrize(("tp", "pp", "back_tp"), [(2, 1, 1), (1, 2, 2)])
def test_there_and_back_at_another_layout(worlds: Worlds, tmp_path: Path, tp: int, pp: int, back_tp: int) -> None:
    folder = tiny_tokenizer(tiny_model(tmp_path / "model", "qwen2", tied=pp == 2, dtype=torch.bfloat16))
    saved, out = tmp_path / "checkpoint", tmp_path / "out"
    forth = worlds(2).run(run, "to-megatron", folder, saved, "--tp", tp, "--pp", pp, init=False)
    assert [code for code, _ in forth] == [0, 0]
    assert forth[0][1].count("\n") == 1
    assert forth[1][1] == ""
    back = worlds(back_tp).run(run, "to-hf", saved, out, "--tp", back_tp, "--max-shard-gb", 0.0001, init=False)
    assert {code for code, _ in back} == {0}
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_same_weights(folder, out)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_verify_tells_the_same_model_from_another(worlds: Worlds, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    saved, other = tmp_path / "checkpoint", tiny_model(tmp_path / "other", "llama", seed=1)
    alone = worlds(1)
    assert alone.run(run, "verify", folder, init=False)[0][0] == 0
    assert alone.run(run, "to-megatron", folder, saved, init=False)[0][0] == 0
    code, said = alone.run(run, "verify", folder, saved, init=False)[0]
    assert (code, said.startswith("largest logit difference")) == (0, True)
    code, said = alone.run(run, "verify", other, saved, init=False)[0]
    assert code == 1
    assert "> 1e-04" in said


def test_the_type_of_weights_can_be_chosen(worlds: Worlds, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "qwen3")
    saved, out = tmp_path / "checkpoint", tmp_path / "out"
    assert worlds(1).run(run, "to-megatron", folder, saved, init=False)[0][0] == 0
    assert worlds(1).run(run, "to-hf", saved, out, "--dtype", "bfloat16", init=False)[0][0] == 0
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(SafetensorsFolder(out).read(name), SafetensorsFolder(folder).read(name).bfloat16())


def write_checkpoint(folder: Path, step: Path) -> None:
    """The model's part of a checkpoint as training writes one, where two replicas share the optimizer state."""
    with start(ParallelSizes(dp=2), Precision()) as runtime:
        student = Student.build(StudentSection(model=folder), OptimizerSection(), runtime, steps=1)
        partial = step.with_suffix(".partial")
        if runtime.mesh.rank == 0:
            (partial / "model").mkdir(parents=True)
        runtime.mesh.barrier()
        checkpoint.save_weights(partial, student.network)
        if runtime.mesh.rank == 0:
            checkpoint.finish(partial, step, {"step": 1, "spec": asdict(student.spec)})


def test_a_training_checkpoint_finds_its_own_model_folder(worlds: Worlds, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tiny_model(tmp_path / "model", "qwen3"))
    run_folder, out = tmp_path / "run", tmp_path / "out"
    step = run_folder / "checkpoints" / "step_000001"
    worlds(2).run(write_checkpoint, folder, step, init=False)
    (run_folder / "config.yaml").write_text(f"student: {{model: {folder}}}")
    assert worlds(1).run(run, "to-hf", step, out, init=False)[0][0] == 0
    assert_same_weights(folder, out)
    assert (out / "tokenizer.json").exists()


@pytest.mark.slow
def test_neither_direction_holds_a_second_copy(tmp_path: Path) -> None:
    tiny = tiny_model(tmp_path / "tiny", "qwen3", hidden=32)
    large = tiny_model(
        tmp_path / "large", "qwen3", vocab_size=8192, hidden=512, layers=10, heads=8, intermediate_size=1024
    )
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size > 100 * 2**20
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    steps = {
        "to-megatron": (tiny, tmp_path / "tiny.megatron", large, tmp_path / "large.megatron"),
        "to-hf": (tmp_path / "tiny.megatron", tmp_path / "tiny.hf", tmp_path / "large.megatron", tmp_path / "large.hf"),
    }
    root = Path(__file__).parents[2]
    for verb, folders in steps.items():
        words = [str(word) for word in (sys.executable, script, verb, *folders)]
        done = subprocess.run(
            words, env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        beyond = int(done.stdout.split("beyond")[1])
        print(f"{verb}: {beyond / size:.2f} times the model's {size / 2**20:.0f} MiB")
        assert beyond < MEMORY_FACTOR * size
    assert_same_weights(large, tmp_path / "large.hf")


def test_a_damaged_checkpoint_is_told_in_one_line(worlds: Worlds, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint"
    assert worlds(1).run(run, "to-megatron", tiny_model(tmp_path / "model", "llama"), saved, init=False)[0][0] == 0
    torn = next((saved / "model").glob("*.distcp"))
    torn.write_bytes(torn.read_bytes()[:3000])
    code, said = worlds(1).run(complaint, "to-hf", saved, tmp_path / "out", init=False)[0]
    assert code == 2
    assert "incomplete or damaged" in said
    (saved / "COMPLETE").unlink()
    code, said = worlds(1).run(complaint, "to-hf", saved, tmp_path / "out", init=False)[0]
    assert code == 2
    assert "no complete checkpoint" in said


def complaint(*words: object) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main([str(word) for word in words])
    return code, said.getvalue()


def test_mistakes_are_told_in_one_line_before_anything_is_written(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama", hidden=16)
    taken, out = tmp_path / "taken", tmp_path / "out"
    taken.mkdir()
    (taken / "precious").touch()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((folder / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").touch()
    for words, named in [
        (("to-megatron", tmp_path / "nowhere", out), "nowhere: no such folder"),
        (("to-megatron", folder, taken), "--overwrite"),
        (("to-megatron", pickled, out), "pickled weights"),
        (("to-megatron", folder, out, "--tp", 0), "tp=0"),
        (("to-megatron", folder, out, "--tp", 2), "2 ranks, but 1 were started"),
        (("to-hf", tmp_path / "nowhere", out), "--model"),
        (("to-hf", folder, out, "--model", folder), "no complete checkpoint"),
        (("to-hf", folder), "OUT"),
        (("verify", tmp_path), "config.json"),
        (("transmogrify", folder), "transmogrify"),
    ]:
        code, said = complaint(*words)
        assert code == 2, words
        assert said.count("\n") == 1, said
        assert named in said, said
        assert not out.exists()
        assert not out.with_name("out.partial").exists()
    assert (taken / "precious").exists()


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.convert", "verify", tmp_path / "nowhere"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_missing_tensor_is_named_with_its_folder(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama", hidden=16)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, said = complaint("to-megatron", folder, tmp_path / "out")
    assert code == 2
    assert f"{folder}: 1 tensors missing, first model.norm.weight" in said
    assert not (tmp_path / "out").exists()
