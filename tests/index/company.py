"""A log with what a gateway stores: events, deliveries, attempts, commits, commands. Nothing is delivered."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from gateway.engine.control.records import ControlRecord
from gateway.log.attempt_records import AttemptRecord, Decision, encode_attempt_record
from gateway.log.base import Assignment, Commit, Consumer, Log, Partition, TopicSpec
from gateway.log.records import encode_delivery, encode_event, event_key
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import NO_METADATA, Attempt, Delivery, Event, RecordMetadata, Result, delivery_id, event_id
from tests.builders import an_attempt, an_event

DAY = 86400.0


class Silent:
    """A member that only commits; `mine` is what it may commit."""

    def __init__(self) -> None:
        self.mine: set[Partition] = set()

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:  # noqa: ARG002 - the contract's
        self.mine.update(assignment.partition for assignment in assignments)

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:  # noqa: ARG002 - the contract's
        return {}

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        pass

    def restarted(self, assignment: Assignment) -> None:
        pass


class Company:
    """The log of a gateway with the sources github and stripe, and what is written to it."""

    def __init__(self, log: Log, topics: Topics, router: Consumer, member: Silent) -> None:
        self.log = log
        self.topics = topics
        self.router = router
        self._member = member
        self._sent = 0

    @classmethod
    async def found(cls, log: Log, *, prefix: str = "gateway.", ordered: Collection[tuple[str, str]] = ()) -> Self:
        topics = Topics(prefix)
        events = [topics.events("github"), topics.events("stripe")]
        attempts = TopicSpec(name=f"{prefix}attempts", partitions=4, retention=7 * DAY)
        await log.create([*topics.specs(events, ordered), attempts])
        tiers = [topics.retry("5s"), topics.retry("5h")]
        member = Silent()
        router = await log.consume(group=topics.group(ROUTER_GROUP), topics=[*events, *tiers], listener=member)
        return cls(log, topics, router, member)

    async def wait_until_readable(self) -> None:
        """Wait until all topics have leaders: those of Kafka have none just after they were created."""
        for topic in await self.log.topics():
            while topic.startswith(self.topics.prefix) and (await self.log.readable(topic))[1]:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        await self.router.close()

    async def event(self, **fields: Any) -> tuple[Event, Partition, int]:
        """Append an event with an id of its own, unless one is given; return it, and where it is."""
        self._sent += 1
        source = fields.get("source", "github")
        given: dict[str, Any] = {
            "received_at": round(self.log.now(), 6),
            "id": event_id(source, f"delivery {self._sent}"),
        } | fields
        event = an_event(**given)
        return await self.store(event)

    async def store(self, event: Event) -> tuple[Event, Partition, int]:
        topic = self.topics.events(event.source)
        found = await self.log.append(topic, key=event_key(event), value=event.body, headers=encode_event(event))
        return event, Partition(topic, found.partition), found.offset

    async def carry(
        self,
        topic: str,
        event: Event,
        *,
        route: str = "build",
        destination: str = "ci",
        attempts: tuple[Attempt, ...] = (),
        successor: int = 1,
        replayed_at: float = 0.0,
        due: float = 0.0,
        metadata: RecordMetadata = NO_METADATA,
    ) -> tuple[Delivery, Partition, int]:
        """Append a delivery's record; return it, and where it is."""
        delivery = Delivery(
            id=delivery_id(event.id, route, destination),
            event=event,
            route=route,
            destination=destination,
            attempts=attempts,
            successor=successor,
            due=due,
            replayed_at=replayed_at,
        )
        headers = encode_delivery(delivery, metadata, at=self.log.now())
        found = await self.log.append(topic, key=destination.encode(), value=event.body, headers=headers)
        return delivery, Partition(topic, found.partition), found.offset

    async def retry(self, event: Event, tier: str = "5s", **fields: Any) -> tuple[Delivery, Partition, int]:
        given = {"attempts": (an_attempt(status=503),)} | fields
        return await self.carry(self.topics.retry(tier), event, **given)

    async def park(self, event: Event, name: str = "destination/ci", **fields: Any) -> tuple[Delivery, Partition, int]:
        metadata = RecordMetadata(paused_name=name, spill_reason="paused")
        return await self.carry(self.topics.parked, event, metadata=metadata, **fields)

    async def die(self, event: Event, **fields: Any) -> tuple[Delivery, Partition, int]:
        given = {"attempts": (an_attempt(status=400, result=Result.CLIENT_ERROR),)} | fields
        metadata = RecordMetadata(dead_reason="exhausted", detail="400: no")
        return await self.carry(self.topics.dead, event, metadata=metadata, **given)

    async def attempt(
        self, event: Event, *, route: str = "build", destination: str = "ci", number: int = 1, **fields: Any
    ) -> AttemptRecord:
        """Append an attempt's record: delivered, unless something else is given."""
        given: dict[str, Any] = {"result": Result.SUCCESS, "status": 200, "decision": Decision.DELIVERED} | fields
        record = AttemptRecord(
            event_id=event.id,
            delivery_id=delivery_id(event.id, route, destination),
            source=event.source,
            type=event.type,
            route=route,
            destination=destination,
            received_at=event.received_at,
            number=number,
            at=self.log.now(),
            seconds=0.01,
            method="POST",
            host="ci.example",
            **given,
        )
        await self.log.append(f"{self.topics.prefix}attempts", **encode_attempt_record(record)._asdict())
        return record

    async def commit(self, partition: Partition, base: int, done: bytes = b"") -> None:
        while partition not in self._member.mine:
            await self.router.fetch(timeout=0.05)
        await self.router.commit({partition: Commit(base, done)})

    async def command(self, record: ControlRecord) -> None:
        key, value = record.encode()
        await self.log.append(self.topics.control, key=key, value=value, headers=[], partition=0)

    async def end_of(self, topic: str) -> dict[str, int]:
        """Return where a topic's partitions end, as commands have it."""
        return {f"{topic}/{number}": end for number, (_, end) in (await self.log.bounds(topic)).items()}


def repeated(event: Event, **fields: Any) -> Event:
    """Return an event with the same id, as its sender sends it again."""
    return replace(event, **fields)
