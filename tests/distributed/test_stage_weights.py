"""What each pipeline stage sends to a rollout engine is, put together, the whole model, and is never held whole."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_distill.models.network import Network
from megatron_distill.rollout.transports.buckets import buckets
from megatron_distill.rollout.transports.crew import Crew
from megatron_distill.rollout.transports.pieces import SharedPieces, fit
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import start
from megatron_distill.testing.tiny import Family, tiny_model
from megatron_distill.testing.world import Worlds

SIZES = [
    ParallelSizes(tp=2),
    ParallelSizes(tp=2, sequence_parallel=True),
    ParallelSizes(pp=2),
    ParallelSizes(tp=2, pp=2),
    ParallelSizes(pp=2, dp=2),
]


def name_of(sizes: ParallelSizes) -> str:
    return f"tp={sizes.tp} pp={sizes.pp} dp={sizes.dp}{' sp' if sizes.sequence_parallel else ''}"


def whole_and_stage(folder: Path, sizes: ParallelSizes) -> tuple[tuple[int, int], dict[str, Tensor], dict[str, Tensor]]:
    with start(sizes, Precision()) as runtime:
        network = Network.load(folder, runtime)
        own = {name: tensor.clone() for name, tensor in network.stage_weights()}
        return (
            (runtime.mesh.pp_rank, runtime.mesh.tp_rank),
            {name: tensor.clone() for name, tensor in network.weights()},
            own,
        )


@pytest.mark.parametrize("sizes", SIZES, ids=name_of)
@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("qwen2", True)])
def test_the_stages_together_are_the_model(
    worlds: Worlds, tmp_path: Path, family: Family, tied: bool, sizes: ParallelSizes
) -> None:
    folder = tiny_model(tmp_path / "model", family, tied=tied, layers=4, vocab_size=201)
    by_rank = worlds(sizes.world).run(whole_and_stage, folder, sizes, init=False)
    whole = by_rank[0][1]
    for stage in range(sizes.pp):
        copies = [(tp_rank, own) for (at, tp_rank), _, own in by_rank if at == stage]
        first = next(own for tp_rank, own in copies if tp_rank == 0)
        for tp_rank, other in copies:
            assert list(other) == (list(first) if tp_rank == 0 else [])
            assert all(torch.equal(other[name], first[name]) for name in other)
    stages = [next(own for at, _, own in by_rank if at == (stage, 0)) for stage in range(sizes.pp)]
    assert [name for own in stages for name in own] == list(whole)  # none twice, none missing, in the same order
    assert all(torch.equal(own[name], whole[name]) for own in stages for name in own)
    assert ("lm_head.weight" in whole) is not tied


def in_pieces(folder: Path, sizes: ParallelSizes) -> tuple[bool, list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Whether memory can be shared; what it holds on this rank when filled anew; what the leader gathers."""
    with start(sizes, Precision()) as runtime:
        network = Network.load(folder, runtime)
        crew = Crew(runtime.mesh)
        pieces = SharedPieces(crew, bucket_bytes := 128 * 1024)
        shares = fit(crew, network, bucket_bytes)
        if not crew.gathers:  # another replica does
            return shares, [], []
        assert sum(1 for _ in pieces.fill(network)) > 3  # each piece is used again
        with torch.no_grad():
            for parameter in network.parameters().values():
                parameter.mul_(2)
        shared = [(name, tensor.clone()) for bucket in pieces.fill(network) for name, tensor in bucket]
        pieces.forget()
        return shares, shared, [(name, tensor.clone()) for name, tensor in network.stage_weights()]


@pytest.mark.parametrize("sizes", SIZES, ids=name_of)
def test_ranks_fill_shared_memory_with_the_same_tensors(worlds: Worlds, tmp_path: Path, sizes: ParallelSizes) -> None:
    # several key-value groups on each rank, so that interleaved rows are cut
    folder = tiny_model(tmp_path / "model", "qwen2", tied=True, layers=4, vocab_size=201, heads=8, kv_heads=4)
    by_rank = worlds(sizes.world).run(in_pieces, folder, sizes, init=False)
    leader: list[tuple[str, Tensor]] = []
    for shares, shared, gathered in by_rank:
        leader = gathered or leader
        assert shares
        if shared:
            assert [name for name, _ in shared] == [name for name, _ in leader]
            assert all(torch.equal(one, two) for (_, one), (_, two) in zip(shared, leader, strict=True))
    assert sum(bool(shared) for _, shared, _ in by_rank) == sizes.tp * sizes.pp


def most_held(folder: Path, sizes: ParallelSizes, bucket_bytes: int) -> tuple[int, int, int]:
    """Bytes of gathered tensors alive at most while buckets are taken, of the largest tensor, and of all."""
    live: dict[int, int] = {}
    most = total = largest = 0

    def watched(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal most, total, largest
        for name, tensor in stream:
            # a tensor's own object lives as long as anybody holds it, and its storage no longer
            key = total
            live[key] = tensor.nbytes
            weakref.finalize(tensor, live.pop, key)
            total, largest = total + tensor.nbytes, max(largest, tensor.nbytes)
            most = max(most, sum(live.values()))
            handed = (name, tensor)
            del name, tensor
            yield handed
            del handed

    with start(sizes, Precision()) as runtime:
        network = Network.load(folder, runtime)
        for bucket in buckets(watched(network.stage_weights()), bucket_bytes, lambda named: named[1].nbytes):
            held = sum(tensor.nbytes for _, tensor in bucket)
            assert held <= bucket_bytes or len(bucket) == 1
            del bucket
    return most, largest, total


@pytest.mark.parametrize("sizes", [ParallelSizes(tp=2), ParallelSizes(tp=2, pp=2)], ids=name_of)
def test_no_more_is_held_than_a_bucket_and_one_parameter(worlds: Worlds, tmp_path: Path, sizes: ParallelSizes) -> None:
    folder = tiny_model(tmp_path / "model", "qwen3", layers=8, vocab_size=128)
    bucket_bytes = 64 * 1024
    found = worlds(sizes.world).run(most_held, folder, sizes, bucket_bytes, init=False)
    assert [total > 0 for _, _, total in found] == [rank % sizes.tp == 0 for rank in range(sizes.world)]
    for most, largest, total in filter(any, found):
        print(f"{name_of(sizes)}: {most} bytes held, largest tensor {largest}, all {total}")
        # gate and up, or a layer's q, k and v, are one parameter
        assert most <= bucket_bytes + 2 * largest < total / 2
