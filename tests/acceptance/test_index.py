"""The index of a gateway's log says of each event what has become of it, whoever is killed and restarted."""

import asyncio
from pathlib import Path

import pytest

from gateway.engine.control.records import DeadFilter
from gateway.index.index import Index, open_index
from gateway.index.statuses import Status
from gateway.log.topics import Topics
from gateway.open_log import open_log
from gateway.settings import from_sources
from tests.acceptance.conftest import SOURCES, LogPlace, operators
from tests.gateway_process import GatewayProcess
from tests.load import Load
from tests.sink import Request, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = (
    SOURCES
    + """
destinations:
  ci: {{url: "{ci}"}}
  other: {{url: "{other}"}}
routes:
  - {{name: build, from: github, to: [ci], retry: {{schedule: [1h]}}}}
  - {{name: copy, from: github, to: [other]}}
"""
)
EVENTS = 40


async def test_the_index_of_a_gateway_says_what_has_become_of_its_events(place: LogPlace, folder: Path) -> None:
    gone, failing = b'"n":1,', b'"n":2,'
    is_repaired = False

    def script(request: Request) -> int:
        if is_repaired:
            return 200
        return 410 if gone in request.body else 500 if failing in request.body else 200

    async with Sink(script, path="/ci") as ci, Sink(path="/other") as other:
        gateway = GatewayProcess(
            folder, rules=RULES.format(ci=ci.url, other=other.url), log=place.url, prefix=place.prefix
        )
        async with gateway, operators(place) as commands:
            log = await open_log(from_sources({"log": place.url}, {}), owner=False)
            try:
                async with open_index(folder / "index.db", log, Topics(place.prefix)) as index:
                    load = Load(gateway.port, rate=500)
                    await load.send(EVENTS)
                    await until(index, "status:dead route:build destination:ci", 1)
                    await until(index, "status:retrying route:build destination:ci", 1)
                    await until(index, "status:done -status:pending", EVENTS - 2)
                    assert {event.id for event in (await index.search("", limit=100)).events} == set(load.acknowledged)
                    gateway.kill()
                    await gateway.start()
                    is_repaired = True
                    assert (
                        await commands.finished(await commands.resolve("replay", DeadFilter()), timeout=20) is not None
                    )
                    assert await commands.kick("destination/ci") is not None
                    await until(index, "status:done -status:dead,retrying,pending", EVENTS)
                    [event] = (await index.search("body.n:1")).events
                    lives = await index.deliveries(event)
                    assert [life.status for life in lives] == [Status.DONE, Status.DONE]
                    assert [attempt.status for attempt in lives[0].attempts] == [410]
                async with open_index(folder / "anew.db", log, Topics(place.prefix)) as anew:
                    await until(anew, "status:done -status:dead,retrying,pending", EVENTS)
            finally:
                await log.close()


async def until(index: Index, query: str, count: int) -> None:
    """Look until a query finds so many events."""
    found = 0
    try:
        async with asyncio.timeout(30):
            while found != count:
                await index.refresh()
                found = len((await index.search(query, limit=100)).events)
                await asyncio.sleep(0.1)
    except TimeoutError:
        its = [event.summaries for event in (await index.search("", limit=100)).events]
        told = f"{query}: expected {count}, got {found} of {its}; {await index.statistics()}"
        raise AssertionError(told) from None
