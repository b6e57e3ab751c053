"""Attempts in the log: what is recorded, what is dropped and counted, and that no delivery notices either."""

import asyncio
import json
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from urllib.parse import quote

import pytest
import structlog
from typing_extensions import override

from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.client.http1 import ResponseReader
from gateway.client.masking import MASKS
from gateway.client.request import Outbound
from gateway.engine.delivery import attempt_log as module
from gateway.engine.delivery.attempt_log import FLUSH_TIMEOUT, MAX_BYTES, RETRY_DELAY, decision_of
from gateway.engine.delivery.retry_decision import Retry
from gateway.engine.worker import Worker
from gateway.log.attempt_records import AttemptRecord, Decision, decode_attempt_record
from gateway.log.base import NewRecord, Partition, Position, TopicSpec, partition_of
from gateway.log.topics import ROUTER_GROUP
from gateway.model import Attempt, DeadLettered, DeadReason, Delivered, Dropped, LogUnavailableError, Result
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.rules import Destination, DestinationAccess, Egress, OAuth2
from gateway.rules.templates import Template
from gateway.settings import RecordedAttempts
from tests.builders import a_destination, a_policy, a_route, an_event
from tests.engine.test_ordered import an_ordered_route, keyed
from tests.engine.test_replay import a_replay, owning
from tests.engine.test_split import ROWS
from tests.engine.test_worker import (
    TOPICS,
    Answer,
    ScriptedClient,
    World,
    a_world,
    events,
    reload,
    rules_of,
    running,
    virtual,
)
from tests.memory_log import MemoryLog
from tests.sink import Answer as SinkAnswer
from tests.sink import Request, Sink
from tests.virtual_time import now

ATTEMPTS = TOPICS.attempts
ONCE = a_policy(max_attempts=1)
QUICK = a_policy(schedule=(1.0,), max_attempts=3)
"""Retried from memory: nothing is written but the dead letter."""


class Responding(ScriptedClient):
    """Shows whoever looks a response with a body, as the client does."""

    def __init__(self, scripts: Mapping[str, Sequence[Answer]], body: bytes = b"no") -> None:
        super().__init__(scripts)
        self.body = body
        self.observed = 0

    @override
    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt:
        attempt = await super().attempt(outbound, timeout=timeout, number=number)
        if outbound.observation is not None:
            self.observed += 1
            if attempt.status is not None:
                response = ResponseReader()
                response.feed(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (attempt.status, len(self.body)))
                response.feed(self.body)
                outbound.observation.on_send()
                outbound.observation.on_response(response)
        return attempt


class Hanging(MemoryLog):
    """A connection by which no attempt is ever stored, nor refused."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)

    @override
    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        if partition.topic == ATTEMPTS:
            await asyncio.Event().wait()
        return await super().append_in_order(partition, records)


def recorded(world: World) -> list[AttemptRecord]:
    """Return the records, oldest first."""
    found = [decode_attempt_record(record) for record in world.log.records(ATTEMPTS)]
    return sorted(found, key=lambda attempt: (attempt.at, attempt.number))


async def letters(world: World, count: int) -> None:
    """Wait for so many dead letters."""
    while len(world.dead()) < count:  # noqa: ASYNC110 - the log of a test has no event for it
        await asyncio.sleep(0.005)


def numbers(world: World) -> list[tuple[str, int, Decision | None]]:
    return [(each.event_id, each.number, each.decision) for each in recorded(world)]


def dropped(world: World) -> dict[str, int]:
    found = {labels[0]: int(counter.value) for labels, counter in world.metrics.attempt_records_dropped.items()}
    return {reason: count for reason, count in found.items() if count}


def counted(world: World) -> int:
    return int(world.metrics.attempt_records.value)


async def a_recording_world(
    *routes: object, attempts: RecordedAttempts = RecordedAttempts.FAILURES, body: bytes = b"no", **scripts: object
) -> World:
    world = await a_world(*routes, **scripts)  # type: ignore[arg-type] # what it takes
    world.client = Responding(world.client.scripts, body)
    world.attempts = attempts
    return world


# What is recorded.


@virtual
async def test_each_failure_is_recorded_with_what_followed() -> None:
    world = await a_recording_world(a_route(retry=QUICK), ci=[503, Result.TIMEOUT, 200])
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(10)
    first, second = recorded(world)
    assert (first.event_id, first.source, first.type) == ("evt_0", "github", "push")
    assert (first.route, first.destination, first.method, first.host) == ("build", "ci", "POST", "127.0.0.1")
    assert (first.number, first.result, first.status, first.decision) == (1, Result.SERVER_ERROR, 503, Decision.RETRY)
    assert (second.number, second.result, second.status, second.decision) == (2, Result.TIMEOUT, None, Decision.RETRY)
    assert [each.at for each in (first, second)] == [pytest.approx(at, abs=0.001) for at in world.client.at[:2]]
    assert first.response is not None
    assert (first.response.body, first.response.headers) == (b"no", ((b"Content-Length", b"2"),))
    assert second.response is None
    assert second.detail == "scripted"
    assert (counted(world), dropped(world)) == (2, {})


@virtual
async def test_with_all_successes_are_recorded_without_their_responses() -> None:
    world = await a_recording_world(a_route(retry=QUICK), attempts=RecordedAttempts.ALL, ci=[503, 200])
    await world.put(*events(2))
    async with running(world):
        await asyncio.sleep(10)
    found = Counter((each.result, each.decision, each.response is None) for each in recorded(world))
    assert found == {
        (Result.SERVER_ERROR, Decision.RETRY, False): 1,
        (Result.SUCCESS, Decision.DELIVERED, True): 2,
    }


@virtual
async def test_with_off_nothing_is_recorded_and_nothing_observed() -> None:
    world = await a_recording_world(a_route(retry=QUICK), attempts=RecordedAttempts.OFF, ci=[503, 200])
    await world.put(*events(2))
    async with running(world):
        await asyncio.sleep(10)
    assert isinstance(world.client, Responding)
    assert (recorded(world), world.client.observed, counted(world), dropped(world)) == ([], 0, 0, {})


@virtual
async def test_a_dead_letter_is_what_followed_the_last_attempt() -> None:
    world = await a_recording_world(a_route(retry=QUICK), ci=[503])
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(10)
    assert [each.decision for each in recorded(world)] == [Decision.RETRY, Decision.RETRY, Decision.DEAD_LETTER]
    assert [each.number for each in world.dead()[0].delivery.attempts] == [1, 2, 3]


def test_what_follows_a_verdict() -> None:
    letter = DeadLettered(reason=DeadReason.EXHAUSTED)
    assert decision_of(Delivered(), halts=True) is Decision.DELIVERED
    assert decision_of(Retry(due=1.0), halts=True) is Decision.RETRY
    assert decision_of(Dropped(), halts=True) is Decision.DROPPED
    assert decision_of(letter, halts=True) is Decision.HALTED
    assert decision_of(letter, halts=False) is Decision.DEAD_LETTER


@virtual
async def test_a_key_that_halts_is_what_followed_on_an_ordered_route() -> None:
    world = await a_recording_world(an_ordered_route(halts=True, retry=ONCE), ci=[503])
    await world.put(*keyed(1, 2))
    async with running(world):
        await asyncio.sleep(10)
    assert numbers(world) == [("k0.0", 1, Decision.HALTED)]


@virtual
async def test_the_attempts_of_an_ordered_route_are_recorded() -> None:
    world = await a_recording_world(an_ordered_route(retry=QUICK), attempts=RecordedAttempts.ALL, ci=[503, 200])
    await world.put(*keyed(1, 2))
    async with running(world):
        await asyncio.sleep(10)
    assert sorted(numbers(world)) == [
        ("k0.0", 1, Decision.RETRY),
        ("k0.0", 2, Decision.DELIVERED),
        ("k0.1", 1, Decision.DELIVERED),
    ]


@virtual
async def test_an_item_of_a_split_event_says_which_it_is() -> None:
    world = await a_recording_world(replace(a_route(retry=ONCE), split=ROWS), ci=[503])
    await world.put(an_event(id="evt_0", body={"rows": [1, 2, 3]}, received_at=now()))
    async with running(world):
        await asyncio.sleep(10)
    assert sorted(each.item for each in recorded(world) if each.item is not None) == [0, 1, 2]
    assert len({each.delivery_id for each in recorded(world)}) == 3


@virtual
async def test_a_replayed_delivery_is_told_from_the_first_one() -> None:
    world = await a_recording_world(a_route(retry=ONCE), ci=[404])
    async with owning(world) as control, running(world, world.worker(control)):
        await world.put(*events(1))
        await asyncio.sleep(60)
        await a_replay(world)
        await asyncio.sleep(60)
    first, second = recorded(world)
    assert first.delivery_id == second.delivery_id
    assert first.replayed_at == 0 < second.replayed_at


@virtual
async def test_the_rules_are_those_by_which_the_request_was_made() -> None:
    world = await a_recording_world(a_route(retry=ONCE), ci=[30.0])
    slow = replace(world.rules.destinations["ci"], timeout=2.0)
    world.rules = replace(world.rules, version="00000001", destinations={"ci": slow})
    await world.put(*events(1))
    async with running(world) as worker:
        await asyncio.sleep(1)
        await reload(world, worker, replace(rules_of(a_route("other", to=("audit",))), version="00000002"))
        await asyncio.sleep(10)
    assert [(each.rules, each.destination, each.result) for each in recorded(world)] == [
        ("00000001", "ci", Result.TIMEOUT)
    ]
    assert (counted(world), dropped(world)) == (1, {})


@virtual
async def test_after_a_rebalance_each_attempt_is_recorded_once_by_who_made_it() -> None:
    world = await a_recording_world(a_route(retry=QUICK), attempts=RecordedAttempts.ALL, ci=[0.5])
    await world.put(*events(40))
    async with running(world), running(world):
        for _ in range(4):
            await asyncio.sleep(0.3)
            await world.log.rebalance(TOPICS.group(ROUTER_GROUP))
        await asyncio.sleep(20)
    made = Counter((event, number) for _, event, number in world.client.made)
    assert Counter((each.event_id, each.number) for each in recorded(world)) == made
    assert (counted(world), dropped(world)) == (made.total(), {})


# What isn't.


@virtual
async def test_a_partition_without_a_leader_keeps_no_other_and_no_delivery_waiting() -> None:
    world = await a_recording_world(a_route(retry=ONCE), ci=[404])
    lost = Partition(ATTEMPTS, 1)
    world.log.lose_leader(lost)
    async with running(world):
        for each in events(200):
            await world.put(each)
            await asyncio.sleep(0.01)
        await asyncio.sleep(3)
        assert len(world.dead()) == 200
        there = {each.id for each in events(200) if partition_of(each.id.encode(), 4) != 1}
        assert {each.event_id for each in recorded(world)} == there
        assert dropped(world) == {"append_failed": 200 - len(there)}
        world.log.find_leader(lost)
        await asyncio.sleep(RETRY_DELAY)
        await world.put(*[an_event(id=f"later_{number}", received_at=now()) for number in range(20)])
        await asyncio.sleep(3)
    assert len([each for each in recorded(world) if each.event_id.startswith("later")]) == 20
    assert counted(world) + sum(dropped(world).values()) == 220


@virtual
async def test_without_the_topic_deliveries_go_on_and_with_it_attempts_are_recorded_again() -> None:
    world = await a_recording_world(a_route(retry=ONCE), ci=[404])
    world.log.delete(ATTEMPTS)
    with structlog.testing.capture_logs() as lines:
        world.logger = structlog.get_logger()
        async with running(world):
            await world.put(*events(10))
            await asyncio.sleep(3)
            assert len(world.dead()) == 10
            assert dropped(world) == {"append_failed": 10}
            await world.log.create([TopicSpec(name=ATTEMPTS, partitions=4, retention=None)])
            await asyncio.sleep(RETRY_DELAY)
            await world.put(an_event(id="later", received_at=now()))
            await asyncio.sleep(3)
    assert [each.event_id for each in recorded(world)] == ["later"]
    told = [line for line in lines if line["event"] == "attempt_records_dropped"]
    assert told == [
        {
            "event": "attempt_records_dropped",
            "log_level": "warning",
            "reason": "append_failed",
            "count": 10,
            "error": "gateway.attempts: no such topic",
        }
    ]


@virtual
async def test_a_topic_that_is_recreated_with_fewer_partitions_is_used() -> None:
    world = await a_recording_world(a_route(retry=ONCE), ci=[404])
    async with running(world):
        await world.put(*events(10))
        await asyncio.sleep(3)
        world.log.delete(ATTEMPTS)
        await world.log.create([TopicSpec(name=ATTEMPTS, partitions=1, retention=None)])
        await world.put(*[an_event(id=f"lost_{number}", received_at=now()) for number in range(40)])
        await asyncio.sleep(RETRY_DELAY + 1)
        await world.put(*[an_event(id=f"later_{number}", received_at=now()) for number in range(40)])
        await asyncio.sleep(RETRY_DELAY + 1)
    assert len([each for each in recorded(world) if each.event_id.startswith("later")]) == 40
    assert counted(world) + sum(dropped(world).values()) == 90


@virtual
async def test_while_the_log_takes_nothing_memory_is_bounded_and_deliveries_go_on() -> None:
    world = await a_recording_world(a_route(retry=ONCE), body=bytes(3000), ci=[404])
    world.log = Hanging(world.log)
    worker = world.worker()
    log = worker._attempt_log
    async with running(world, worker):
        for _ in range(30):
            await world.put(*[an_event(received_at=now(), id=f"e{now()}_{number}") for number in range(100)])
            await asyncio.sleep(1)
            assert log._bytes <= MAX_BYTES
        assert len(world.dead()) == 3000
        began = now()
    assert now() - began <= FLUSH_TIMEOUT + 0.5
    assert dropped(world).keys() == {"no_room", "stopped"}
    assert (counted(world), sum(dropped(world).values())) == (0, 3000)


@virtual
async def test_a_destination_leaves_room_for_the_attempts_of_others() -> None:
    routes = a_route(retry=ONCE), a_route("audit", sources=("crm",), to=("audit",), retry=ONCE)
    world = await a_recording_world(*routes, body=bytes(3000), ci=[404], audit=[404])
    world.rules = replace(world.rules, sources={**world.rules.sources, "crm": world.rules.sources["github"]})
    world.log = Hanging(world.log)
    worker = world.worker()
    log = worker._attempt_log
    async with running(world, worker):
        for round_ in range(40):
            await world.put(*[an_event(id=f"ci_{round_}_{number}", received_at=now()) for number in range(100)])
            await asyncio.sleep(1)
        assert MAX_BYTES // 2 - 16384 < log._bytes <= MAX_BYTES // 2
        before = dropped(world)["no_room"]
        await world.put(*[an_event(id=f"x_{number}", source="crm", received_at=now()) for number in range(50)])
        await asyncio.sleep(3)
        assert dropped(world)["no_room"] == before
        assert log._of_destination.keys() == {"ci", "audit"}


@virtual
async def test_a_stop_stores_what_is_in_memory() -> None:
    world = await a_recording_world(a_route(retry=ONCE), ci=[404])
    await world.put(*events(100))
    async with running(world):
        await letters(world, 100)
    assert (counted(world), dropped(world)) == (100, {})
    assert len(recorded(world)) == 100


@virtual
async def test_a_crash_loses_what_was_in_memory_and_nothing_else() -> None:
    world = await a_recording_world(a_route(retry=ONCE), ci=[404])
    await world.put(*events(100))
    task = asyncio.create_task(world.worker().run())
    await letters(world, 20)
    task.cancel()
    await asyncio.wait([task])
    world.log._state.members.clear()  # its session is over
    before = len(recorded(world))
    async with running(world):
        await asyncio.sleep(10)
    assert {one.delivery.event.id for one in world.dead()} == {each.id for each in events(100)}
    assert len(recorded(world)) >= before
    made = Counter((event, number) for _, event, number in world.client.made)
    assert not Counter((str(each.event_id), each.number) for each in recorded(world)) - made


@virtual
async def test_no_response_ends_a_delivery_that_is_recorded() -> None:
    world = await a_recording_world(a_route(retry=ONCE), ci=[404])
    failing, piece = pytest.MonkeyPatch(), b"a piece of the body"

    def broken(*_: object) -> None:
        raise KeyError(piece)

    failing.setattr(module, "excerpt_of", broken)
    await world.put(*events(3))
    try:
        with structlog.testing.capture_logs() as lines:
            world.logger = structlog.get_logger()
            async with running(world):
                await asyncio.sleep(3)
    finally:
        failing.undo()
    assert [one.metadata.dead_reason for one in world.dead()] == ["exhausted"] * 3
    assert (counted(world), dropped(world)) == (0, {"bug": 3})
    [told] = [line for line in lines if line["event"] == "attempt_records_dropped"]
    assert "in broken" in told["exception"]
    assert "a piece of the body" not in str(lines)


@virtual
async def test_an_append_that_fails_is_dropped_and_not_repeated() -> None:
    """Like everything that is appended: a failing log has more to do."""
    world = await a_recording_world(a_route(retry=ONCE), ci=[404])
    tried = Counter[int]()

    class Failing(Hanging):
        @override
        async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
            if partition.topic == ATTEMPTS:
                tried[partition.number] += 1
                raise LogUnavailableError("told to fail")
            return await super().append_in_order(partition, records)

    world.log = Failing(world.log)
    async with running(world):
        for number in range(120):
            await world.put(an_event(id=f"evt_{number}", received_at=now()))
            await asyncio.sleep(0.1)
        await asyncio.sleep(3)
    assert (counted(world), dropped(world)) == (0, {"append_failed": 120})
    assert all(count <= 12 / RETRY_DELAY + 2 for count in tried.values()), tried


@virtual
async def test_what_waits_behind_a_failed_append_is_dropped_with_it() -> None:
    """A log that fails takes its time for each append: what waits would take the memory of all meanwhile."""
    world = await a_recording_world(a_route(retry=ONCE), ci=[404])

    class Slow(Hanging):
        @override
        async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
            if partition.topic == ATTEMPTS:
                await asyncio.sleep(5)
                raise LogUnavailableError("no acknowledgement in time")
            return await super().append_in_order(partition, records)

    world.log = Slow(world.log)
    worker = world.worker()
    async with running(world, worker):
        for number in range(2000):
            await world.put(an_event(id=f"evt_{number}", received_at=now()))
            await asyncio.sleep(0.002)
        assert worker._attempt_log._bytes > 500_000
        await asyncio.sleep(2)
        assert worker._attempt_log._bytes == 0
        assert (counted(world), dropped(world)) == (0, {"append_failed": 2000})


@virtual
async def test_what_to_mask_is_remembered_for_a_bounded_number_of_pairs() -> None:
    names = [f"r{number}" for number in range(MASKS + 50)]
    world = await a_recording_world(*[a_route(name, retry=ONCE) for name in names], ci=[404])
    worker = world.worker()
    await world.put(*events(1))
    async with running(world, worker):
        await asyncio.sleep(60)
    assert len(recorded(world)) == len(names)
    assert len(worker._attempt_log._masks) <= MASKS


# With the client, on real sockets.


def echoing(request: Request) -> SinkAnswer:
    """Respond with all that was sent, in several forms, as pages for debugging do."""
    headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
    everything = f"{request.method} {request.target} {json.dumps(headers)} {request.body.decode()}"
    body = "\n".join([everything, quote(everything, safe=""), b64encode(everything.encode()).decode()])
    return SinkAnswer(
        status=500,
        headers=(
            ("X-Echo", headers.get("Authorization", headers.get("authorization", ""))),
            ("Set-Cookie", "id=theirs"),
        ),
        body=body.encode(),
    )


async def _echoed() -> tuple[World, list[str]]:
    token = "t0ken-of-oauth-0123456789"
    secrets = ["URL-S3CRET-T012345", "header-s3cret", "b0dy-s3cret", "an-api-k3y", token]
    async with (
        Sink(SinkAnswer(body=json.dumps({"access_token": token, "expires_in": 3600}).encode())) as endpoint,
        Sink(echoing, path="/services/URL-S3CRET-T012345") as sink,
    ):
        oauth2 = OAuth2(token_url=endpoint.url, client_id="gateway", client_secret="client-s3cret")
        destinations: list[Destination] = [
            a_destination(
                "plain",
                url=sink.url,
                headers=(("Authorization", "Bearer header-s3cret"), ("X-Api-Key", "an-api-k3y")),
                sign=(b"signing-s3cret-of-24-byt",),
            ),
            a_destination("oauth", url=sink.url, access=DestinationAccess(oauth2=oauth2)),
        ]
        request = RequestTemplate(body=Template({"key": "b0dy-s3cret", "n": "${{ body.n }}"}))
        world = await a_world(
            a_route("a", to=("plain",), retry=ONCE, request=request),
            a_route("b", to=("oauth",), retry=ONCE),
            destinations=destinations,
        )
        world.rules = replace(world.rules, secret_values=frozenset(["b0dy-s3cret"]))
        async with Client(EgressGuard(Egress())) as client:
            worker = Worker(
                log=world.log.another(),
                topics=TOPICS,
                rules=lambda: world.rules,
                client=client,
                control=world.control,
                metrics=world.metrics,
                logger=world.logger,
                attempts=RecordedAttempts.FAILURES,
            )
            await world.put(an_event(id="evt_0", body={"n": 1}, received_at=now()))
            async with running(world, worker), asyncio.timeout(10):
                await letters(world, 2)
    return world, secrets


def test_no_credential_that_a_destination_echoes_is_in_a_record() -> None:
    world, secrets = asyncio.run(_echoed())
    records = world.log.records(ATTEMPTS)
    found = {each.route: each for each in map(decode_attempt_record, records)}
    assert found.keys() == {"a", "b"}
    for record in records:
        stored = record.value + b"\n".join([value for _, value in record.headers])
        for secret in [*secrets, "signing-s3cret-of-24-byt", "client-s3cret"]:
            assert secret.encode() not in stored, secret
            assert b64encode(secret.encode())[2:-4] not in stored, secret
        assert b"***" in record.value
    for attempt in found.values():
        assert attempt.response is not None
        assert dict(attempt.response.headers)[b"Set-Cookie"] == b"***"
        assert attempt.phases.first_byte is not None
