"""A remote teacher's scores under every cut: one rank of a replica has them, the ranks that see logits all get them."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.errors import EngineError, EngineStopped
from megatron_distill.rollout.sample import on_first_rank
from megatron_distill.rollout.sglang import Address, Scores
from megatron_distill.runtime.mesh import ParallelSizes
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import start
from megatron_distill.teachers._scores import leads, shared, where
from megatron_distill.teachers._served import Introduced, Served, alive
from megatron_distill.teachers._servers import Elsewhere
from megatron_distill.teachers.remote import RemotePart, RemoteTeacher
from megatron_distill.testing.tiny import tiny_model
from megatron_distill.testing.world import Worlds
from megatron_distill.types import Origin, Prompt, Rollout, Scored, Stop, TopK

CPU = torch.device("cpu")
LAYOUTS = {
    "tp=2": ParallelSizes(tp=2),
    "pp=2": ParallelSizes(pp=2),
    "cp=2": ParallelSizes(cp=2),
    "dp=2": ParallelSizes(dp=2),
    "tp=2 cp=2": ParallelSizes(tp=2, cp=2),
}
TOP_K = 3


def scored_of(count: int) -> list[Scored]:
    found = []
    for number in range(count):
        length = 2 + 3 * number % 7
        rollout = Rollout(
            prompt=Prompt(id=str(number), messages=(), tokens=(1,) * (number + 1)),
            group=str(number),
            sample=0,
            tokens=tuple(range(length)),
            logprobs=None,
            origin=(Origin.STUDENT,) * length,
            stop=Stop.LENGTH,
            version=0,
        )
        found.append(Scored(rollout=rollout, reward=None))
    return found


def said_of(one: Scored) -> Scores:
    """Numbers that name sequence and place, with digits that would not survive a detour over another type."""
    length, number = len(one.rollout.tokens), int(one.rollout.prompt.id)
    logp_R = -(number + np.arange(length, dtype=np.float32) / 7) / 3
    ids_RK = np.arange(length, dtype=np.int32)[:, None] * 10 + np.arange(TOP_K, dtype=np.int32)
    return Scores(
        logprobs=logp_R, top_ids=ids_RK, top_logprobs=(logp_R[:, None] - ids_RK.astype(np.float32)) / np.float32(1.1)
    )


def receive(sizes: ParallelSizes, count: int) -> tuple[tuple[int, int], bool, list[dict[str, list]]]:
    """Where this rank is, whether it asked, and for each micro-batch its sequences and the signal's bits."""
    with start(sizes, Precision(dtype="fp32")) as runtime:
        mesh = runtime.mesh
        batch = pack(
            scored_of(count),
            dp_rank=mesh.dp_rank,
            dp_size=sizes.dp,
            tokens_per_micro_batch=16,
            sequence_multiple=sizes.sequence_multiple,
            total_multiple=sizes.total_multiple,
            device=CPU,
            version=0,
        )
        found = None
        if leads(mesh):
            found = {where(one): said_of(one) for micro in batch.micro for one in micro.sequences}
        told = []
        for micro, signal in zip(batch.micro, shared(batch, found, TOP_K, mesh, CPU), strict=False):
            assert isinstance(signal, TopK)
            told.append(
                {
                    "who": [where(one) for one in micro.sequences],
                    "logp": signal.logp_R.tolist(),
                    "ids": signal.ids_RK.tolist(),
                    "top": signal.top_logp_RK.tolist(),
                }
            )
        return (mesh.pp_rank, mesh.dp_rank), leads(mesh), told


@pytest.mark.parametrize(("layout", "count"), [*((layout, 5) for layout in LAYOUTS), ("dp=2", 1)])
def test_ranks_that_see_logits_have_the_same_bits(worlds: Worlds, layout: str, count: int) -> None:
    """With one sequence, a data-parallel rank has none."""
    sizes = LAYOUTS[layout]
    expected = {where(one): said_of(one) for one in scored_of(count)}
    asked: dict[int, int] = {}
    judged: dict[int, set] = {}
    for (pp_rank, dp_rank), asks, told in worlds(sizes.world).run(receive, sizes, count, init=False):
        asked[dp_rank] = asked.get(dp_rank, 0) + asks
        if pp_rank < sizes.pp - 1:
            assert told == []
            continue
        for micro in told:
            whole = [expected[one] for one in micro["who"]]
            assert micro["logp"] == [value for one in whole for value in one.logprobs.tolist()]
            assert micro["ids"] == [row for one in whole for row in one.top_ids.tolist()]
            assert micro["top"] == [row for one in whole for row in one.top_logprobs.tolist()]
            judged.setdefault(dp_rank, set()).update(micro["who"])
    assert set(asked.values()) == {1}
    assert sorted(one for share in judged.values() for one in share) == sorted(expected)


def ask_nobody(model: Path, most_restarts: int) -> tuple[bool, str]:
    """A teacher whose only server is gone after it was introduced; one of the two ranks has nothing to ask."""
    sizes = ParallelSizes(dp=2)
    with start(sizes, Precision(dtype="fp32")) as runtime, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        url = runtime.mesh.gather_objects(f"http://127.0.0.1:{taken.getsockname()[1]}")[0]
        part = RemotePart(model=model, urls=(url,), most_restarts=most_restarts)
        served = Served(model=model, served_as="", vocabulary=99, in_flight=2, request_seconds=5.0, silent_seconds=5.0)
        addresses = (Address(url),)
        teacher = RemoteTeacher(
            part=part,
            mesh=runtime.mesh,
            device=CPU,
            tokenizer=None,
            served=served,
            servers=Elsewhere(urls=[url], seconds=0.5, reacting=lambda: alive(served, addresses)),
            addresses=addresses,
            introduced=Introduced(longest=99, canary=np.zeros(1), version="default"),
        )
        batch = pack(
            teacher.fit(scored_of(1)),
            dp_rank=runtime.mesh.dp_rank,
            dp_size=2,
            tokens_per_micro_batch=99,
            device=CPU,
            version=0,
        )
        with pytest.raises(EngineStopped) as caught:
            teacher.signal(batch)
        return bool(batch.micro[0].rows), str(caught.value)


@pytest.mark.parametrize(
    ("most_restarts", "complaint"),
    [
        (0, "loss number 1 of the run, most_restarts=0 allows no more; see the servers' logs"),
        (1, "none of the teacher's servers came back within 0.5 s"),
    ],
)
def test_all_ranks_stop_together_when_servers_stay_away(
    worlds: Worlds, tmp_path: Path, most_restarts: int, complaint: str
) -> None:
    model = tiny_model(tmp_path / "teacher", "llama")
    told = worlds(2).run(ask_nobody, model, most_restarts, init=False)
    assert [asks for asks, _ in told] == [True, False]
    for _, message in told:
        assert message.startswith(f"teacher {model}: ")
        assert complaint in message


def fail_on_the_first() -> str:
    from megatron_distill.runtime.mesh import all_ranks

    ranks = all_ranks()

    def work() -> int:
        raise EngineError(f"rank {ranks.rank} knows")

    with pytest.raises(EngineError) as caught:
        on_first_rank(ranks, work)
    return f"{caught.value}, {on_first_rank(ranks, lambda: ranks.rank)}"


def test_what_the_first_rank_meets_every_rank_raises(worlds: Worlds) -> None:
    assert worlds(2).run(fail_on_the_first) == ["rank 0 knows, 0"] * 2
