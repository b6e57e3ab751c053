"""Records that no gateway wrote, in every topic of a real cluster, under load: nothing stops, nothing is lost."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import time
from typing import NamedTuple

import orjson
import pytest
from aiokafka import AIOKafkaProducer

from gateway.engine.control.records import ControlRecord, DeadFilter, Selection, decode
from gateway.log.base import Partition
from gateway.log.records import Origin, encode_dedupe_entries, encode_delivery, encode_event, encode_origin
from gateway.log.topics import TIERS, Topics
from gateway.model import NO_METADATA
from gateway.rules.routing_revision import encode
from gateway.rules.rules import RoutingRevision
from tests.acceptance.conftest import LogPlace, operators
from tests.acceptance.test_rollout import Fleet
from tests.builders import a_delivery, an_event
from tests.gateway_versions import THIS
from tests.load import SECRET, Ledger, Load, all_delivered, report
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = f"""
version: 1
sources:
  github: {{{{verify: {{{{scheme: github, secrets: ["{SECRET}"]}}}}, key: body.n, dedupe: 1h}}}}
destinations:
  first: {{{{url: "{{first}}"}}}}
  second: {{{{url: "{{second}}"}}}}
routes:
  - {{{{name: all, from: github, to: first}}}}
  - {{{{name: in-order, from: github, to: second, order: key}}}}
"""

Poison = tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]
"""Key, value and record headers, any of which may be missing."""


def garbage() -> list[Poison]:
    """Return what is neither an event, nor a delivery, nor a dedupe entry."""
    event = encode_event(an_event())
    state = orjson.loads(dict(encode_delivery(a_delivery(), NO_METADATA, at=0.0))["gw_delivery"])
    changed = [
        {**state, name: value}
        for name in ("id", "route", "attempts", "successor", "due", "metadata", "at")
        for value in (None, ["list"], {"an": "object"}, True, -1, 1e300, "\0")
    ]
    found: list[Poison] = [
        (None, b"", []),
        (b"", b"", [("gw_v", None)]),
        (b"\xff", b"\xff\x00", [("gw_v", b"1"), ("gw_at", b"nan")]),
        (b"k", b"x" * 300_000, [("gw_v", b"one")]),
        (b"k", b"{}", [*event[:-1], ("gw_headers", b"no colon\r\n\r\n"), ("gw_delivery", b"{}")]),
        (b"k", b"{}", [(name, b"\r\nInjected: 1" if name == "ce_id" else value) for name, value in event]),
        (b"k", b"{}", [(name, b"9e99" if name == "gw_at" else value) for name, value in event]),
    ]
    return found + [(b"k", b"{}", [*event, ("gw_delivery", orjson.dumps(each))]) for each in changed]


def control_records() -> list[Poison]:
    keys = (
        b"pause/destination/first",
        b"kick/route/all",
        b"dead/1",
        b"replay/1",
        b"checkpoint/replay/1",
        b"what/is/this",
    )
    values = (
        b"",
        b"[]",
        b'{"state":',
        b'{"state":["paused"],"at":0,"checkpoint":{},"count":0}',
        b'{"state":"done","at":"now","checkpoint":{"a":"b"},"count":{},"filter":[],"selection":7}',
    )
    return [(b"", b"{}", []), *[(key, value, []) for key in keys for value in values if key != keys[0] or value]]


def decodable(topic: str, route: str) -> list[Poison]:
    """Return control records that can be decoded: what they say was said by no gateway, and can't be acted on."""
    place, other = f"{topic}/0", f"{topic}/1"
    ranges = [
        ({place: 5, other: 50}, {other: 0}),
        ({place: 5}, {place: 500}),
        ({place: 1 << 53}, {place: 0}),
        ({"no.topic/7": 9}, {}),
    ]
    replays = [
        ControlRecord(
            kind="replay",
            name=f"poison-{number}",
            state="requested",
            at=time(),
            checkpoint=ends,
            selection=Selection(route=route, since=0.0, starts=starts, undelivered=True),
        )
        for number, (ends, starts) in enumerate(ranges)
    ]
    at_the_end = Selection(route=route, since=0.0, starts={other: 0})
    routes = ("garbage", "[]", '{"from": 1, "to": []}', "[" * 50_000)
    records = [
        *replays,
        ControlRecord(
            kind="replay", name="poison-done", state="done", at=1.0, checkpoint={other: 1 << 53}, selection=at_the_end
        ),
        ControlRecord(
            kind="checkpoint", name="replay/poison-done", state="done", at=1.0, checkpoint={other: 9}, routes=routes[0]
        ),
        ControlRecord(kind="rules", name="poison-self", state="done", at=1.0, revision="poison-self", routes="x"),
        ControlRecord(kind="rules", name="poison-whole", state="done", at=1.0, routes="x"),
        ControlRecord(kind="routed", name="poison-x", state="done", at=1.0, checkpoint={"none/0": 3}, revision="x"),
    ]
    for number, text in enumerate(routes):
        revision = encode(RoutingRevision(f"poison-{number}", {route: text}), None)
        name = f"poison-{number}"
        records.append(ControlRecord(kind="rules", name=name, state="done", at=1.0, routes=revision))
        records.append(
            ControlRecord(kind="routed", name=name, state="done", at=1.0, checkpoint={other: number}, revision=name)
        )
    for each in records:
        assert decode(*each.encode()) == each
    return [(*each.encode(), []) for each in records]


def dedupe_entries(topic: str) -> list[Poison]:
    key = f"{topic}/0".encode()
    return [
        (key, b"too short", encode_dedupe_entries("github", 0)),
        (key, b"", encode_dedupe_entries("github", 1 << 62)),
        (key, b"x" * 40, [("gw_v", b"1"), ("gw_source", b"\xff"), ("gw_origin", None)]),
        (key, None, []),
    ]


def positions(topic: str) -> list[Poison]:
    """Return what a route that keeps the order might take for a sign that it has had all events, for ever or by now."""
    found: list[Poison] = []
    for number in range(64):
        for ahead in (0.0, 100.0, 3e9):
            origin = Origin(Partition(topic, number), 10**14 - 1, time() + ahead)
            found.append((b"%d" % number, b"garbage", [encode_origin(origin)]))
    return found


@asynccontextmanager
async def producer(place: LogPlace) -> AsyncIterator[AIOKafkaProducer]:
    writer = AIOKafkaProducer(bootstrap_servers=place.servers)
    await writer.start()
    try:
        yield writer
    finally:
        await writer.stop()


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_foreign_records_stop_no_gateway(kafka_place: LogPlace, folder: Path) -> None:
    await withstood(kafka_place, folder)


class Withstood(NamedTuple):
    """What gateways did that met records which none of them wrote."""

    records: int
    load: Load
    first: Sink
    second: Sink


async def withstood(place: LogPlace, folder: Path) -> Withstood:
    """Write them into every topic, and have gateways meet them under load: as they read, command, start and stop."""
    topics = Topics(place.prefix)
    events = topics.events("github")
    bad, bad_commands, bad_entries = garbage(), control_records(), dedupe_entries(events)
    misleading = decodable(events, "all")
    poison = {
        events: [each for each in bad if not any(name == "gw_delivery" and text != b"{}" for name, text in each[2])],
        **{topics.retry(tier): bad for tier in TIERS},
        topics.dead: bad,
        topics.parked: bad,
        topics.control: [*bad_commands, *misleading],
        topics.dedupe: [*bad_entries, *bad],
        topics.ordered("in-order", "second"): [*bad, *positions(events)],
    }
    async with (
        Sink(path="/first") as first,
        Sink(path="/second") as second,
        AsyncExitStack() as stack,
        producer(place) as writer,
    ):
        fleet = Fleet(stack, folder, place, RULES.format(first=first.url, second=second.url))
        [ingress, one] = await fleet.start(THIS, "ingress", "router")
        [two] = await fleet.start(THIS, "router")
        load = Load(ingress.port, rate=200.0)
        stopped = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.send_until(stopped))
            await first.received(100, timeout=20)
            sent = [
                writer.send(topic, key=key, value=value, headers=list(headers))
                for topic, records in poison.items()
                for key, value, headers in records
            ]
            await asyncio.gather(*[await each for each in sent])
            async with operators(place) as commands:
                paused = await commands.pause("destination/first")
                assert paused
                await asyncio.sleep(2)
                resumed = await commands.resume("destination/first")
                assert resumed is not None
                assert await commands.finished(resumed, timeout=20), one.story()
                kicked = await commands.kick("destination/first")
                assert await commands.finished(kicked, timeout=20), one.story()
                dropped = await commands.resolve("drop", DeadFilter(reason="undecodable"))
                settled = await commands.finished(dropped, timeout=20)
                assert settled is not None, one.story()
                assert settled.count >= len(bad)
                assert not (await commands.control()).pending("replay"), one.story()
            [three] = await fleet.start(THIS, "router")  # one that meets all of it as it starts
            assert await one.stop() == 0, one.story()
            so_far = load.acknowledged_count
            await first.received(so_far + 100, timeout=30)
            await asyncio.sleep(8)  # the shortest tiers, and what each job looks at every few seconds
            stopped.set()
        await all_delivered(load.acknowledged, first, second, timeout=30)
        for gateway in (two, three):
            assert gateway.is_running, gateway.story()
            assert (await gateway.metrics()).sum("gateway_log_up") == 1
        ledgers = [Ledger.of(sink, load.acknowledged) for sink in (first, second)]
        count = sum(map(len, poison.values()))
        report(f"{count} records that no gateway wrote", *ledgers)
        assert [ledger.lost for ledger in ledgers] == [0, 0], two.story()
        assert load.statuses().keys() == {202}
        counted = sum([(await each.metrics()).sum("gateway_records_undecodable_total") for each in (two, three)])
        assert counted > len(bad_commands)
        assert await two.stop() == 0, two.story()
        assert await three.stop() == 0, three.story()
    return Withstood(count, load, first, second)
