"""The gloo worlds themselves: what a test sees when its ranks agree, fail, die or hang."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_distill.testing.world import RENDEZVOUS, RemoteTraceback, Worlds


def _sum_of_ranks() -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def _own_init() -> tuple[str, bool]:
    assert not dist.is_initialized()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ[RENDEZVOUS], rank=rank, world_size=size)
    os.environ["LEFT_BEHIND"] = "1"
    return os.environ["LOCAL_RANK"], dist.is_initialized()


def _rank_one_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only here")
    dist.barrier()


def _rank_one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _rank_one_sleeps() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def _warn() -> None:
    warnings.warn("not to be overheard", UserWarning, stacklevel=1)


def test_results_come_by_rank_and_groups_are_torn_down_between_runs(worlds: Worlds) -> None:
    assert worlds(4).run(_sum_of_ranks) == [(rank, 10.0) for rank in range(4)]
    assert worlds(2).run(_own_init, init=False) == [("0", True), ("1", True)]
    assert worlds(2).run(_sum_of_ranks) == [(0, 3.0), (1, 3.0)]
    assert worlds(2).run(os.getenv, "LEFT_BEHIND") == [None, None]


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """Processes of our own: the failures below cost the pool its processes."""
    with Worlds(tmp_path_factory.mktemp("doomed"), limit=2) as pool:
        yield pool


def test_the_failing_ranks_error_is_raised_with_its_traceback(doomed: Worlds) -> None:
    with pytest.raises(KeyError, match="only here") as raised:
        doomed(2).run(_rank_one_raises)
    assert isinstance(raised.value.__cause__, RemoteTraceback)
    assert "rank 1" in str(raised.value.__cause__)
    assert "_rank_one_raises" in str(raised.value.__cause__)
    assert doomed(2).run(_sum_of_ranks) == [(0, 3.0), (1, 3.0)]


def test_warnings_are_errors_on_ranks_too(doomed: Worlds) -> None:
    with pytest.raises(UserWarning, match="overheard"):
        doomed(2).run(_warn)


def test_a_dead_rank_is_reported_not_waited_for(doomed: Worlds) -> None:
    with pytest.raises(RuntimeError, match="exit code 7"):
        doomed(2).run(_rank_one_dies)


def test_a_hanging_rank_shows_every_stack(doomed: Worlds) -> None:
    with pytest.raises(TimeoutError, match="_rank_one_sleeps") as raised:
        doomed(2).run(_rank_one_sleeps, timeout=2.0)
    assert "--- rank 0" in str(raised.value)
    assert "--- rank 1" in str(raised.value)


def tensors_after_megatron() -> list[torch.Tensor]:
    from megatron_distill.runtime.backend import choose

    choose().prepare()
    return [torch.zeros(0), torch.tensor(3.0, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.int64)[:, 1:]]


def test_tensors_come_back_without_megatron(worlds: Worlds) -> None:
    (found,) = worlds(1).run(tensors_after_megatron)
    expected = [torch.zeros(0), torch.tensor(3.0, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.int64)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
