"""Weights on disk for servers: every stage writes its own file, and a failure of one rank is every rank's."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_distill.errors import EngineError, SyncError
from megatron_distill.models.hf.io import SafetensorsFolder
from megatron_distill.models.network import Network
from megatron_distill.rollout.transports.base import Shipment
from megatron_distill.rollout.transports.crew import Crew
from megatron_distill.rollout.transports.disk import Disk
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import Runtime, start
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.testing.world import Worlds

SIZES = ParallelSizes(tp=2, pp=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("files") / "model", "qwen3", tied=True, layers=4, vocab_size=201)


def shipment(folder: Path, runtime: Runtime) -> Shipment:
    network = Network.load(folder, runtime)
    return Shipment(student=network, version=3, servers=None, tp_sizes=(), fresh=True)


def written(folder: Path, target: Path) -> tuple[dict[str, Tensor], list[str]]:
    with start(SIZES, Precision()) as runtime:
        disk = Disk(Crew(runtime.mesh), target, seconds=10)
        disk.prepare(shipment(folder, runtime))
        runtime.mesh.barrier()
        reader = SafetensorsFolder(target / "weights_000003")
        found = {name: reader.read(name) for name in reader.names}
        runtime.mesh.barrier()
        files = sorted(file.name for file in reader.path.iterdir())
        runtime.mesh.barrier()
        disk.tidy()
        return found, files


def test_each_stage_writes_its_file(worlds: Worlds, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights_partial").mkdir()  # a run was cut off here
    (tmp_path / "weights_partial" / "model.safetensors").write_bytes(b"half")
    source = SafetensorsFolder(folder)
    for found, files in worlds(4).run(written, folder, tmp_path, init=False):
        assert found.keys() == source.names
        assert all(torch.equal(tensor, source.read(name)) for name, tensor in found.items())
        assert files == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ]
    assert list(tmp_path.iterdir()) == []


def without_room(folder: Path, target: Path) -> str:
    with start(SIZES, Precision()) as runtime:
        crew = Crew(runtime.mesh)
        ready = shipment(folder, runtime)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if crew.leads and runtime.mesh.pp_rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(SyncError) as caught:
                Disk(crew, target, seconds=10).prepare(ready)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return str(caught.value)


def test_a_stage_without_room_stops_all_ranks_alike(worlds: Worlds, folder: Path, tmp_path: Path) -> None:
    messages = worlds(4).run(without_room, folder, tmp_path, init=False)
    assert set(messages) == {messages[0]}
    assert f"{tmp_path}: cannot write new weights there: File too large; servers keep the old ones" in messages[0]
    assert list(tmp_path.iterdir()) == []


def failing_on(rank: int) -> tuple[str, tuple[str, ...]]:
    with start(SIZES, Precision()) as runtime:
        crew = Crew(runtime.mesh)

        def work() -> int:
            if runtime.mesh.rank == rank:
                raise SyncError("gone", servers=("http://127.0.0.1:1",))
            return runtime.mesh.rank

        with pytest.raises(EngineError) as caught:
            crew.agreed(work)
        assert crew.agreed(lambda: runtime.mesh.rank) == runtime.mesh.rank
        return str(caught.value), caught.value.servers


@pytest.mark.parametrize("rank", [0, 3])
def test_what_one_rank_meets_all_raise(worlds: Worlds, rank: int) -> None:
    assert worlds(4).run(failing_on, rank, init=False) == [("gone", ("http://127.0.0.1:1",))] * 4
