"""A laptop's log moves to Kafka: the move is killed twice, and the gateway there delivers what was unfinished, once."""

import asyncio
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.protocol.admin import DeleteGroupsRequest

from gateway.engine.control.records import ControlRecord
from gateway.log.base import Commit, Log, Partition
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import decode_delivery, decode_event, encode_delivery, encode_event, event_key
from gateway.log.topics import ROUTER_GROUP, TIERS, Topics
from gateway.model import Delivery, Event, EventId, RecordMetadata, delivery_id
from gateway.open_log import open_log
from gateway.settings import from_sources
from tests.acceptance.conftest import RULES, LogPlace
from tests.gateway_process import ROOT, GatewayProcess
from tests.load import report
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

SIZE = 2000
WINDOW = 8_000  # Records after the first unfinished one of which each second is done: within what one commit says.
AT_ONCE = 500

Unfinished = Counter[tuple[str, str]]


@pytest.mark.timeout(900)
async def test_a_twice_killed_migration_moves_exactly_the_unfinished(
    kafka_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    count = 200_000 if is_full else 2_000
    topics, file = Topics(kafka_place.prefix), folder / "gateway.db"
    async with Sink(path="/first") as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        (folder / "routes.yaml").write_text(rules)
        source = await EmbeddedLog.open(file, owner=True)
        # A tier takes 5 s at least, which only the full size has.
        await _fill(source, topics, count, retries_in=0.0 if is_full else 3600.0)
        expected = await _unfinished(source, topics)
        await source.close()

        began = time.monotonic()
        words = [f"--from=sqlite:///{file}", f"--to={kafka_place.url}", f"--topic-prefix={kafka_place.prefix}"]
        command = [sys.executable, "-m", "gateway", "migrate", f"--rules={folder / 'routes.yaml'}", *words]
        target = await open_log(from_sources({"log": kafka_place.url}, {}), owner=False)
        try:
            for share in (1 / 3, 2 / 3):
                moving = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
                while await _moved(target, topics) < count * share:
                    assert moving.returncode is None, "expected it to be killed before its end"
                    await asyncio.sleep(0.005)
                moving.kill()
                assert await moving.wait() < 0
            moving = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL)
            assert await moving.wait() == 0
            took = time.monotonic() - began
            assert await _unfinished(target, topics) == expected
        finally:
            await target.close()

        async with GatewayProcess(folder, rules=rules, log=kafka_place.url, prefix=kafka_place.prefix) as gateway:
            # What is parked, dead or due later is in nobody's way.
            due = Counter({who: number for who, number in expected.items() if _is_due(*who, with_retries=is_full)})
            await first.received(_sum(due, "first"), timeout=300)
            await second.received(_sum(due, "second"), timeout=300)
            assert await gateway.stop() == 0
    came: Unfinished = Counter()
    for name, sink in (("first", first), ("second", second)):
        came.update((name, request.header("gateway-event-id") or "") for request in sink.requests)
    assert came == due
    report(
        f"{count} events moved in {took:.1f} s with two kills; {came.total()} deliveries were unfinished, and were made"
    )


@pytest.mark.timeout(300)
async def test_migrations_that_lose_or_repeat_are_refused(kafka_place: LogPlace, folder: Path) -> None:
    """The prefix of another gateway; a log on which a gateway was tried; one that a gateway has worked on since."""
    topics, file = Topics(kafka_place.prefix), folder / "gateway.db"
    async with Sink(path="/first") as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        (folder / "routes.yaml").write_text(rules)
        source = await EmbeddedLog.open(file, owner=True)
        await _fill(source, topics, 200, retries_in=3600.0)
        other = Topics("another.")
        await source.create(other.specs([]))
        await _put(source, other.dead, _delivery("evt_dead", random.Random(2)))
        for topic in (topics.attempts, topics.audit):
            await source.append(topic, key=b"", value=b"{}", headers=[])
        due = Counter(
            {who: n for who, n in (await _unfinished(source, topics)).items() if _is_due(*who, with_retries=False)}
        )
        await source.close()

        code, told = await _migrate(folder, kafka_place, prefix="third.")
        assert code == 2, told
        assert told.startswith(f"error: --topic-prefix: expected 'another.' or '{kafka_place.prefix}', the prefix")
        assert told.count("\n") == 1

        target = await open_log(from_sources({"log": kafka_place.url}, {}), owner=False)
        try:
            tried = topics.ordered_group("all", "first")
            await target.create(topics.specs([topics.events("github")], [("all", "first")]))
            await target.seed(
                tried, {Partition(topics.ordered("all", "first"), number): Commit(0) for number in range(6)}
            )
            code, told = await _migrate(folder, kafka_place)
            assert code == 2, told
            assert told.startswith(f"error: {tried}: expected only the commits of this move")
            assert await _moved(target, topics) == 0
            await _forget(kafka_place, tried)

            code, told = await _migrate(folder, kafka_place)
            assert code == 0, told
            kept, left, done = told.splitlines()
            unneeded = f"{topics.attempts}, {topics.audit}"
            assert kept == f"not moved, since no delivery depends on them: {unneeded}; the file keeps them"
            assert left == f"not moved, since they don't have the prefix '{kafka_place.prefix}': {other.dead}"
            assert done.startswith("everything was moved, unchanged; start the gateway on Kafka")
            assert await _migrate(folder, kafka_place) == (0, told), "expected another call to change nothing"

            ((number, (start, end)),) = [each for each in (await target.bounds(topics.dead)).items() if any(each[1])]
            async for (record,) in target.scan(Partition(topics.dead, number), start, end):
                await target.append(topics.dead, key=record.key, value=record.value, headers=[*record.headers])
            _, told = await _migrate(folder, kafka_place)
            assert "unchanged, but 1 record twice, whose delivery may be repeated; start" in told
        finally:
            await target.close()

        async with GatewayProcess(folder, rules=rules, log=kafka_place.url, prefix=kafka_place.prefix) as gateway:
            await first.received(_sum(due, "first"), timeout=60)
            await second.received(_sum(due, "second"), timeout=60)
            assert await gateway.stop() == 0
        code, told = await _migrate(folder, kafka_place)
        assert code == 2, told
        assert told.startswith(f"error: {topics.dedupe}/")
        assert "expected only records moved from this log, got another record, so a gateway" in told


async def _forget(place: LogPlace, group: str) -> None:
    """Delete a group, as kafka-consumer-groups.sh does."""
    client = AIOKafkaClient(bootstrap_servers=place.url.removeprefix("kafka://"))
    await client.bootstrap()
    try:
        coordinator = await client.coordinator_lookup(CoordinationType.GROUP, group)
        await client.send(coordinator, DeleteGroupsRequest([group]))
    finally:
        await client.close()


async def _migrate(folder: Path, place: LogPlace, *, prefix: str | None = None) -> tuple[int, str]:
    """Run the command; return its exit code, and what it told but for its table."""
    words = [
        f"--from=sqlite:///{folder / 'gateway.db'}",
        f"--to={place.url}",
        f"--topic-prefix={prefix or place.prefix}",
    ]
    moving = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "gateway", "migrate", f"--rules={folder / 'routes.yaml'}", *words],
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    table, told = await moving.communicate()
    assert moving.returncode is not None
    return moving.returncode, (told + b"".join(table.splitlines(keepends=True)[-1:])).decode()


async def _fill(log: Log, topics: Topics, count: int, *, retries_in: float) -> None:
    """Leave events of which some are done, retries that are due in so long, and one that is parked and one dead."""
    chance = random.Random(1)
    events = topics.events("github")
    await log.create(topics.specs([events]))
    for start in range(0, count, AT_ONCE):
        made = [_event(number, chance) for number in range(start, min(start + AT_ONCE, count))]
        await asyncio.gather(
            *[log.append(events, key=event_key(each), value=each.body, headers=encode_event(each)) for each in made]
        )
    base = max(count // 2, count - 2 * WINDOW)
    bits = sum([1 << bit for bit in range(1, min(WINDOW, count - base)) if chance.random() < 0.5])
    done = Commit(base, bits.to_bytes((bits.bit_length() + 7) // 8, "little"))
    await log.seed(topics.group(ROUTER_GROUP), {Partition(events, 0): done})
    for number in range(count // 50):
        retried = _delivery(f"evt_retry_{number}", chance, due=time.time() + retries_in)
        await _put(log, topics.retry(chance.choice(["5s", "20s", "80s"])), retried)
    await _put(log, topics.parked, _delivery("evt_parked", chance), by="destination/elsewhere")
    await _put(log, topics.dead, _delivery("evt_dead", chance), reason="exhausted")
    key, value = ControlRecord(kind="pause", name="destination/elsewhere", state="paused", at=log.now()).encode()
    await log.append(topics.control, key=key, value=value, headers=[])


def _event(number: int, chance: random.Random) -> Event:
    return Event(
        id=EventId(f"evt_{number}"),
        source="github",
        type="push",
        key=f"repository-{chance.randrange(1000)}",
        received_at=time.time(),
        headers=((b"Content-Type", b"application/json"),),
        body=b'{"n":%d,"x":"%b"}' % (number, chance.randbytes(SIZE // 2).hex().encode()),
    )


def _delivery(event: str, chance: random.Random, *, due: float = 0.0) -> Delivery:
    made = Event(
        id=EventId(event), source="github", type="push", received_at=time.time(), headers=(), body=chance.randbytes(99)
    )
    return Delivery(id=delivery_id(made.id, "all", "second"), event=made, route="all", destination="second", due=due)


async def _put(log: Log, topic: str, delivery: Delivery, by: str = "", reason: str = "") -> None:
    headers = encode_delivery(delivery, RecordMetadata(paused_name=by, dead_reason=reason), at=log.now())
    await log.append(topic, key=delivery.destination.encode(), value=delivery.event.body, headers=headers)


async def _unfinished(log: Log, topics: Topics) -> Unfinished:
    """Return each delivery that is still to be made: its destination and event; parked and dead ones by their topic."""
    found: Unfinished = Counter()
    router = topics.group(ROUTER_GROUP)
    names = [topics.events("github"), *[topics.retry(tier) for tier in TIERS], topics.parked, topics.dead]
    for topic in names:
        commits = await log.committed(router, topic)
        for number, (start, end) in (await log.bounds(topic)).items():
            commit = commits.get(number, Commit(0))
            async for records in log.scan(Partition(topic, number), start, end):
                for record in records:
                    if commit.covers(record.offset):
                        continue
                    if topic == names[0]:
                        event = decode_event(record).id
                        found.update([("first", event), ("second", event)])
                    elif topic in (topics.parked, topics.dead):
                        found[topic, decode_delivery(record).delivery.event.id] += 1
                    else:
                        delivery = decode_delivery(record).delivery
                        found[delivery.destination, delivery.event.id] += 1
    return found


async def _moved(log: Log, topics: Topics) -> int:
    return sum([end for _, end in (await log.bounds(topics.events("github"))).values()])


def _is_due(destination: str, event: str, *, with_retries: bool) -> bool:
    return destination in ("first", "second") and (with_retries or not event.startswith("evt_retry_"))


def _sum(unfinished: Unfinished, destination: str) -> int:
    return sum([number for (name, _), number in unfinished.items() if name == destination])
