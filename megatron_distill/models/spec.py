"""The numbers of an architecture, read from a Hugging Face `config.json` and from nothing else.

What is not understood is refused, never ignored: a model that would load and be quietly wrong is worse than one
that does not load. No weights and no Python of a model folder are touched here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_distill.errors import ModelError

type Family = Literal["qwen2", "qwen3", "llama"]

_ARCHITECTURES: Mapping[str, Family] = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}

_FEATURES_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
}
"""Keys of config.json that would change the arithmetic, and the values under which ours is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3's rescaling of rotary frequencies to longer contexts (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A dense decoder of the Qwen2, Qwen3 or Llama family."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding as the model folder has them; often more than the tokenizer's ids."""
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    initializer_range: float
    torch_dtype: str
    """Floating type that the folder's weights are said to have: `float32`, `bfloat16` or `float16`."""

    @staticmethod
    def from_folder(path: str | Path) -> ModelSpec:
        """Read `path/config.json`.

        Raises:
            ModelError: no such folder, no config.json in it, not JSON, an unknown architecture or feature.
        """
        return ModelSpec.from_config(read_config(path), Path(path) / "config.json")

    @staticmethod
    def from_config(config: Mapping[str, Any], where: str | Path) -> ModelSpec:
        """The spec that a parsed config.json describes; `where` names it in errors.

        Raises:
            ModelError: unknown architecture, unsupported feature, a missing or impossible number.
        """
        family = _family(config, where)
        _refuse_features(config, where)
        hidden, heads = _count(config, "hidden_size", where), _count(config, "num_attention_heads", where)
        kv_heads = heads if config.get("num_key_value_heads") is None else _count(config, "num_key_value_heads", where)
        theta, scaling = _rope(config, where)
        spec = ModelSpec(
            family=family,
            num_layers=_count(config, "num_hidden_layers", where),
            hidden_size=hidden,
            ffn_hidden_size=_count(config, "intermediate_size", where),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hidden // heads if config.get("head_dim") is None else _count(config, "head_dim", where),
            vocab_size=_count(config, "vocab_size", where),
            max_positions=_count(config, "max_position_embeddings", where),
            norm_eps=_positive(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            initializer_range=_positive(config.get("initializer_range", 0.02), "initializer_range", where),
            torch_dtype=_dtype(config, where),
        )
        _check_heads(spec, config, where)
        return spec

    def rotary_frequencies(self) -> Tensor:
        """Inverse rotary frequencies, float32 [head_dim / 2], bit for bit those of transformers.

        Megatron-Core takes only the factor of Llama-3 scaling and fixes the other three numbers, so whoever builds
        a model sets these instead.
        """
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64).to(torch.float32) / self.head_dim
        frequency = 1.0 / (self.rope_theta**exponent)
        if self.rope_scaling is None:
            return frequency
        scaling = self.rope_scaling
        wavelength = 2 * math.pi / frequency
        longest = scaling.original_max_positions / scaling.low_freq_factor
        shortest = scaling.original_max_positions / scaling.high_freq_factor
        scaled = torch.where(wavelength > longest, frequency / scaling.factor, frequency)
        smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        between = (1 - smooth) * scaled / scaling.factor + smooth * scaled
        return torch.where((wavelength >= shortest) & (wavelength <= longest), between, scaled)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a model can read, whatever its family: all that is asked of one that another program runs."""

    vocab_size: int
    max_positions: int

    @staticmethod
    def from_folder(path: str | Path) -> ModelLimits:
        """Read `path/config.json`; a model of several modalities has the numbers under `text_config`.

        Raises:
            ModelError: no such folder, no config.json in it, not JSON, or a number is missing.
        """
        config, where = read_config(path), Path(path) / "config.json"
        text = {**config, **(config.get("text_config") or {})}
        return ModelLimits(
            vocab_size=_count(text, "vocab_size", where), max_positions=_count(text, "max_position_embeddings", where)
        )


def read_config(path: str | Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder.

    Raises:
        ModelError: no such folder, no config.json in it, or not a JSON object.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give the path of a Hugging Face model folder on this machine")
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: no config.json in it, so it is not a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON ({error}); copy the model folder again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: a JSON {type(config).__name__}, must be an object")
    return config


def _family(config: Mapping[str, Any], where: str | Path) -> Family:
    names = config.get("architectures") or []
    by_type = {family: name for name, family in _ARCHITECTURES.items()}
    given = names[0] if len(names) == 1 else by_type.get(config.get("model_type", ""), "") if not names else ""
    if given not in _ARCHITECTURES or config.get("model_type", _ARCHITECTURES[given]) != _ARCHITECTURES[given]:
        raise ModelError(
            f"{where}: architectures={names}, model_type={config.get('model_type')!r}: "
            f"supported are {', '.join(_ARCHITECTURES)}; use a model of one of these families"
        )
    return _ARCHITECTURES[given]


def _refuse_features(config: Mapping[str, Any], where: str | Path) -> None:
    for key, allowed in _FEATURES_MUST_BE.items():
        if config.get(key) not in allowed:
            raise ModelError(
                f"{where}: {key}={config[key]!r} is not supported, allowed: {allowed[0]!r}; use another model folder"
            )
    layers = config.get("layer_types") or []
    windowed = [kind for kind in layers if kind != "full_attention"]
    if not layers and config.get("use_sliding_window") and config.get("sliding_window") is not None:
        full = config.get("max_window_layers") or 0
        windowed = ["sliding_attention"] * (_count(config, "num_hidden_layers", where) - full)
    if windowed:
        raise ModelError(
            f"{where}: {len(windowed)} layers use {windowed[0]}, only full attention is supported; "
            "use a model without a sliding window"
        )


def _rope(config: Mapping[str, Any], where: str | Path) -> tuple[float, RopeScaling | None]:
    """Theta and scaling: both in `rope_parameters` (transformers 5), or in `rope_theta` and `rope_scaling` (older)."""
    rope: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = _positive(rope.get("rope_theta", config.get("rope_theta", 10000.0)), "rope_theta", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise ModelError(
            f"{where}: rotary embedding {rope}: rope_type must be 'default' or 'llama3' over the whole head; "
            "use a model without another kind of rope scaling"
        )
    if kind == "default":
        return theta, None
    old = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    scaling = RopeScaling(
        factor=_positive(rope.get("factor"), "rope factor", where),
        low_freq_factor=_positive(rope.get("low_freq_factor"), "rope low_freq_factor", where),
        high_freq_factor=_positive(rope.get("high_freq_factor"), "rope high_freq_factor", where),
        original_max_positions=int(_positive(old, "rope original_max_position_embeddings", where)),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelError(f"{where}: rope high_freq_factor must exceed low_freq_factor, got {rope}")
    return theta, scaling


def _dtype(config: Mapping[str, Any], where: str | Path) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"{where}: dtype={name!r}: must be float32, bfloat16 or float16; use an unquantised model")
    return str(name)


def _check_heads(spec: ModelSpec, config: Mapping[str, Any], where: str | Path) -> None:
    if spec.num_heads % spec.num_kv_heads:
        raise ModelError(f"{where}: {spec.num_heads} heads do not divide into {spec.num_kv_heads} key-value heads")
    if spec.head_dim % 2:
        raise ModelError(f"{where}: head_dim={spec.head_dim} is odd, rotary embeddings need an even one")
    if config.get("head_dim") is None and spec.hidden_size % spec.num_heads:
        raise ModelError(f"{where}: hidden_size={spec.hidden_size} is not a multiple of {spec.num_heads} heads")


def _count(config: Mapping[str, Any], key: str, where: str | Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{where}: {key}={value!r}: must be a positive whole number; complete the config.json")
    return value


def _positive(value: Any, key: str, where: str | Path) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ModelError(f"{where}: {key}={value!r}: must be a positive number; correct the config.json")
    return float(value)
