"""A ModelSpec as a Megatron GPTModel: this rank's stage of it, empty. The one place that knows Megatron's config."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch.nn.functional as F

from megatron_distill.models.spec import ModelSpec
from megatron_distill.runtime.mesh import Mesh
from megatron_distill.runtime.precision import Precision
from megatron_distill.runtime.start import Runtime
from megatron_distill.types import VocabPartition

type Recompute = Literal["none", "full"]

VOCAB_MULTIPLE = 128
"""Vocabularies are padded to a multiple of this and of tp: one size, so one checkpoint, for tp 1, 2, 4 and 8."""


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding as Megatron holds it over all tensor-parallel ranks."""
    multiple = math.lcm(VOCAB_MULTIPLE, tp)
    return -(-vocab_size // multiple) * multiple


def vocab_partition(spec: ModelSpec, mesh: Mesh, valid: int | None = None) -> VocabPartition:
    """This rank's columns; ids from `valid` on get no probability (default: from the model's own size on)."""
    width = padded_vocab_size(spec.vocab_size, mesh.sizes.tp) // mesh.sizes.tp
    return VocabPartition(
        start=mesh.tp_rank * width,
        width=width,
        valid=spec.vocab_size if valid is None else valid,
        group=mesh.tp_group,
    )


def build_model(spec: ModelSpec, runtime: Runtime, recompute: Recompute = "none") -> Any:
    """This rank's pipeline stage; parameters are allocated and not yet meaningful."""
    from megatron.core.models.gpt import GPTModel

    logging.getLogger("megatron").setLevel(logging.ERROR)  # it warns at every build that GPTModel will be replaced
    mesh, backend = runtime.mesh, runtime.backend
    with backend.megatron():
        model = GPTModel(
            config=_config(spec, runtime, recompute),
            transformer_layer_spec=backend.block(spec.qk_norm, spec.num_layers // mesh.sizes.pp),
            vocab_size=padded_vocab_size(spec.vocab_size, mesh.sizes.tp),
            max_sequence_length=spec.max_positions,
            pre_process=mesh.is_first_stage,
            post_process=mesh.is_last_stage,
            share_embeddings_and_output_weights=spec.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
            pg_collection=mesh.groups,
        ).to(backend.device)
        backend.place_rotary(model, spec.rotary_frequencies())
    return model


def _config(spec: ModelSpec, runtime: Runtime, recompute: Recompute) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes, precision = runtime.mesh.sizes, runtime.precision
    dtype = precision.torch_dtype
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm,
        add_qkv_bias=spec.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=spec.initializer_range,
        perform_initialization=False,
        use_cpu_initialization=runtime.backend.device.type == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.dtype == "bf16",
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        context_parallel_size=sizes.cp,
        sequence_parallel=sizes.sequence_parallel,
        # packed micro-batches differ in length; Megatron ties that to a setting of mixture-of-experts models
        variable_seq_lengths=sizes.pp > 1,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        recompute_granularity="full" if recompute == "full" else None,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        **_fp8(precision),
    )


def _fp8(precision: Precision) -> dict[str, Any]:
    fp8 = precision.fp8
    if fp8 is None:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history,
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
    }
