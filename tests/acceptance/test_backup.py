"""A copy of the embedded log, made under load, has all that was acknowledged before, and a gateway goes on from it."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.log.base import Partition
from gateway.log.records import decode_event
from gateway.log.topics import Topics
from gateway.open_log import open_log
from gateway.settings import from_sources
from tests.acceptance.conftest import RULES, LogPlace
from tests.gateway_process import ROOT, GatewayProcess
from tests.load import Ledger, Load, all_delivered, report
from tests.sink import Answer, Request, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")


@pytest.mark.timeout(300)
async def test_a_backup_has_all_events_acknowledged_before_it(
    embedded_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    before, rate = (60_000, 2000.0) if is_full else (2_000, 1000.0)
    copy = folder / "copy" / "gateway.db"
    copy.parent.mkdir()
    is_hanging = asyncio.Event()

    def answer(_: Request) -> Answer:
        return Answer(delay=600.0 if is_hanging.is_set() else 0.0)

    async with Sink(path="/first") as first, Sink(answer, path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        async with GatewayProcess(folder, rules=rules, log=embedded_place.url) as gateway:
            load = Load(gateway.port, rate=rate)
            await load.send(before)
            is_hanging.set()  # so that there is something left to do in the copy
            begun = ids_of(second.requests)
            enough = asyncio.Event()
            sending = asyncio.create_task(load.send_until(enough))
            while load.acknowledged_count < before + rate / 10:  # noqa: ASYNC110 - the load has no event for its half
                await asyncio.sleep(0.01)
            acknowledged = set(load.acknowledged)
            assert await _command("backup", f"--log={embedded_place.url}", str(copy)) == 0
            after = load.acknowledged_count
            enough.set()
            await sending
            gateway.kill()
        assert load.statuses() == {202: load.acknowledged_count}, "expected no append to fail for the copy"
        assert after > len(acknowledged), "expected the load to go on meanwhile"
        slowest = max(sent.answered_at - sent.at for sent in load.answers)

        # A machine that is new: of the old one there is the copy alone.
        restored = folder / "restored"
        restored.mkdir()
        place = LogPlace(url=f"sqlite:///{restored / 'gateway.db'}", prefix=embedded_place.prefix)
        assert await _command("restore", f"--log={place.url}", str(copy)) == 0
        lost = acknowledged - await _events(place)
        assert not lost
        delivered, begun_before = len(first.requests), len(second.requests)
        unfinished = acknowledged - begun
        assert unfinished
        is_hanging.clear()
        async with GatewayProcess(restored, rules=rules, log=place.url) as gateway:
            more = Load(gateway.port, rate=100, first=1_000_000)
            await more.send(10)
            await all_delivered([*acknowledged, *more.acknowledged], first, second, timeout=60)
            async with asyncio.timeout(60):
                while not unfinished <= ids_of(second.requests[begun_before:]):  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(0.05)
            assert await gateway.stop() == 0
    ledgers = [Ledger.of(sink, [*acknowledged, *more.acknowledged]) for sink in (first, second)]
    assert [ledger.lost for ledger in ledgers] == [0, 0]
    report(
        f"{len(acknowledged)} acknowledged before the copy, 0 lost; {after} when it was done; slowest {slowest:.2f} s",
        f"{len(first.requests) - delivered} delivered to the first destination from the copy",
        *ledgers,
    )


def ids_of(requests: Sequence[Request]) -> set[str | None]:
    return {request.header("gateway-event-id") for request in requests}


async def _command(*words: str) -> int:
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "gateway", *words], cwd=ROOT, stdout=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


async def _events(place: LogPlace) -> set[str]:
    topic = Topics(place.prefix).events("github")
    log = await open_log(from_sources({"log": place.url}, {}), owner=False)
    try:
        _, end = (await log.bounds(topic))[0]
        batches = log.scan(Partition(topic, 0), 0, end)
        return {decode_event(record).id async for records in batches for record in records}
    finally:
        await log.close()
