"""What objectives on pairs share: the logistic loss of a margin, common prefixes, and what is logged of a pair.

A pair's two responses may lie in different micro-batches and on different data-parallel ranks. They meet here, before
the backward pass, as one number per pair.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_distill.losses.vocab import logprob
from megatron_distill.objectives.base import PerMicro, Scope, group_sums, pair_signs, sequence_sums
from megatron_distill.types import Batch, Metric, Plan, Responses, Term, VocabShard


def logistic_plan(
    term: str,
    batch: Batch,
    scope: Scope,
    before: PerMicro,
    slopes: PerMicro,
    margin: float = 0.0,
    offset: PerMicro = (),
) -> Plan:
    """The plan of the mean over pairs of -log sigmoid(h); collective.

        h = sum over tokens of slope (logp - offset), chosen minus rejected, less `margin`

    The loss is not linear in log-probs, but its gradient is: -sigmoid(-h) slope per token, with h as it stands before
    the update. So `logistic_term` is the tangent at that point: its gradient and its value are exactly the loss's.

    Args:
        before: the student's log-probs before the update, [R] per micro-batch.
        slopes: what a nat of each token adds to its response's score, [R] per micro-batch.
        offset: log-probs of a reference; none: 0.
    """
    signs = pair_signs(batch, scope)
    scores = tuple(
        sequence_sums(micro, slope_R.double() * (logp_R.double() - (offset[index].double() if offset else 0.0)))
        for index, (micro, logp_R, slope_R) in enumerate(zip(batch.micro, before, slopes, strict=True))
    )
    signed = tuple(sign_S * score_S for sign_S, score_S in zip(signs, scores, strict=True))
    h_G = group_sums(batch, scope, signed) - margin
    tangents, shares = [], []
    for micro, slope_R, sign_S in zip(batch.micro, slopes, signs, strict=True):
        h_S = h_G[micro.group_S]
        tangents.append(((-h_S).sigmoid() * -sign_S).to(slope_R)[micro.segment_R] * slope_R)
        # the value of a pair's loss, spread over its tokens
        shares.append((-logsigmoid(h_S) / (2.0 * micro.lengths_S())).to(slope_R)[micro.segment_R])
    return Plan(
        weights={
            term: tuple(torch.ones_like(one) for one in shares),
            "tangent": tuple(tangents),
            "share": tuple(shares),
            "before": before,
        },
        denominators={term: float(batch.counts.groups)},
        metrics=describe_pairs(batch, scope, scores, signs),
    )


def logistic_term(term: str, student: VocabShard, rows: Responses, weights: Mapping[str, Tensor]) -> dict[str, Term]:
    """What `logistic_plan` planned, on some rows."""
    moved_R = logprob(student, rows.target_R) - weights["before"]
    return {term: Term(value_R=weights["share"] + weights["tangent"] * moved_R, weight_R=weights[term])}


def describe_pairs(batch: Batch, scope: Scope, scores: PerMicro, signs: PerMicro) -> tuple[Metric, ...]:
    """Mean score of chosen and rejected responses, and how often the chosen one's is higher; collective."""
    chosen_G = group_sums(batch, scope, tuple(one * (sign > 0) for one, sign in zip(scores, signs, strict=True)))
    rejected_G = group_sums(batch, scope, tuple(one * (sign < 0) for one, sign in zip(scores, signs, strict=True)))
    pairs = float(batch.counts.groups)
    return (
        Metric("objective/chosen", float(chosen_G.sum()), pairs),
        Metric("objective/rejected", float(rejected_G.sum()), pairs),
        Metric("objective/accuracy", float((chosen_G > rejected_G).sum()), pairs),
    )


def after_common_prefix(batch: Batch, scope: Scope) -> PerMicro:
    """False for the tokens with which both responses of a pair begin alike, bool [R] per micro-batch; collective."""
    signs = pair_signs(batch, scope)
    places = [_places(micro.segment_R) for micro in batch.micro]
    lengths = torch.stack([place_R.max() + 1 if len(place_R) else place_R.new_zeros(()) for place_R in places])
    longest = int(scope.gather(lengths.max()[None]).max())
    # every cell is written by the one rank that holds its token, as id + 1
    tokens_2GL = torch.zeros(2, batch.counts.groups, longest, dtype=torch.int64, device=lengths.device)
    for micro, sign_S, place_R in zip(batch.micro, signs, places, strict=True):
        side_R, group_R = (sign_S > 0).long()[micro.segment_R], micro.group_S[micro.segment_R]
        tokens_2GL[side_R, group_R, place_R] = micro.target_R + 1
    rejected_GL, chosen_GL = scope.total(tokens_2GL)
    same_G = (rejected_GL == chosen_GL).long().cumprod(dim=1).sum(dim=1)
    return tuple(
        place_R >= same_G[micro.group_S[micro.segment_R]] for micro, place_R in zip(batch.micro, places, strict=True)
    )


def _places(segment_R: Tensor) -> Tensor:
    """How far into its response each token is: 0, 1, ..."""
    row_R = torch.arange(len(segment_R), device=segment_R.device)
    first_R = torch.searchsorted(segment_R.contiguous(), segment_R.contiguous())
    return row_R - first_R
