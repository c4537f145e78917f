"""Richer teacher signals answer poorer questions; poorer ones say what they lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_distill.errors import ConfigError
from megatron_distill.losses.signal import teacher_entropy, teacher_logprob, teacher_shard, teacher_top_k
from megatron_distill.types import Full, Token, TopK, VocabPartition

IDS = torch.tensor([0, 5, 2])


def _full() -> tuple[Full, Tensor]:
    """A signal, and the log-probs of its real ids at temperature 1.3."""
    hidden, head = torch.randn(3, 4), torch.randn(8, 4)
    partition = VocabPartition(start=0, width=8, valid=6, group=None)
    logp = (hidden @ head[:6].T / 1.3).log_softmax(-1)
    return Full(hidden_RH=hidden, head_vH=head, partition=partition), logp


def test_every_signal_gives_the_logprob_of_the_response_token() -> None:
    full, logp = _full()
    expected = logp.gather(-1, IDS[:, None]).squeeze(-1)
    torch.testing.assert_close(teacher_logprob(full, IDS, 1.3), expected)
    top = TopK(logp_R=expected, ids_RK=IDS[:, None], top_logp_RK=expected[:, None])
    for signal in (Token(logp_R=expected), top):
        assert torch.equal(teacher_logprob(signal, IDS, 1.3), expected)


def test_a_full_signal_gives_its_entropy_and_its_likeliest_ids() -> None:
    full, logp = _full()
    torch.testing.assert_close(teacher_entropy(full, 1.3), -(logp.exp() * logp).sum(-1))
    found = teacher_top_k(full, 4, 1.3)
    expected = logp.topk(4)
    assert torch.equal(found.ids_RK, expected.indices)
    torch.testing.assert_close(found.top_logp_RK, expected.values)
    assert found.logp_R.isnan().all()


def test_a_longer_list_is_cut_to_its_likeliest_wherever_they_stand() -> None:
    """Engines may put the response token last, out of order."""
    sent = TopK(
        logp_R=torch.tensor([-3.0]),
        ids_RK=torch.tensor([[7, 2, 9, 4]]),
        top_logp_RK=torch.tensor([[-2.0, -3.0, -5.0, -1.0]]),
    )
    cut = teacher_top_k(sent, 2, 1.0)
    assert cut.ids_RK.tolist() == [[4, 7]]
    assert cut.top_logp_RK.tolist() == [[-1.0, -2.0]]
    assert cut.logp_R.tolist() == [-3.0]
    assert teacher_top_k(sent, 4, 1.0) is sent


TOKEN = Token(logp_R=torch.zeros(3))
TOP = TopK(logp_R=torch.zeros(3), ids_RK=IDS[:, None], top_logp_RK=torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: teacher_shard(TOKEN, 1.0), "token signal, this objective needs full"),
        (lambda: teacher_shard(TOP, 1.0), "top_k signal, this objective needs full"),
        (lambda: teacher_entropy(TOP, 1.0), "top_k signal, this objective needs its entropy"),
        (lambda: teacher_top_k(TOKEN, 2, 1.0), "token signal, this objective needs the 2 likeliest ids"),
        (lambda: teacher_top_k(TOP, 2, 1.0), "its 1 likeliest ids, objective.top_k=2 asks for more"),
    ],
)
def test_a_poor_signal_says_what_it_lacks(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask()


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_several_questions_about_some_rows_cost_one_matrix_product() -> None:
    full, _ = _full()
    with _Products() as products:
        rows = full.rows(slice(0, 2))
        teacher_logprob(rows, IDS[:2], 1.3)
        teacher_entropy(rows, 1.3)
        teacher_shard(rows, 0.7)
        teacher_top_k(rows, 2, 1.0)
    assert products.count == 1


def test_logits_of_a_whole_micro_batch_are_not_kept() -> None:
    full, _ = _full()
    teacher_shard(full, 1.0)
    assert full.made is None
