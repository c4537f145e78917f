"""Every objective against its float64 oracle, whole, and cut over ranks, micro-batches and chunks.

A new objective is found by its file name and must bring an oracle; see `tests/oracles/dense.py` for what that is.
One alone: pytest tests/distributed/test_objectives.py -k opd
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from megatron_distill.data.packing import pack
from megatron_distill.testing.assertions import TOLERANCE
from megatron_distill.testing.world import Worlds
from tests.certify.data import PLANS, total_rows
from tests.certify.settings import objectives, oracle_of, settings
from tests.certify.table import CUTS, Expected, errors, expected, table_sequences

SUITE = {
    1: ["whole", "whole, fp64", "micro-batches of 24 tokens"],
    4: ["tp=2 dp=2, micro-batches, chunks of 16, padded"],
}
"""By number of ranks; `make certify` takes all cuts."""


@cache
def _expected(kind: str) -> list[Expected]:
    return [expected(setting) for setting in settings(kind)]


@pytest.mark.parametrize("ranks", SUITE)
@pytest.mark.parametrize("kind", objectives())
def test_loss_and_gradient_equal_the_oracle_under_every_cut(worlds: Worlds, kind: str, ranks: int) -> None:
    cuts = [CUTS[name] for name in SUITE[ranks]]
    for by_cut in worlds(ranks).run(errors, cuts, _expected(kind)):
        for name, cut, found in zip(SUITE[ranks], cuts, by_cut, strict=True):
            assert found
            broken = [
                f"{one.setting} {one.fidelity}: loss {one.loss:.1e}, gradient {one.gradient:.1e}"
                for one in found
                if not (one.loss <= TOLERANCE[cut.dtype] and one.gradient <= TOLERANCE[cut.dtype])
            ]
            assert not broken, f"{name}: relative errors\n" + "\n".join(broken)


@pytest.mark.parametrize("kind", PLANS)
def test_data_meet_what_the_cuts_are_for(kind: str) -> None:
    shares = [
        pack(
            table_sequences(kind),
            dp_rank=rank,
            dp_size=4,
            tokens_per_micro_batch=1,
            device=torch.device("cpu"),
            version=0,
        )
        for rank in range(4)
    ]
    rows = [[micro.rows for micro in batch.micro] for batch in shares]
    assert sum(map(sum, rows)) == total_rows(kind)
    if kind == "sampled":
        assert 0 in [one for share in rows for one in share], "a micro-batch without rows"
        ranks = [{int(group) for micro in batch.micro for group in micro.group_S} for batch in shares]
        assert all(sum(group in rank for rank in ranks) > 1 for group in range(3)), "groups that straddle ranks"


@pytest.mark.parametrize("kind", objectives())
def test_every_objective_has_an_oracle(kind: str) -> None:
    oracle = oracle_of(kind)
    assert callable(oracle.oracle)
    assert oracle.FIELDS[0] == {}, "the default comes first"
    temperatures = {setting.objective.temperature for setting in settings(kind)}
    assert len(temperatures) > 1, "an oracle must try more than one temperature"
