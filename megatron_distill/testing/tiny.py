"""Real but tiny tokenizers and models on disk, as any user's folder would hold them; nothing here is a mock.

Weights are random, and so are norms and biases: a mapping that swaps two norms or drops a bias must show. So is the
embedding of the padding token, which `transformers` makes zero: a student that samples it would get a gradient norm
of hundreds out of the first RMSNorm.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

type Family = Literal["qwen2", "qwen3", "llama"]

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
BYTE_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""Size of `tiny_tokenizer` without training text: every byte, and the special tokens at ids 0, 1, 2."""

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def tiny_tokenizer(folder: Path, texts: Iterable[str] = (), *, vocab_size: int = BYTE_VOCAB_SIZE) -> Path:
    """Write a byte-level BPE tokenizer with a ChatML template into `folder`; `texts` teach it merges.

    Digits stay single tokens. End of sequence is `<|im_end|>` (id 2), padding is `<|endoftext|>` (id 0).
    """
    tokenizer = Tokenizer(models.BPE())
    # `transformers` rebuilds this very pipeline, whatever tokenizer.json says, for a tokenizer beside a Qwen2 model
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return folder


def tiny_model(
    folder: Path,
    family: Family,
    *,
    tied: bool = False,
    vocab_size: int = BYTE_VOCAB_SIZE,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    **config_overrides: Any,
) -> Path:
    """Write config.json and safetensors of a random causal language model into `folder`, in fp32."""
    config_class, model_class = _CLASSES[family]
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "qwen2":
        del settings["head_dim"]
    config = config_class(**(settings | config_overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        _shake(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@torch.no_grad()
def _shake(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            centre = 0.0 if name.endswith("bias") else 1.0
            parameter.copy_(centre + 0.1 * torch.randn_like(parameter))
    padding = model.get_input_embeddings().weight[model.config.pad_token_id]
    padding.normal_(std=model.config.initializer_range)
