"""The client and the fleet with real servers: answers, ends, faults on the way, versions, what is refused."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_distill.errors import (
    BadAnswer,
    EngineError,
    RequestRefused,
    RequestTimedOut,
    ServerFailed,
    ServerLost,
)
from megatron_distill.rollout import wire
from megatron_distill.rollout.base import Completion, Given, Request, Sampling
from megatron_distill.rollout.fleet import Fleet
from megatron_distill.rollout.servers import ServerGroup
from megatron_distill.rollout.sglang import Address, Client, Limits
from megatron_distill.types import Stop
from tests.broken import Relay
from tests.busy import load, until_writing

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

STOP = (2,)
LONGEST = 490
"""Tokens of a response that fit beside the prompts here."""


@pytest.fixture(scope="module")
def model(tiny_served: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_served, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def unchanged(served: ServerGroup, tiny_served: Path) -> ServerGroup:
    """Servers with the weights that they were started with, whatever tests before have given them."""

    async def restore() -> None:
        for url in served.urls:
            async with client(url) as connected:
                await connected.resume()
                await connected.update_disk(tiny_served)
                await connected.flush_cache()

    within(120, restore())
    return served


@pytest.fixture
def url(unchanged: ServerGroup) -> str:
    """One of them; its weights are called version 1."""

    async def name() -> None:
        async with client(unchanged.urls[0]) as connected:
            await connected.set_version("1")

    within(60, name())
    return unchanged.urls[0]


def within[T](seconds: float, work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(seconds):
            return await work

    return asyncio.run(limited())


def requests(count: int, longest: int) -> list[Request]:
    sampling = Sampling(max_new_tokens=longest)
    return [Request(tokens=tuple(range(3 + i % 30, 20 + i % 30)), sampling=sampling, key=(1, i)) for i in range(count)]


def one_request(longest: int, tokens: tuple[int, ...] = (5, 6, 7)) -> Request:
    return Request(tokens=tokens, sampling=Sampling(max_new_tokens=longest), key=(1,))


def client(url: str, **settings: Any) -> Client:
    return Client(Address(url), **({"stop_ids": STOP} | settings))


@asynccontextmanager
async def relayed(
    url: str, **settings: Any
) -> AsyncIterator[tuple[Fleet, Relay, Relay, list[tuple[str, EngineError]]]]:
    """A fleet of two addresses that lead to a real server through relays, and what it said of lost ones."""
    lost: list[tuple[str, EngineError]] = []
    async with (
        Relay(url) as one,
        Relay(url) as other,
        Fleet(
            [client(one.url), client(other.url)],
            on_lost=lambda url, why: lost.append((url, why)),
            **({"in_flight": 8} | settings),
        ) as fleet,
    ):
        fleet.announce(1)
        yield fleet, one, other, lost


def check_once(done: Sequence[Completion], times: Counter[int], asked: Sequence[Request]) -> None:
    """Every request was answered, and once."""
    assert len(done) == len(asked)
    assert times == Counter(range(len(asked)))
    assert all(one.stop in (Stop.EOS, Stop.LENGTH) and one.tokens for one in done)


def test_a_server_says_what_it_is(url: str, tiny_served: Path) -> None:
    async def ask() -> None:
        async with client(url) as connected:
            info = await connected.info()
            assert (info.vocab_size, info.context_length, info.longest_prompt, info.longest) == (259, 512, 505, 510)
            assert (Path(info.model_path), info.weight_version, info.tp_size) == (tiny_served, "1", 1)
            assert info.settings["architectures"] == ["Qwen3ForCausalLM"]
            assert await connected.reacts()

    within(60, ask())


def test_what_would_kill_a_server_never_leaves(url: str) -> None:
    async def ask() -> None:
        async with Relay(url) as relay, client(relay.url, valid_vocab=250) as connected:
            await connected.info()
            before = relay.requests
            for wrong, told in [
                (one_request(4, (5, 259)), "token id 259: must be below 250"),
                (one_request(4, (250,)), "token id 250: must be below 250"),
                (one_request(4, (-1,)), "token id -1"),
                (one_request(4, ()), "no tokens"),
                (one_request(11, (5,) * 500), "500 tokens, at most 499 fit"),
                (one_request(1, (5,) * 506), "506 tokens, at most 505 fit"),
            ]:
                with pytest.raises(RequestRefused, match=told):
                    await connected.generate(wrong, "r")
            for given, top_k, told in [
                (Given(tokens=(5, 6, 7), start=1), 251, "top_k=251"),
                (Given(tokens=(5, 6, 7), start=1), -1, "top_k=-1"),
                (Given(tokens=(5, 6, 7), start=3), 0, "start=3 of 3"),
                (Given(tokens=(5, 6, 7), start=0), 0, "start=0"),
                (Given(tokens=(5, 6, 259), start=1), 0, "token id 259"),
                (Given(tokens=(5,) * 506, start=1), 0, "506 tokens"),
            ]:
                with pytest.raises(RequestRefused, match=told):
                    await connected.score(given, "r", top_k)
            assert relay.requests == before
            for room in (10, 5):  # the longest that fits is answered whole
                done = await connected.generate(one_request(room, (5,) * (510 - room)), "r")
                assert len(done.tokens) == room or done.stop is Stop.EOS
            assert len((await connected.score(Given(tokens=(5,) * 505, start=1), "r")).logprobs) == 504

    within(60, ask())


@pytest.mark.parametrize("valid", [None, 250])
@pytest.mark.parametrize("top_k", [0, 5, 250])
def test_scores_are_those_of_a_whole_pass(url: str, model: Any, valid: int | None, top_k: int) -> None:
    last = (valid or model.config.vocab_size) - 1  # which a server calls 0
    given = [Given(tokens=(*range(3, 40 + 10 * index), last, 9), start=20 + index) for index in range(3)]

    async def ask() -> list[Any]:
        async with Fleet([client(url, valid_vocab=valid)]) as fleet:
            return await fleet.score_all(given, top_k)

    for one, scores in zip(given, within(60, ask()), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([one.tokens])).logits[0, one.start - 1 : -1, :valid]
        logp_RV = logits.log_softmax(-1)
        target_R = torch.tensor(one.tokens[one.start :])
        np.testing.assert_allclose(scores.logprobs, logp_RV.gather(1, target_R[:, None]).squeeze(1), atol=1e-4)
        if top_k:
            expected = logp_RV.topk(top_k)
            np.testing.assert_allclose(scores.top_logprobs, expected.values, atol=1e-4)
            np.testing.assert_allclose(
                logp_RV.gather(1, torch.from_numpy(scores.top_ids.astype(np.int64))), expected.values, atol=1e-4
            )
        assert (scores.top_ids is None) == (top_k == 0)


def test_a_prefix_that_was_read_is_not_read_again(url: str) -> None:
    async def ask() -> int:
        async with client(url) as connected:
            prefix = tuple(range(100, 160))
            await connected.score(Given(tokens=(*prefix, 5, 6), start=60), "r-1")
            return (await connected.score(Given(tokens=(*prefix, 7, 8), start=60), "r-2")).cached

    assert within(60, ask()) == 59, "all but the token whose logits score the first one"


def test_an_aborted_response_comes_back_with_what_was_written(url: str) -> None:
    async def ask() -> list[Completion]:
        async with client(url) as connected:
            asked = {f"long-{number}": one for number, one in enumerate(requests(8, LONGEST))}
            tasks = [asyncio.create_task(connected.generate(one, name)) for name, one in asked.items()]
            await until_writing(connected)
            for name in asked:
                await connected.abort(name)
            await connected.abort("nobody")
            return await asyncio.gather(*tasks)

    partial = [one for one in within(90, ask()) if one.stop is Stop.ABORTED]
    assert any(one.tokens for one in partial)
    for one in partial:
        assert len(one.tokens) == len(one.logprobs) == len(one.versions) < LONGEST


class Overhearing(Relay):
    """Keeps what a server answers to each `/generate`, to the end, whether or not the client still waits for it.

    The server does not see through it that a client has hung up: what ends early was aborted.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.answers: list[Completion] = []

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generates: bool) -> None:
        content = await reader.read()
        _, _, body = content.partition(b"\r\n\r\n")
        if generates and b"output_ids" in body:  # a client also asks for what is refused, to learn of the vocabulary
            self.answers.append(wire.completion(json.loads(body), STOP, LONGEST))
        writer.write(content)
        await writer.drain()


async def overheard(relay: Overhearing, asked: int, whole: int = 0) -> None:
    """The server answered all, some because they were aborted while it wrote, and wrote `whole` at most to the end.

    Left alone, it writes some of 128 to the end, after several seconds.
    """
    async with asyncio.timeout(30):
        while len(relay.answers) < asked:
            await asyncio.sleep(0.01)
    assert len(relay.answers) == asked
    assert any(one.stop is Stop.ABORTED and one.tokens for one in relay.answers)
    assert sum(one.stop is Stop.LENGTH for one in relay.answers) <= whole


async def all_arrived(relay: Overhearing, watching: Client, asked: int) -> None:
    """Return when the server knows all that are asked, and writes some: an abort that overtakes its request is lost."""
    known = running = 0
    while known < asked or not running:
        ended = len(relay.answers)
        running, waiting = await load(watching)
        known = running + waiting + ended
        assert ended < asked, "all was over before it was seen"
        await asyncio.sleep(0.01)


def test_requests_that_take_too_long_are_aborted_on_the_server(url: str) -> None:
    async def ask() -> None:
        async with Overhearing(url) as relay, client(relay.url, limits=Limits(request_seconds=1.5)) as hasty:
            await hasty.info()
            done = await asyncio.gather(
                *(hasty.generate(one, f"slow-{number}") for number, one in enumerate(requests(128, LONGEST))),
                return_exceptions=True,
            )
            slow = [one for one in done if not isinstance(one, Completion)]
            whole = [one for one in done if isinstance(one, Completion) and one.stop is Stop.LENGTH]
            assert slow
            told = re.compile(r"request slow-\d+: no answer within 1.5 s; it was aborted")
            assert all(isinstance(one, RequestTimedOut) and told.search(str(one)) for one in slow)
            await overheard(relay, 128, len(whole))

    within(90, ask())


def test_a_cancelled_call_leaves_nothing_running(url: str) -> None:
    async def ask() -> None:
        async with client(url) as watching, Overhearing(url) as relay:
            async with Fleet([client(relay.url)]) as fleet:
                fleet.announce(1)
                task = asyncio.create_task(fleet.generate_all(requests(128, LONGEST)))
                await all_arrived(relay, watching, 128)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await overheard(relay, 128)

    within(90, ask())


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_tokens_know_their_weights_when_these_change_underway(url: str, mode: Any) -> None:
    async def ask() -> list[Completion]:
        async with client(url) as connected, Fleet([client(url)]) as fleet:
            fleet.announce(1)
            task = asyncio.create_task(fleet.generate_all(requests(8, LONGEST)))
            await until_writing(connected)
            await connected.pause(mode)
            fleet.expect(2)
            await connected.set_version("updating")  # while they are half in, weights have no number
            await connected.set_version("2")
            await connected.resume()
            fleet.announce(2)
            return await task

    mixed = [one for one in within(120, ask()) if set(one.versions) == {1, 2}]
    assert mixed, "some response was under way"
    for one in mixed:
        assert list(one.versions) == sorted(one.versions)
        assert one.version == 1


def test_answers_by_other_weights_are_never_used(url: str) -> None:
    lost: list[str] = []

    async def ask() -> None:
        async with (
            client(url) as connected,
            Fleet([client(url)], on_lost=lambda url, why: lost.append(str(why))) as fleet,
        ):
            fleet.announce(1)
            await fleet.generate_all(requests(2, 3))
            for version, told in (("7", "version 7"), ("updating", "no number of optimizer steps")):
                await connected.set_version(version)
                task = asyncio.create_task(fleet.generate_all(requests(2, 3)))
                while fleet.serving:
                    await asyncio.sleep(0.01)
                assert told in lost[-1]
                await connected.set_version("1")
                fleet.admit(url)
                assert {one.version for one in await task} == {1}
            fleet.announce(8)
            task = asyncio.create_task(fleet.generate_all(requests(2, 3)))
            while fleet.serving:
                await asyncio.sleep(0.01)
            assert "version 1" in lost[-1], "the server missed an update"
            await connected.set_version("8")
            fleet.admit(url)
            assert {one.version for one in await task} == {8}

    within(60, ask())


def test_an_end_that_the_run_does_not_know_is_said(url: str) -> None:
    async def ask() -> None:
        async with Fleet([client(url, stop_ids=())]) as fleet:
            fleet.announce(1)
            with pytest.raises(BadAnswer, match=r"ended at id 2.*generation_config\.json"):
                await fleet.generate_all(requests(40, 200))
            assert fleet.serving

    within(60, ask())


def test_requests_of_a_server_that_dies_are_answered_by_another_once(url: str) -> None:
    asked, times = requests(30, 40), Counter[int]()

    async def ask() -> list[Completion]:
        async with relayed(url) as (fleet, one, other, lost):
            task = asyncio.create_task(fleet.generate_all(asked, lambda index, _: times.update([index])))
            while one.requests < 4:
                await asyncio.sleep(0.01)
            one.die()
            done = await task
            assert [url for url, _ in lost] == [one.url]
            assert isinstance(lost[0][1], ServerLost)
            assert fleet.redone > 0
            assert other.requests > 20
            return done

    check_once(within(120, ask()), times, asked)


def test_answers_that_are_cut_are_asked_for_again(url: str) -> None:
    asked, times = requests(30, 60), Counter[int]()

    async def ask() -> list[Completion]:
        async with relayed(url) as (fleet, one, _, lost):
            await fleet.clients[0].info()
            one.cut_after = 1500
            done = await fleet.generate_all(asked, lambda index, _: times.update([index]))
            assert [url for url, _ in lost] == [one.url]
            assert "cut short" in str(lost[0][1])
            return done

    check_once(within(120, ask()), times, asked)


def test_requests_of_a_server_that_is_withdrawn_are_answered_by_another_once(url: str) -> None:
    asked, times = requests(30, 40), Counter[int]()

    async def ask() -> list[Completion]:
        async with relayed(url) as (fleet, one, _, _lost):
            await fleet.clients[0].info()
            one.mute = True
            task = asyncio.create_task(fleet.generate_all(asked, lambda index, _: times.update([index])))
            while len(times) < 10:
                await asyncio.sleep(0.01)
            fleet.withdraw(one.url, ServerLost("it hangs", server=one.url))
            done = await task
            one.mute = False  # the answers that were held back arrive now, and count no more
            await asyncio.sleep(0.1)
            return done

    check_once(within(120, ask()), times, asked)


def test_a_call_waits_for_a_server_to_come_back(url: str) -> None:
    asked, times = requests(20, 30), Counter[int]()

    async def ask() -> list[Completion]:
        async with relayed(url) as (fleet, one, other, lost):
            one.die()
            other.die()
            task = asyncio.create_task(fleet.generate_all(asked, lambda index, _: times.update([index])))
            while fleet.serving:
                await asyncio.sleep(0.01)
            assert {url for url, _ in lost} == {one.url, other.url} == set(fleet.lost)
            assert not task.done()
            one.dead = False
            fleet.admit(one.url)
            return await task

    check_once(within(120, ask()), times, asked)


def test_a_request_that_no_server_survives_is_given_up(url: str) -> None:
    async def ask() -> None:
        async with relayed(url) as (fleet, one, other, lost):
            for each in fleet.clients:
                await each.info()
            one.cut_after = other.cut_after = 100
            task = asyncio.create_task(fleet.generate_all(requests(1, 30)))
            while not task.done():
                for address in fleet.lost:
                    fleet.admit(address)
                await asyncio.sleep(0.01)
            with pytest.raises(ServerLost, match="hung up before it answered"):
                await task
            assert len(lost) == 5

    within(60, ask())


def test_no_server_gets_more_than_its_share(url: str) -> None:
    async def ask() -> None:
        most = 0

        async with relayed(url, in_flight=3) as (fleet, one, other, _):

            def look(index: int, completion: Completion) -> None:
                nonlocal most
                most = max(most, *(len(server.busy) for server in fleet._servers.values()))

            await fleet.generate_all(requests(40, 12), look)
            assert most == 3
            assert abs(one.requests - other.requests) < 20, "work was spread"

    within(120, ask())


def test_aborting_all_ends_a_call_with_what_there_is(url: str) -> None:
    times = Counter[int]()

    async def ask() -> list[Completion]:
        async with client(url) as watching, relayed(url, in_flight=10) as (fleet, _, _, _):
            asked = requests(60, LONGEST)
            task = asyncio.create_task(fleet.generate_all(asked, lambda index, _: times.update([index])))
            await until_writing(watching)
            await fleet.abort_all()
            done = await task
            assert (await fleet.generate_all(requests(2, 5)))[0].tokens, "the next call is not aborted"
            return done

    done = within(120, ask())
    assert times == Counter(range(60))
    assert any(one.stop is Stop.ABORTED and one.tokens for one in done)
    assert any(one.stop is Stop.ABORTED and not one.tokens for one in done), "what was never sent"


def test_an_abort_by_somebody_else_costs_nothing_but_time(url: str) -> None:
    asked, times = requests(8, LONGEST), Counter[int]()

    async def ask() -> list[Completion]:
        async with client(url) as stranger, Fleet([client(url)]) as fleet:
            fleet.announce(1)
            task = asyncio.create_task(fleet.generate_all(asked, lambda index, _: times.update([index])))
            await until_writing(stranger)
            await stranger.abort_all()
            done = await task
            assert fleet.redone > 0
            return done

    check_once(within(120, ask()), times, asked)


def test_scores_that_somebody_aborts_are_asked_for_again(url: str) -> None:
    given = [Given(tokens=tuple(3 + (7 * place + index) % 200 for place in range(500)), start=1) for index in range(64)]

    async def ask() -> tuple[int, int]:
        async with client(url) as stranger, Fleet([client(url)]) as fleet:
            task = asyncio.create_task(fleet.score_all(given, top_k=20))
            while not task.done() and fleet.redone == 0:
                await asyncio.sleep(0.05)
                await stranger.abort_all()
            return len(await task), fleet.redone

    answered, redone = within(120, ask())
    assert answered == len(given)
    assert redone > 0


def test_a_refusal_by_the_server_is_told_in_its_words(url: str) -> None:
    async def ask() -> None:
        async with client(url) as connected:
            with pytest.raises(RequestRefused, match="HTTP 400"):
                await connected.update_disk("/nonexistent/folder")
            with pytest.raises(RequestRefused, match="HTTP 404"):
                await connected.call("POST", "/no_such_route", {})
            assert await connected.begin_update()
            with pytest.raises((RequestRefused, ServerFailed)):
                await connected.begin_update()
            assert await connected.end_update()

    within(60, ask())
