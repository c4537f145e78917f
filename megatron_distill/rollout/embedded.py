"""The engine in this process: a `transformers` model with a sampling loop of our own; no server.

For CPU, tests and first runs. It holds a whole copy of the student on every rank, so it is not for large models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_distill.errors import EngineError, ModelError
from megatron_distill.rollout.base import Completion, Given, HoldsWeights, Request, Sampling, random_source
from megatron_distill.types import Stop

SCORED_ROWS = 4096
"""Rows of logits that `score` holds at a time."""
WORTH_DROPPING = 0.125
"""Finished share of a batch from which dropping its rows is cheaper than computing them on."""


class EmbeddedEngine:
    """Generates and scores with the weights it was last given, in fp32.

    Log-probs are over ids below `valid_vocab`: what lies above is padding that is never drawn.
    """

    everywhere = True
    updates_in_flight = False
    needs_weights = False

    def __init__(
        self,
        folder: Path,
        *,
        valid_vocab: int | None = None,
        stop_ids: Sequence[int],
        batch_size: int = 256,
        device: torch.device | None = None,
    ) -> None:
        """Build the architecture of `folder`/config.json; weights come by `load_weights`.

        Raises:
            ModelError: no usable config.json.
        """
        self.version = -1
        self.weights_come_from_elsewhere = False
        self.figures: dict[str, float] = {}
        self._batch_size = batch_size
        self._aborted = Event()
        self._device = device or torch.device("cpu")
        self._stop_ids = torch.tensor(sorted(stop_ids), device=self._device)
        self._model = _empty_model(Path(folder)).to(self._device)
        self._valid: int = valid_vocab or self._model.config.vocab_size
        self._max_positions: int = self._model.config.max_position_embeddings

    def load_weights(self, student: HoldsWeights, version: int) -> None:
        """Copy every parameter in; a tied output weight may be given or left out.

        Raises:
            EngineError: a name that the model does not have, one that is missing, or a shape that differs.
        """
        wanted = dict(self._model.named_parameters())
        tied = set(dict(self._model.named_parameters(remove_duplicate=False))) - set(wanted)
        for name, tensor in student.weights():
            if name in tied:
                continue
            parameter = wanted.pop(name, None)
            if parameter is None:
                raise EngineError(f"weight {name}: the engine's model has no such parameter, or got it twice")
            if parameter.shape != tensor.shape:
                raise EngineError(f"weight {name}: shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
            with torch.no_grad():
                parameter.copy_(tensor)
        if wanted:
            raise EngineError(f"{len(wanted)} weights were not given, the first is {min(wanted)}")
        self.version = version

    def close(self) -> None:
        """The model goes with the object."""

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order; draws depend on each request's key alone."""
        self._check(requests)
        self._aborted.clear()
        done: dict[int, Completion] = {}
        for chosen in self._batches(requests):
            batch = [requests[index] for index in chosen]
            done.update(zip(chosen, self._write(batch, batch[0].sampling), strict=True))
        return [done[index] for index in range(len(requests))]

    def abort(self) -> None:
        """Let `generate` return what it has; what was not begun comes back without a token."""
        self._aborted.set()

    def _check(self, requests: Sequence[Request]) -> None:
        if self.version < 0:
            raise EngineError("the engine has no weights yet; publish the student before asking for rollouts")
        for request in requests:
            length = len(request.tokens) + request.sampling.max_new_tokens
            if not request.tokens or length > self._max_positions:
                raise EngineError(
                    f"a prompt of {len(request.tokens)} tokens and max_new_tokens={request.sampling.max_new_tokens}: "
                    f"together they must fit in the model's {self._max_positions} positions, and a prompt has a token"
                )

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Requests with equal sampling and prompts of similar length together, a prompt's samples side by side."""
        by_sampling: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            by_sampling.setdefault(request.sampling, []).append(index)
        size = self._batch_size
        for indices in by_sampling.values():
            indices.sort(key=lambda index: (len(requests[index].tokens), requests[index].tokens))
            yield from (indices[start : start + size] for start in range(0, len(indices), size))

    def _write(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        """All responses of one batch, one token per row and turn."""
        size, longest = len(requests), sampling.max_new_tokens
        draws = np.stack([random_source(request.key).random(longest) for request in requests])
        draws_BN = torch.from_numpy(draws).to(self._device)
        tokens_BN = torch.zeros(size, longest, dtype=torch.int64, device=self._device)
        logp_BN = torch.zeros(size, longest, device=self._device)
        length_B = torch.full((size,), longest, device=self._device)
        ended_B = torch.zeros(size, dtype=torch.bool, device=self._device)

        row_b = torch.arange(size, device=self._device)  # the rows of B that are still computed
        state = self._prefill([request.tokens for request in requests], longest)
        for turn in range(longest):
            if self._aborted.is_set():
                length_B[~ended_B] = turn
                break
            token_b, logp_b = _choose(state.logits_bV[:, : self._valid], draws_BN[row_b, turn], sampling)
            tokens_BN[row_b, turn] = token_b
            logp_BN[row_b, turn] = logp_b
            ends_b = torch.isin(token_b, self._stop_ids) & ~ended_B[row_b]
            length_B[row_b[ends_b]] = turn + 1
            ended_B[row_b[ends_b]] = True
            alive_b = ~ended_B[row_b]
            alive = int(alive_b.sum())
            if alive == 0 or turn + 1 == longest:
                break
            if alive < (1 - WORTH_DROPPING) * len(row_b):
                row_b, token_b = row_b[alive_b], token_b[alive_b]
                state.keep(alive_b)
            self._step(state, token_b)
        return self._completions(tokens_BN, logp_BN, length_B, ended_B)

    def _completions(self, tokens_BN: Tensor, logp_BN: Tensor, length_B: Tensor, ended_B: Tensor) -> list[Completion]:
        rows = zip(tokens_BN.tolist(), logp_BN.tolist(), length_B.tolist(), ended_B.tolist(), strict=True)
        return [
            Completion(
                tokens=tuple(tokens[:length]),
                logprobs=tuple(logprobs[:length]),
                stop=Stop.EOS if ended else Stop.LENGTH if length == len(tokens) else Stop.ABORTED,
                version=self.version,
            )
            for tokens, logprobs, length, ended in rows
        ]

    def _prefill(self, prompts: list[tuple[int, ...]], room: int) -> _Decoding:
        """Read each different prompt once, padded at its start, then give every row its own copy."""
        from transformers import DynamicCache

        different = list(dict.fromkeys(prompts))
        width = max(map(len, different))
        padded = [(0,) * (width - len(prompt)) + prompt for prompt in different]
        input_UP = torch.tensor(padded, device=self._device)
        padding_U = torch.tensor([width - len(prompt) for prompt in different], device=self._device)
        place_P = torch.arange(width, device=self._device)
        real_UP = place_P >= padding_U[:, None]
        # a padding row sees itself, since attention over nothing is not a number
        mask_UPP = (real_UP[:, None, :] & (place_P <= place_P[:, None])) | torch.eye(width, dtype=torch.bool).to(
            real_UP
        )
        cache = DynamicCache(config=self._model.config)
        output = self._model(
            input_ids=input_UP,
            attention_mask=mask_UPP[:, None],
            position_ids=(place_P - padding_U[:, None]).clamp(min=0),
            past_key_values=cache,
            logits_to_keep=1,
        )
        place = {prompt: index for index, prompt in enumerate(different)}
        copy_B = torch.tensor([place[prompt] for prompt in prompts], device=self._device)
        cache.batch_select_indices(copy_B)
        seen_BL = torch.cat([real_UP, torch.ones(len(different), room, dtype=torch.bool).to(real_UP)], dim=1)[copy_B]
        return _Decoding(cache, output.logits[:, -1][copy_B], seen_BL, (width - padding_U)[copy_B], width)

    def _step(self, state: _Decoding, token_b: Tensor) -> None:
        """One token further in every row."""
        state.width += 1
        output = self._model(
            input_ids=token_b[:, None],
            attention_mask=state.seen_bL[:, None, None, : state.width],
            position_ids=state.position_b[:, None],
            past_key_values=state.cache,
        )
        state.position_b = state.position_b + 1
        state.logits_bV = output.logits[:, -1]

    @torch.inference_mode()
    def score(self, given: Sequence[Given], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """Log-probs of `tokens[start:]` of each, over ids below `valid_vocab`.

        Raises:
            EngineError: a start that leaves nothing before it or nothing to score, or no weights yet.
        """
        if self.version < 0:
            raise EngineError("the engine has no weights yet; publish the student before asking for scores")
        for one in given:
            if not 0 < one.start < len(one.tokens) <= self._max_positions:
                raise EngineError(
                    f"score: start={one.start} of {len(one.tokens)} tokens must be at least 1 and leave a token, "
                    f"within the model's {self._max_positions} positions"
                )
        order = sorted(range(len(given)), key=lambda index: len(given[index].tokens))
        scores: dict[int, tuple[float, ...]] = {}
        size = self._batch_size
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            scores.update(zip(chosen, self._scores([given[index] for index in chosen], temperature), strict=True))
        return [scores[index] for index in range(len(given))]

    def _scores(self, given: list[Given], temperature: float) -> list[tuple[float, ...]]:
        width = max(len(one.tokens) for one in given)
        # padding at the end: nothing before it looks there
        padded = torch.tensor([one.tokens + (0,) * (width - len(one.tokens)) for one in given], device=self._device)
        hidden_BLH = self._model.base_model(input_ids=padded, use_cache=False).last_hidden_state
        rows = [
            (row, place - 1, one.tokens[place])
            for row, one in enumerate(given)
            for place in range(one.start, len(one.tokens))
        ]
        row_R, place_R, target_R = torch.tensor(rows, device=self._device).unbind(1)
        head = self._model.get_output_embeddings()
        parts = []
        for row, place, target in zip(*(x.split(SCORED_ROWS) for x in (row_R, place_R, target_R)), strict=True):
            logits_RV = head(hidden_BLH[row, place])[:, : self._valid]
            logp_RV = torch.log_softmax(logits_RV.float() / temperature, dim=-1)
            parts.append(logp_RV.gather(1, target[:, None]).squeeze(1))
        by_sequence = torch.cat(parts).split([len(one.tokens) - one.start for one in given])
        return [tuple(part.tolist()) for part in by_sequence]


@dataclass(slots=True)
class _Decoding:
    """Rows in the middle of their responses."""

    cache: Any
    logits_bV: Tensor
    seen_bL: Tensor
    """False where the prompt was padded; long enough for the longest response."""
    position_b: Tensor
    """Of the next token."""
    width: int
    """Tokens in the cache, padding included."""

    def keep(self, alive_b: Tensor) -> None:
        """Drop the rows that have ended."""
        self.cache.batch_select_indices(alive_b.nonzero().squeeze(1))
        self.seen_bL = self.seen_bL[alive_b]
        self.position_b = self.position_b[alive_b]


def _choose(logits_bV: Tensor, draw_b: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-prob; `draw_b` is float64 in [0, 1)."""
    logp_bV = torch.log_softmax(logits_bV.float() / sampling.logprob_temperature, dim=-1)
    greedy = sampling.temperature == 0
    token_b = logp_bV.argmax(dim=-1) if greedy else _invert(_filtered(logp_bV, sampling), draw_b)
    return token_b, logp_bV.gather(1, token_b[:, None]).squeeze(1)


def _filtered(logp_bV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [b, V] without what top_k, then top_p leave out; not normalised."""
    if 0 < sampling.top_k < logp_bV.shape[1]:
        least_b1 = logp_bV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logp_bV = logp_bV.masked_fill(logp_bV < least_b1, float("-inf"))
    probability_bV = logp_bV.exp()
    if sampling.top_p < 1:
        sorted_bV, order_bV = probability_bV.sort(dim=-1, descending=True, stable=True)
        before_bV = sorted_bV.cumsum(dim=-1) - sorted_bV
        whole_b1 = sorted_bV.sum(dim=-1, keepdim=True)
        sorted_bV = sorted_bV.masked_fill(before_bV >= sampling.top_p * whole_b1, 0.0)
        probability_bV = torch.zeros_like(probability_bV).scatter(1, order_bV, sorted_bV)
    return probability_bV


def _invert(probability_bV: Tensor, draw_b: Tensor) -> Tensor:
    """The token whose stretch of the cumulative distribution holds the draw; in float64, so that rare tokens count."""
    cumulative_bV = probability_bV.double().cumsum(dim=-1)
    target_b1 = draw_b[:, None] * cumulative_bV[:, -1:] * (1 - 2**-50)  # stays below the end after rounding
    return torch.searchsorted(cumulative_bV, target_b1, right=True).squeeze(1)


def _empty_model(folder: Path) -> Any:
    """The architecture in fp32, evaluation mode, weights not yet set; no code from the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give a local Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{folder}: config.json cannot be used: {str(error).strip().splitlines()[0]}") from error
    return model.eval().requires_grad_(False)
