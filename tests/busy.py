"""What real servers are doing, so that a test acts while they write, however fast the machine is."""

from __future__ import annotations

import asyncio

from megatron_distill.rollout.sglang import Client


async def load(client: Client) -> tuple[int, int]:
    """Requests that its server writes, and those that wait."""
    found = (await client.call("GET", "/v1/loads"))["loads"][0]
    return int(found["num_running_reqs"]), int(found["num_waiting_reqs"])


async def until_writing(client: Client, within: float = 60) -> None:
    """Return when its server writes; what was asked must be long enough to be seen.

    Raises:
        TimeoutError: it does not begin.
    """
    async with asyncio.timeout(within):
        while (await load(client))[0] == 0:
            await asyncio.sleep(0.01)
