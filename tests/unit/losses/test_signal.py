"""Richer teacher signals answer poorer questions; poorer ones say what they lack."""

from __future__ import annotations

import pytest
import torch

from megatron_distill.errors import ConfigError
from megatron_distill.losses.signal import teacher_logprob, teacher_shard
from megatron_distill.types import Full, Token, TopK, VocabPartition


def test_every_signal_gives_the_logprob_of_the_response_token() -> None:
    hidden, head = torch.randn(3, 4), torch.randn(8, 4)
    partition = VocabPartition(start=0, width=8, valid=6, group=None)
    full = Full(hidden_RH=hidden, head_vH=head, partition=partition)
    ids = torch.tensor([0, 5, 2])
    expected = (hidden @ head[:6].T / 1.3).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    torch.testing.assert_close(teacher_logprob(full, ids, 1.3), expected)
    top = TopK(logp_R=expected, ids_RK=ids[:, None], top_logp_RK=expected[:, None])
    for signal in (Token(logp_R=expected), top):
        assert torch.equal(teacher_logprob(signal, ids, 1.3), expected)


def test_a_poor_signal_cannot_give_the_whole_distribution() -> None:
    with pytest.raises(ConfigError, match="token signal, this objective needs full"):
        teacher_shard(Token(logp_R=torch.zeros(3)), 1.0)
