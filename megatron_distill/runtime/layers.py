"""The three transformer parts that Megatron's local layers lack on CPU, given to it through its layer spec.

`RMSNorm` (Megatron's own refuses sequence parallelism), `PackedAttention` (its own knows neither packed sequences nor
context parallelism) and `PackedRotary` (its own reads positions off the row number, which packing breaks). On GPUs
TransformerEngine provides all three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_distill.runtime.mesh import zigzag_order, zigzag_rows


@dataclass
class PackedLayout(PackedSeqParams):
    """How a packed micro-batch unfolds into padded sequences [S, L], and which of it this rank holds.

    Handed down through Megatron as its packed-sequence parameters. With context parallelism of size c this rank's
    queries are [S, L / c] while keys and values are gathered whole.
    """

    keys_SL: Tensor | None = None
    """Row of T for each padded place; T itself (one past the end) for padding."""
    queries_SL: Tensor | None = None
    """Row of this rank's rows for each padded place of its queries."""
    places: Tensor | None = None
    """Where each of this rank's rows lies in the flattened padded queries."""
    natural_order: Tensor | None = None
    """Row of the rank-by-rank concatenation for each row of T; None without context parallelism."""
    visible: Tensor | None = None
    """[S, 1, L / c, L]: a query sees the keys at its own position and before; None: torch's own causal mask."""


def packed_layout(cu_seqlens: Tensor, cp: int, cp_rank: int) -> PackedLayout:
    """The layout of sequences that start at `cu_seqlens` (int32 [S+1]), for one context-parallel rank."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    keys, _ = _unfold(cu_seqlens[:-1].long(), lengths, total=int(cu_seqlens[-1]))
    local_starts, local_lengths = cu_seqlens[:-1].long() // cp, lengths // cp
    local_total = int(cu_seqlens[-1]) // cp
    queries, places = _unfold(local_starts, local_lengths, total=local_total)
    longest = int(lengths.max())
    return PackedLayout(
        qkv_format="sbhd",
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        keys_SL=keys,
        queries_SL=queries,
        places=places,
        natural_order=zigzag_order(cu_seqlens, cp) if cp > 1 else None,
        visible=_visible(cu_seqlens, queries, longest, cp, cp_rank) if cp > 1 else None,
    )


def _visible(cu_seqlens: Tensor, queries_SL: Tensor, longest: int, cp: int, cp_rank: int) -> Tensor:
    starts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    positions = zigzag_rows(cu_seqlens, cp, cp_rank) - torch.repeat_interleave(starts, lengths // cp)
    # a place of padding counts as position 0: it sees one key, since attention over nothing is not a number
    positions_SL = F.pad(positions, (0, 1))[queries_SL]
    return (positions_SL[:, :, None] >= torch.arange(longest))[:, None]


def _unfold(starts: Tensor, lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Indices that pad ragged rows to [S, L] (padding reads row `total`), and those that undo it."""
    offsets = torch.arange(int(lengths.max()))
    real = offsets < lengths[:, None]
    return torch.where(real, starts[:, None] + offsets, total), real.flatten().nonzero().squeeze(1)


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence; heads are already this tensor-parallel rank's."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **_: object) -> None:
        super().__init__(config=config)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: PackedLayout,
        **_: object,
    ) -> Tensor:
        """query [T / cp, 1, heads, d], key and value [T / cp, 1, groups, d] -> [T / cp, 1, heads x d]."""
        layout = packed_seq_params
        queries = _pad(query, layout.queries_SL)
        keys = _pad(self._whole(key, layout), layout.keys_SL)
        values = _pad(self._whole(value, layout), layout.keys_SL)
        grouped = queries.shape[1] != keys.shape[1]
        read = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=layout.visible, is_causal=layout.visible is None, enable_gqa=grouped
        )
        return read.transpose(1, 2).flatten(0, 1)[layout.places].reshape(query.shape[0], 1, -1)

    def _whole(self, rows: Tensor, layout: PackedLayout) -> Tensor:
        if layout.natural_order is None:
            return rows
        return gather_from_sequence_parallel_region(rows, group=self.cp_group)[layout.natural_order]


def _pad(rows: Tensor, index_SL: Tensor | None) -> Tensor:
    """[T, 1, heads, d] -> [S, heads, L, d], zeros where a sequence has ended."""
    assert index_SL is not None
    padded = F.pad(rows.squeeze(1), (0, 0, 0, 0, 0, 1))
    return padded[index_SL].transpose(1, 2)


class PackedRotary(torch.nn.Module):
    """Rotary angles by token position. Stands where Megatron's `rotary_pos_emb` stood; set `position_T` first."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        super().__init__()
        self.inverse_frequencies = inverse_frequencies
        self.position_T: Tensor | None = None

    def forward(self, length: int, **_: object) -> Tensor:
        """[T / cp, 1, 1, d]: this rank's angles, in fp32."""
        assert self.position_T is not None
        half = torch.outer(self.position_T.float(), self.inverse_frequencies)
        return torch.cat((half, half), dim=-1)[:, None, None, :]

    def get_rotary_seq_len(self, *_: object, **__: object) -> int:
        """Megatron asks; positions are already here."""
        return 0


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019); Megatron sums its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension; statistics in fp32."""
        wide = hidden.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(hidden.dtype)


def local_block(qk_norm: bool, layers: int) -> TransformerBlockSubmodules:
    """Megatron's local transformer layer with the three parts above in place of its own."""
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    parts = layer.submodules
    attention = parts.self_attention
    changed: dict[str, Any] = {"core_attention": PackedAttention}
    if qk_norm:
        changed |= {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm}
    attention = replace(attention, submodules=replace(attention.submodules, **changed))
    layer = replace(
        layer,
        submodules=replace(parts, self_attention=attention, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
