"""An asynchronous client of one SGLang server, over HTTP; `fleet.py` spreads work over several.

It knows no process and nothing of what weights hold. What would kill the server (ids outside its vocabulary, K above
it) or could never be answered is refused here, before it is sent. Every failure is a `ServerError` that names server
and request; nothing is retried at this level. A request that takes too long, or whose caller is cancelled, is aborted
on the server: hanging up alone leaves it running there for seconds.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from megatron_distill.errors import BadAnswer, RequestRefused, RequestTimedOut, ServerFailed, ServerLost
from megatron_distill.rollout import wire
from megatron_distill.rollout._http import Address, Connection, Limits
from megatron_distill.rollout.base import Completion, Given, Request
from megatron_distill.rollout.wire import Scores, ServerInfo

__all__ = ["Address", "Client", "Limits", "Scores", "ServerInfo"]

_LEFT_ALONE = {"flush_cache": False, "abort_all_requests": False}
"""What an update must not do by itself: one bucket is not the whole."""


class Client(Connection):
    """One server. Belongs to the event loop in which it is entered (`async with`); one session, any number in flight.

    `valid_vocab` is how many ids the run uses. Where the server's vocabulary is larger, ids from there on are never
    drawn, and log-probs are those of the vocabulary without them.
    """

    def __init__(
        self,
        address: Address,
        *,
        limits: Limits | None = None,
        valid_vocab: int | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        super().__init__(address, limits)
        self._valid = valid_vocab
        self._stop_ids = tuple(sorted(stop_ids))
        self._info: ServerInfo | None = None
        self._asking = asyncio.Lock()
        self._farewells: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Let aborts that are on their way arrive, then hang up."""
        if self._farewells:
            await asyncio.wait(self._farewells, timeout=self.limits.connect_seconds)
        for task in self._farewells:
            task.cancel()
        await asyncio.gather(*self._farewells, return_exceptions=True)
        await super().close()

    # -- what the server is ------------------------------------------------------------------------------------------

    async def info(self) -> ServerInfo:
        """What the server says of itself, asked anew each time; a server that is paused does not tell all of it.

        Raises:
            ServerError: as every method of this class.
        """
        told = [await self.call("GET", path) for path in ("/model_info", "/server_info", "/v1/models")]
        vocab_size = await self._vocab_size()
        with self.reading("/server_info"):
            self._info = wire.info(*told, vocab_size=vocab_size)
        return self._info

    async def version(self) -> str:
        """What it calls the weights that it holds; quick, and told by a server that is paused too."""
        told = await self.call("GET", "/model_info")
        with self.reading("/model_info"):
            return wire.weight_version(told)

    async def tp_size(self) -> int:
        """How many processes share one copy of the weights; told by a server that is paused too."""
        told = await self.call("GET", "/server_info")
        with self.reading("/server_info"):
            return wire.tp_size(told)

    async def _known(self) -> ServerInfo:
        async with self._asking:  # many requests start at once; one of them asks
            return self._info or await self.info()

    async def _vocab_size(self) -> int:
        """No route tells it, but a bias for an id that cannot be is refused with the range of those that can."""
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "logit_bias": {str(2**40): 0.0}}}
        try:
            await self.call("POST", "/generate", body)
        except RequestRefused as refusal:
            if found := re.search(r"in \[0, (\d+)\]", str(refusal)):
                return int(found[1]) + 1
        raise BadAnswer(
            f"{self.url}: cannot find out the size of its vocabulary; is it SGLang 0.5.23?", server=self.url
        )

    async def reacts(self, seconds: float | None = None) -> bool:
        """Whether its scheduler answers; asks nothing of the model, and one that is paused answers too.

        Args:
            seconds: it may take; default `limits.control_seconds`.
        """
        try:
            # `/health`, `/ready` and `/model_info` are answered whatever becomes of the scheduler
            await self.call("GET", "/server_info", seconds=seconds)
        except (ServerLost, ServerFailed, RequestTimedOut):
            return False
        return True

    # -- work --------------------------------------------------------------------------------------------------------

    async def generate(self, request: Request, rid: str) -> Completion:
        """One response, with the log-prob and the weights' version of each token.

        One that somebody aborts (`abort`, `pause("abort")`) comes back with what was written until then.

        Args:
            request: the prompt and how to draw.
            rid: its name on the server, unique among all that are in flight there.
        """
        info = await self._known()
        self._check_ids(request.tokens, info, rid)
        longest = request.sampling.max_new_tokens
        self._check_length(len(request.tokens), min(info.longest - longest, info.longest_prompt), info, rid)
        body = wire.generation(request, rid, self._stop_ids, self._forbidden(info))
        answer = await self._answer(body, rid)
        with self.reading("/generate", rid):
            return wire.completion(answer, self._stop_ids, longest)

    async def score(self, given: Given, rid: str, top_k: int = 0) -> Scores:
        """Log-probs of `given.tokens[given.start:]`, and the likeliest ids at each place if `top_k` is not 0.

        What a prefix shares with an earlier request is not computed again.
        """
        info = await self._known()
        self._check_ids(given.tokens, info, rid)
        self._check_length(len(given.tokens), info.longest_prompt, info, rid)
        left_out = range(min(self._valid or info.vocab_size, info.vocab_size), info.vocab_size)
        if not 0 < given.start < len(given.tokens):
            self._refuse(
                rid, f"start={given.start} of {len(given.tokens)} tokens: must be at least 1 and leave a token"
            )
        if not 0 <= top_k <= info.vocab_size - len(left_out):
            self._refuse(rid, f"top_k={top_k}: must be within the vocabulary of {info.vocab_size - len(left_out)} ids")
        asked = top_k + len(left_out) if top_k else 0
        body = wire.scoring(given, rid, asked, left_out)
        answer = await self._answer(body, rid)
        with self.reading("/generate", rid):
            aborted = wire.was_aborted(answer)
        if aborted:
            raise ServerFailed(f"{self.where('/generate', rid)} was aborted by somebody", server=self.url, request=rid)
        with self.reading("/generate", rid):
            return wire.scores(answer, given, asked, left_out, info.vocab_size)

    def _forbidden(self, info: ServerInfo) -> dict[str, float]:
        valid = info.vocab_size if self._valid is None else self._valid
        return {str(token): wire.FORBIDDEN for token in range(valid, info.vocab_size)}

    def _check_ids(self, tokens: Sequence[int], info: ServerInfo, rid: str) -> None:
        valid = min(self._valid or info.vocab_size, info.vocab_size)
        if not tokens:
            self._refuse(rid, "no tokens: a prompt needs at least one")
        if min(tokens) < 0 or max(tokens) >= valid:
            wrong = next(token for token in tokens if not 0 <= token < valid)
            self._refuse(rid, f"token id {wrong}: must be below {valid}; is the tokenizer the served model's?")

    def _check_length(self, length: int, longest: int, info: ServerInfo, rid: str) -> None:
        if length > longest:
            self._refuse(
                rid,
                f"{length} tokens, at most {longest} fit beside what is to be written into the server's context of "
                f"{info.context_length}; serve with a longer context_length, or ask for less",
            )

    def _refuse(self, rid: str, why: str) -> None:
        raise RequestRefused(f"{self.where('/generate', rid)} was not sent: {why}", server=self.url, request=rid)

    async def _answer(self, body: dict[str, Any], rid: str) -> Any:
        """What the server answers in time; else it is told to stop."""
        enough = self.limits.request_seconds + self.limits.control_seconds
        task = asyncio.create_task(self.call("POST", "/generate", body, rid=rid, seconds=enough))
        try:
            done, _ = await asyncio.wait({task}, timeout=self.limits.request_seconds)
        except asyncio.CancelledError:
            task.cancel()
            self._abort_later(rid)
            raise
        if done:
            return task.result()
        task.cancel()
        waited = f"{self.where('/generate', rid)}: no answer within {self.limits.request_seconds:g} s"
        try:
            await self.abort(rid)
        except (ServerLost, RequestTimedOut, ServerFailed) as error:
            raise ServerLost(
                f"{waited}, nor to its abort: the server hangs or is gone; restart it", server=self.url, request=rid
            ) from error
        raise RequestTimedOut(
            f"{waited}; it was aborted. Allow more request_seconds, ask for fewer tokens, or put fewer in flight",
            server=self.url,
            request=rid,
        )

    def _abort_later(self, rid: str) -> None:
        task = asyncio.create_task(self._abort_quietly(rid))
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _abort_quietly(self, rid: str) -> None:
        with suppress(ServerLost, ServerFailed, RequestTimedOut):  # then there is nothing left to abort
            await self.abort(rid)

    async def abort(self, rid: str) -> None:
        """Stop one request; its caller gets what was written. An unknown one is no error."""
        await self.call("POST", "/abort_request", {"rid": rid})

    async def abort_all(self) -> None:
        """Stop every request on the server, of whomever."""
        await self.call("POST", "/abort_request", {"abort_all": True})

    # -- weights -----------------------------------------------------------------------------------------------------

    async def pause(self, mode: Literal["abort", "retract", "in_place"] = "retract") -> None:
        """Stop decoding; new requests wait. Those under way end with what they have, or go on after `resume`.

        `retract` reads them again with the weights of then, `in_place` keeps their old cache, which cannot be flushed.
        """
        await self.call("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self.call("POST", "/continue_generation", {})

    async def flush_cache(self) -> None:
        """Forget the prefixes that old weights have read; refused while requests run."""
        await self.call("POST", "/flush_cache")

    async def begin_update(self) -> bool:
        """Open a session for new weights; False if the server is too old to know of sessions."""
        return await self._session_call("/begin_weight_update", {"selector": "all"})

    async def end_update(self) -> bool:
        """Close the session; False if the server is too old to know of sessions."""
        return await self._session_call("/end_weight_update", {})

    async def _session_call(self, path: str, body: dict[str, Any]) -> bool:
        try:
            await self.call("POST", path, body, seconds=self.limits.update_seconds)
        except RequestRefused as refusal:
            if refusal.status == 404:
                return False
            raise
        return True

    async def init_group(
        self,
        *,
        address: str,
        port: int,
        rank_offset: int,
        world_size: int,
        group: str,
        backend: str,
        timeout: float | None = None,
    ) -> None:
        """Join a process group for weights; answers when all ranks have joined.

        Args:
            address: host of the group's rank 0.
            port: where it listens.
            rank_offset: rank of this server's first worker.
            world_size: of the group.
            group: its name.
            backend: `gloo` or `nccl`.
            timeout: in seconds; default `limits.update_seconds`, as in every call that moves weights.
        """
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group,
            "backend": backend,
        }
        await self._update("/init_weights_update_group", body, timeout)

    async def destroy_group(self, group: str, *, timeout: float | None = None) -> None:
        """Leave a process group for weights."""
        await self._update("/destroy_weights_update_group", {"group_name": group}, timeout)

    async def update_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        timeout: float | None = None,
    ) -> None:
        """Receive one bucket over a process group, tensor after tensor; cache and requests under way are left alone.

        Args:
            names: of the parameters, as Hugging Face calls them.
            dtypes: such as `float32`, `bfloat16`.
            shapes: of whole tensors.
            group: which was joined by `init_group`.
            timeout: in seconds.
        """
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            **_LEFT_ALONE,
        }
        await self._update("/update_weights_from_distributed", body, timeout)

    async def update_tensor(
        self, payloads: Sequence[str], *, load_format: str | None = None, timeout: float | None = None
    ) -> None:
        """Take one bucket of serialised tensors, one payload per tensor-parallel rank of the server."""
        body = {"serialized_named_tensors": list(payloads), "load_format": load_format, **_LEFT_ALONE}
        await self._update("/update_weights_from_tensor", body, timeout)

    async def update_disk(self, folder: Path | str, *, timeout: float | None = None) -> None:
        """Load all weights from a folder that the server can read."""
        await self._update("/update_weights_from_disk", {"model_path": str(folder), **_LEFT_ALONE}, timeout)

    async def set_version(self, version: str) -> None:
        """Name the weights that the server holds; requests under way are left alone."""
        await self._update("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    async def _update(self, path: str, body: dict[str, Any], timeout: float | None = None) -> None:
        answer = await self.call("POST", path, body, seconds=timeout or self.limits.update_seconds)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise ServerFailed(f"{self.where(path)}: did not succeed: {answer}", server=self.url)
