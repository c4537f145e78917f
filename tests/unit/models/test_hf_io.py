"""Model folders in and out: what we write transformers loads, and a folder that is not right never half-loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_distill.errors import ModelError
from megatron_distill.models.hf.io import SafetensorsFolder, plan, save_folder
from megatron_distill.models.hf.mapping import rules
from megatron_distill.models.hf.stage import load_stage
from megatron_distill.models.spec import ModelSpec
from megatron_distill.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model", "qwen3", hidden=16)


def in_plan(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The stream that an export of `folder` would be."""
    reader = SafetensorsFolder(folder)
    for tensor in plan(ModelSpec.from_folder(folder), torch.float32):
        yield tensor.name, reader.read(tensor.name)


def empty_parameters(spec: ModelSpec, te: bool = False) -> dict[str, Tensor]:
    """What a Megatron model on one rank has, vocabulary padded to 512, full of NaN."""
    found = {}
    for rule in rules(spec, te):
        if rule.exported:
            found[rule.name] = rule.pad(
                rule.merge([torch.empty(shape) for shape in rule.shapes]), 512 if rule.vocabulary else None
            ).fill_(float("nan"))
    return found


@pytest.mark.parametrize("max_shard_bytes", [10**9, 5000])
def test_transformers_loads_what_is_written(folder: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    tiny_tokenizer(folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    out, spec = tmp_path / "out", ModelSpec.from_folder(folder)
    save_folder(out, spec, in_plan(folder), source=folder, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert (len(files) > 2) == (max_shard_bytes == 5000)
    assert all(file.stat().st_size < 5000 + 4096 or len(load_file(file)) == 1 for file in out.glob("model-*"))
    original, written = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, out))
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not list(out.glob("*.py"))
    assert not (tmp_path / "out.partial").exists()


def test_another_type_is_written_and_said(folder: Path, tmp_path: Path) -> None:
    out, spec = tmp_path / "out", ModelSpec.from_folder(folder)
    save_folder(out, spec, in_plan(folder), source=folder, dtype=torch.bfloat16)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(load_file(out / "model.safetensors")[name], SafetensorsFolder(folder).read(name).bfloat16())


def test_an_existing_folder_is_kept_unless_told(folder: Path, tmp_path: Path) -> None:
    out, spec = tmp_path / "out", ModelSpec.from_folder(folder)
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ModelError, match="not empty"):
        save_folder(out, spec, in_plan(folder), source=folder, dtype=torch.float32)
    assert (out / "precious").exists()
    save_folder(out, spec, in_plan(folder), source=folder, dtype=torch.float32, overwrite=True)
    assert not (out / "precious").exists()


def test_a_write_that_fails_leaves_no_folder_and_can_be_repeated(folder: Path, tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield next(in_plan(folder))
        raise OSError("disk full")

    out, spec = tmp_path / "out", ModelSpec.from_folder(folder)
    with pytest.raises(OSError, match="disk full"):
        save_folder(out, spec, broken(), source=folder, dtype=torch.float32)
    assert not out.exists()
    save_folder(out, spec, in_plan(folder), source=folder, dtype=torch.float32)
    assert out.exists()


def test_reads_slices_of_sharded_folders(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama", hidden=16, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    reader, name = SafetensorsFolder(folder), "model.layers.1.mlp.down_proj.weight"
    whole = reader.read(name)
    assert reader.shape(name) == tuple(whole.shape) == (16, 32)
    assert torch.equal(reader.read(name, 1, 8, 16), whole[:, 8:16])
    assert torch.equal(reader.read(name, 0, 3, 5), whole[3:5])
    assert reader.read(name, 0, 16, 16).shape == (0, 32)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin: pickled weights may run code"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        SafetensorsFolder(tmp_path / "nowhere")


@pytest.mark.parametrize("elsewhere", ["gone.safetensors", "../model.safetensors"])
def test_an_index_may_name_only_files_of_its_folder(tmp_path: Path, elsewhere: str) -> None:
    (tmp_path / "model.safetensors").touch()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": elsewhere}}))
    with pytest.raises(ModelError, match="is not in the folder"):
        SafetensorsFolder(inside)


def test_a_torn_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors file"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("te", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_loading_fills_every_parameter(tmp_path: Path, tied: bool, te: bool) -> None:
    folder = tiny_model(tmp_path / "model", "qwen2", hidden=16, tied=tied)
    spec = ModelSpec.from_folder(folder)
    parameters = empty_parameters(spec, te)
    load_stage(parameters, spec, SafetensorsFolder(folder))
    assert not any(tensor.isnan().any() for tensor in parameters.values())
    embedding = parameters["embedding.word_embeddings.weight"]
    assert torch.equal(embedding[: spec.vocab_size], SafetensorsFolder(folder).read("model.embed_tokens.weight"))
    assert embedding[spec.vocab_size :].count_nonzero() == 0


def changed(folder: Path, drop: str = "", **add: Tensor) -> ModelSpec:
    """The folder's weights without one tensor or with others; its config as it was."""
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name != drop}
    save_file({**tensors, **add}, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelSpec.from_folder(folder)


def test_missing_surplus_and_misshapen_tensors_are_named(folder: Path) -> None:
    spec = changed(folder, **{"model.layers.0.extra.weight": torch.ones(2)})
    with pytest.raises(ModelError, match=r"model\.safetensors: 1 tensors have no place .*layers\.0\.extra"):
        load_stage(empty_parameters(spec), spec, SafetensorsFolder(folder))
    changed(folder, drop="model.layers.0.extra.weight", **{"model.norm.weight": torch.ones(7)})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \(7,\), the config says \(16,\)"):
        load_stage(empty_parameters(spec), spec, SafetensorsFolder(folder))
    changed(folder, drop="model.norm.weight")
    with pytest.raises(ModelError, match=r"1 tensors missing, first model\.norm\.weight"):
        load_stage(empty_parameters(spec), spec, SafetensorsFolder(folder))


def test_a_stored_head_beside_tied_embeddings_must_equal_them(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama", hidden=16, tied=True)
    embedding = SafetensorsFolder(folder).read("model.embed_tokens.weight").clone()
    spec = changed(folder, **{"lm_head.weight": embedding})
    load_stage(empty_parameters(spec), spec, SafetensorsFolder(folder))
    changed(folder, **{"lm_head.weight": embedding + 1})
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        load_stage(empty_parameters(spec), spec, SafetensorsFolder(folder))
