"""What goes over the wire to an SGLang server and what comes back: plain data in, plain data out, no sockets.

Written for SGLang 0.5.23 and read strictly: what is not as described raises `ValueError`, which the client turns into
`BadAnswer` with the server's address. Nothing is unpickled; arrays come as base64 of raw float32 and int32.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_distill.rollout.base import Completion, Given, Request, random_source
from megatron_distill.types import Stop

FORBIDDEN = -1e9
"""Added to the logits of ids that must never be drawn; e to the power of it is 0 at any temperature in use."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """Log-probabilities of given tokens, at temperature 1, whatever a server was told about temperatures."""

    logprobs: np.ndarray
    """float32 [R], R = len(tokens) - start: natural log-probs of `tokens[start:]`."""
    top_ids: np.ndarray | None = None
    """int32 [R, K], likeliest first; None when no top k was asked for."""
    top_logprobs: np.ndarray | None = None
    """float32 [R, K]."""
    version: str = ""
    """The server's name for the weights that scored."""
    cached: int = 0
    """Tokens at the beginning that the server did not have to read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server says of itself."""

    model_path: str
    served_name: str
    weight_version: str
    vocab_size: int
    """Columns of its logits; ids at or above it kill it."""
    context_length: int
    """Its positions, of which it keeps some to itself."""
    longest_prompt: int
    longest: int
    """Prompt and response together."""
    tp_size: int
    """Processes that share one copy of the weights."""
    version: str
    """Of SGLang."""
    settings: Mapping[str, Any]
    """What it was started with, as it tells: names and single values, and `architectures`; no keys."""


RESERVED, ROOM = 1, 4
"""What a server's `max_req_input_len` means: a prompt must be shorter, and prompt and response together may have so
many tokens more. A response that would be longer is cut without a word."""


def info(model: Any, server: Any, listed: Any, *, vocab_size: int) -> ServerInfo:
    """What `/model_info`, `/server_info` and `/v1/models` tell.

    Raises:
        ValueError: something is missing.
    """
    most = _part(server, "max_req_input_len", int)
    return ServerInfo(
        model_path=_part(model, "model_path", str),
        served_name=_part(model, "served_model_name", str),
        weight_version=weight_version(model),
        vocab_size=vocab_size,
        context_length=_part(_part(listed, "data", list)[0], "max_model_len", int),
        longest_prompt=most - RESERVED,
        longest=most + ROOM,
        tp_size=tp_size(server),
        version=_part(server, "version", str),
        settings={name: value for name, value in (model | server).items() if _public(name, value)},
    )


def weight_version(model: Any) -> str:
    """What `/model_info` calls the weights.

    Raises:
        ValueError: it does not tell.
    """
    return _part(model, "weight_version", str)


def tp_size(server: Any) -> int:
    """What `/server_info` says of how many processes share one copy of the weights.

    Raises:
        ValueError: it does not tell.
    """
    return _part(server, "tp_size", int)


def _public(name: str, value: Any) -> bool:
    """A server tells its keys too: as settings, and inside the command that started it."""
    return not ("key" in name or "command" in name or (isinstance(value, dict | list) and name != "architectures"))


def generation(request: Request, rid: str, stop_ids: Sequence[int], forbidden: Mapping[str, float]) -> dict[str, Any]:
    """The body of `/generate` for one response; `forbidden` is a bias for ids that must not be drawn."""
    sampling = request.sampling
    settings: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "stop_token_ids": list(stop_ids),
        # honoured by servers that decode deterministically, ignored by others
        "sampling_seed": int(random_source(request.key).integers(2**31)),
    }
    if forbidden:
        settings["logit_bias"] = forbidden
    return {"rid": rid, "input_ids": request.tokens, "sampling_params": settings, "return_logprob": True}


def completion(answer: Any, stop_ids: Sequence[int], longest: int) -> Completion:
    """The response in an answer of `/generate`.

    Raises:
        ValueError: anything about it is not as it should be; the text says what.
    """
    meta = _part(answer, "meta_info", dict)
    tokens = tuple(_integers(answer, "output_ids"))
    triples = _part(meta, "output_token_logprobs", list)
    if [triple[1] for triple in triples] != list(tokens):
        raise ValueError(
            f"log-probs of {len(triples)} tokens do not belong to the {len(tokens)} tokens of the response"
        )
    logprobs = _finite([triple[0] for triple in triples])
    stop = _stop(_part(meta, "finish_reason", dict), tokens, stop_ids)
    if stop is Stop.LENGTH and len(tokens) != longest:
        raise ValueError(
            f"the server ended the response after {len(tokens)} of {longest} tokens: its context_length or "
            "max_total_tokens does not hold more; raise it, or ask for less"
        )
    versions = _versions(meta, len(tokens))
    version = min(versions) if versions else _number(_part(meta, "weight_version", str))
    return Completion(tokens=tokens, logprobs=logprobs, stop=stop, version=version, versions=versions)


def _stop(reason: dict[str, Any], tokens: tuple[int, ...], stop_ids: Sequence[int]) -> Stop:
    match reason.get("type"):
        case "length":
            return Stop.LENGTH
        case "abort":
            return Stop.ABORTED
        case "stop" if tokens and tokens[-1] in stop_ids:
            return Stop.EOS
        case "stop":
            raise ValueError(
                f"the response ended at id {reason.get('matched')}, which is not among the ids that end one in this "
                f"run, {list(stop_ids)}: name it as eos_token_id in generation_config.json of the student, or take it "
                "out of config.json of the served model"
            )
    raise ValueError(f"finish_reason.type={reason.get('type')!r}: expected stop, length or abort")


def _versions(meta: dict[str, Any], length: int) -> tuple[int, ...]:
    """One version per token, from spans that must follow each other without a gap."""
    if "weight_versions" not in meta:  # servers that cannot change weights under a running request
        return (_number(_part(meta, "weight_version", str)),) * length
    versions: list[int] = []
    for span in _part(meta, "weight_versions", list):
        if span["start"] != len(versions):
            raise ValueError(f"weight_versions leave a gap before token {span['start']}: {meta['weight_versions']}")
        versions += [_number(span["version"])] * (span["end"] - span["start"])
    if len(versions) != length:
        raise ValueError(f"weight_versions cover {len(versions)} of {length} tokens")
    return tuple(versions)


def _number(version: str) -> int:
    """Versions of this project are optimizer steps.

    Raises:
        UnknownVersion: it is something else.
    """
    if not version.isdecimal():
        raise UnknownVersion(version)
    return int(version)


class UnknownVersion(ValueError):
    """Nobody has given the server weights of this run."""

    def __init__(self, version: str) -> None:
        super().__init__(
            f"weights version {version!r} is no number of optimizer steps: the server has not been given this run's "
            "weights; push them before it serves"
        )


def scoring(given: Given, rid: str, top_k: int, left_out: Sequence[int]) -> dict[str, Any]:
    """The body of `/generate` that scores and writes nothing.

    The first entry of an answer that starts at s is empty, so start - 1 gives exactly `tokens[start:]`. Log-probs of
    `left_out` come along at every place, so that they can be taken out of the normaliser.
    """
    body: dict[str, Any] = {
        "rid": rid,
        "input_ids": given.tokens,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": given.start - 1,
    }
    if top_k:
        body |= {
            "top_logprobs_num": top_k,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
    if left_out:
        body["token_ids_logprob"] = list(left_out)
    return body


def was_aborted(answer: Any) -> bool:
    """Whether somebody ended a request before it was answered.

    Raises:
        ValueError: the answer does not say how it ended.
    """
    return _part(_part(answer, "meta_info", dict), "finish_reason", dict).get("type") == "abort"


def scores(answer: Any, given: Given, top_k: int, left_out: Sequence[int], vocab_size: int) -> Scores:
    """Log-probs in an answer to `scoring`, over the vocabulary of `vocab_size` without `left_out`, which ends it.

    Raises:
        ValueError: anything about it is not as it should be; the text says what.
    """
    meta = _part(answer, "meta_info", dict)
    entries = _part(meta, "input_token_logprobs", list)[1:]
    # the last id is scored well, and then called 0
    asked = [token if token < vocab_size - 1 else 0 for token in given.tokens[given.start :]]
    found = [entry[1] for entry in entries]
    if found != asked:
        raise ValueError(f"scores of the {len(found)} tokens {_few(found)}, asked for the {len(asked)} {_few(asked)}")
    logp_R = np.array(_finite([entry[0] for entry in entries]), dtype=np.float32)
    ids_RK, top_logp_RK = _top(meta, len(entries), top_k) if top_k else (None, None)
    if left_out:
        lost_R = _log_of_rest(meta, len(entries))
        logp_R = logp_R - lost_R
        if ids_RK is not None and top_logp_RK is not None:
            ids_RK, top_logp_RK = _without(ids_RK, top_logp_RK - lost_R[:, None], min(left_out), top_k - len(left_out))
    return Scores(
        logprobs=logp_R,
        top_ids=ids_RK,
        top_logprobs=top_logp_RK,
        version=_part(meta, "weight_version", str),
        cached=int(meta.get("cached_tokens") or 0),
    )


def _few(tokens: Sequence[int]) -> str:
    return f"{list(tokens[:8])}{'...' if len(tokens) > 8 else ''}"


def _top(meta: dict[str, Any], rows: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    if "input_top_logprobs_shape" not in meta:
        raise ValueError("top log-probs did not come as flat arrays; the server is too old, or fell back (see its log)")
    shape = tuple(_integers(meta, "input_top_logprobs_shape"))
    empty = 1 - _part(meta, "input_top_logprobs_null_prefix", int)
    if shape != (rows + empty, top_k):
        raise ValueError(f"top log-probs of shape {shape}, expected {(rows + empty, top_k)}")
    return _array(meta, "idx", "int32", shape)[empty:], _array(meta, "val", "float32", shape)[empty:]


def _array(meta: dict[str, Any], kind: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    name = f"input_top_logprobs_{kind}_flat_b64"
    told = _part(meta, f"{name}_dtype", str)
    if told != dtype:
        raise ValueError(f"{name} is {told}, expected {dtype}")
    try:
        found: np.ndarray = np.frombuffer(b64decode(_part(meta, name, str), validate=True), dtype=f"<{dtype[0]}4")
    except binascii.Error as error:
        raise ValueError(f"{name}: no base64: {error}") from error
    if found.size != shape[0] * shape[1]:
        raise ValueError(f"{name}: {found.size} numbers, expected {shape[0]} x {shape[1]}")
    return found.reshape(shape)


def _log_of_rest(meta: dict[str, Any], rows: int) -> np.ndarray:
    """[R] log of the probability that is left to the ids in use."""
    entries = _part(meta, "input_token_ids_logprobs", list)[1:]
    if len(entries) != rows:
        raise ValueError(f"input_token_ids_logprobs has {len(entries)} rows, expected {rows}")
    lost_R = np.array([np.exp([entry[0] for entry in row]).sum() for row in entries])
    return np.log1p(-lost_R).astype(np.float32)


def _without(ids_RK: np.ndarray, logp_RK: np.ndarray, end: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `least` columns of each row whose ids are below `end`; there are that many, since more were asked."""
    order_RK = np.argsort(ids_RK >= end, axis=1, kind="stable")[:, :least]
    return np.take_along_axis(ids_RK, order_RK, axis=1), np.take_along_axis(logp_RK, order_RK, axis=1)


def _part[T](whole: Any, name: str, kind: type[T]) -> T:
    found = whole.get(name) if isinstance(whole, dict) else None
    if not isinstance(found, kind):
        raise ValueError(f"{name} is {'missing' if found is None else type(found).__name__}, expected {kind.__name__}")
    return found


def _integers(whole: Any, name: str) -> list[int]:
    found = _part(whole, name, list)
    if not all(type(one) is int for one in found):
        raise ValueError(f"{name} holds something else than integers")
    return found


def _finite(numbers: list[Any]) -> tuple[float, ...]:
    if not all(isinstance(number, int | float) and number == number and number <= 1e-3 for number in numbers):
        raise ValueError("a log-prob is no number, or above 0")
    return tuple(map(float, numbers))
