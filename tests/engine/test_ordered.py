"""Ordered routes: one delivery of a key at a time, through retries, crashes, rebalances, commands; in virtual time."""

import asyncio
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from zlib import crc32

import pytest
import structlog
from typing_extensions import override

from gateway.client.request import Outbound
from gateway.engine.commit_progress import WINDOW
from gateway.engine.control.records import ControlRecord
from gateway.engine.group_member import REVOKE_GRACE
from gateway.log.base import Commit, Partition, Record
from gateway.log.records import order_key
from gateway.model import Attempt, Event, Result
from gateway.ops.control_client import ControlClient
from gateway.ops.ordered_backlog import ordered_backlog_of, ordered_outcome_of
from gateway.ops.own_status import keys_status
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.rules import Route
from gateway.rules.templates import Template
from tests.builders import a_destination, a_policy, a_route, an_event
from tests.engine.test_worker import (
    EVENTS,
    TOPICS,
    ScriptedClient,
    World,
    a_world,
    operated,
    publish,
    rules_of,
    running,
    virtual,
)
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

PATIENT = a_policy(schedule=(2.0, 4.0), max_attempts=20, max_age=3600.0)
PLACE = ("build", "ci")
ORDERED, GROUP = TOPICS.ordered(*PLACE), TOPICS.ordered_group(*PLACE)


def an_ordered_route(name: str = "build", *, halts: bool = False, **fields: object) -> Route:
    return a_route(name, is_ordered=True, halts=halts, **{"retry": PATIENT, **fields})  # type: ignore[arg-type] # a builder's


def keyed(keys: int, each: int) -> list[Event]:
    """Make events of several keys in turn, named by key and number."""
    return [
        an_event(id=f"k{key}.{number}", key=f"k{key}", received_at=now())
        for number in range(each)
        for key in range(keys)
    ]


def by_key(world: World, destination: str = "ci") -> dict[str, list[int]]:
    """Return the numbers that each key's events were tried in, one after another."""
    tried: dict[str, list[int]] = defaultdict(list)
    for name, event, _ in world.client.made:
        if name == destination:
            key, number = event.split(".")
            tried[key].append(int(number))
    return dict(tried)


def assert_in_order(tried: list[int], count: int) -> None:
    """A number may come again right after itself, and never after a later one."""
    assert set(tried) == set(range(count))
    assert all(later in (earlier, earlier + 1) for earlier, later in pairwise(tried)), tried


async def unfinished(world: World, place: tuple[str, str] = PLACE) -> int:
    """Count what the router hasn't done, and what an ordered route hasn't."""
    count = await world.unfinished()
    topic = TOPICS.ordered(*place)
    commits = await world.log.committed(TOPICS.ordered_group(*place), topic)
    for number, (_, end) in (await world.log.bounds(topic)).items():
        base, done, *_ = commits.get(number, Commit(0))
        count += end - base - int.from_bytes(done, "little").bit_count()
    return count


class Refusing(ScriptedClient):
    """Refuses one event, and takes all others."""

    def __init__(self, refused: str) -> None:
        super().__init__({})
        self.refused = refused

    @override
    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt:
        event = dict(outbound.headers)[b"gateway-event-id"].decode()
        self.scripts["ci"] = [503 if event == self.refused else 200]
        return await super().attempt(outbound, timeout=timeout, number=number)


def keys_of_one_partition(count: int) -> list[str]:
    partitions: dict[int, list[str]] = defaultdict(list)
    for key in map(str, range(1000)):
        partitions[crc32(order_key(an_event(key=key)).encode()) % 6].append(key)
    return partitions[0][:count]


@virtual
async def test_the_events_of_a_key_follow_each_other_and_keys_go_side_by_side() -> None:
    world = await a_world(an_ordered_route(), ci=[0.1])
    began = now()
    await world.put(*keyed(20, 10))
    async with running(world):
        await asyncio.sleep(5)
    assert by_key(world) == {f"k{key}": list(range(10)) for key in range(20)}
    assert world.client.at[-1] - began < 2, "one key at a time would take 20 s"
    assert await unfinished(world) == 0


@virtual
async def test_an_ordered_route_and_another_serve_the_same_events() -> None:
    world = await a_world(an_ordered_route(), a_route("audit", to=("audit",)))
    await world.put(*keyed(3, 4))
    async with running(world):
        await asyncio.sleep(5)
    assert sorted(world.client.made) == sorted(
        (name, f"k{key}.{number}", 1) for name in ("ci", "audit") for key in range(3) for number in range(4)
    )
    assert await world.unfinished() == 0
    assert world.metrics.unrouted.labels("github").value == 0
    counted = world.metrics.route_matches
    assert (counted.events["github"], set(counted.matched.values()), len(counted.matched)) == (12, {12}, 2)


@virtual
async def test_a_failing_delivery_holds_its_own_key_and_no_other() -> None:
    world = await a_world(an_ordered_route())
    world.client = client = Refusing("k0.0")
    blocked, free = keys_of_one_partition(2)
    await world.put(*[an_event(id=f"k0.{n}", key=blocked, received_at=now()) for n in range(5)])
    await world.put(*[an_event(id=f"free.{n}", key=free, received_at=now()) for n in range(5)])
    async with running(world):
        await asyncio.sleep(1)
        assert by_key(world) == {"k0": [0], "free": [0, 1, 2, 3, 4]}
        client.refused = ""
        await asyncio.sleep(20)
    assert by_key(world) == {"k0": [0, 0, 1, 2, 3, 4], "free": [0, 1, 2, 3, 4]}
    assert await unfinished(world) == 0
    assert world.log.records(TOPICS.retry("5s")) == [], "what waits for its order is written nowhere"


@virtual
async def test_an_exhausted_delivery_is_dead_lettered_and_its_key_continues() -> None:
    world = await a_world(an_ordered_route(retry=a_policy(schedule=(1.0,), max_attempts=2)), ci=[503, 503, 200])
    await world.put(*keyed(1, 3))
    async with running(world):
        await asyncio.sleep(10)
    assert by_key(world)["k0"] == [0, 0, 1, 2]
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["exhausted"]
    assert await unfinished(world) == 0


@virtual
async def test_a_halted_key_waits_for_a_kick_and_then_continues_in_order() -> None:
    world = await a_world(an_ordered_route(halts=True, retry=a_policy(schedule=(1.0,), max_attempts=2)), ci=[503])
    await world.put(*keyed(2, 3))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(100)
        assert by_key(world) == {"k0": [0, 0], "k1": [0, 0]}
        assert world.dead() == []
        halted = world.metrics.ordered_halted_keys.labels(*PLACE)
        assert halted.value == 2
        world.client.scripts["ci"] = [200]
        await publish(world, ControlRecord(kind="kick", name="route/build", state="requested", at=now()))
        await asyncio.sleep(5)
        assert by_key(world) == {"k0": [0, 0, 0, 1, 2], "k1": [0, 0, 0, 1, 2]}
        assert halted.value == 0
    assert await unfinished(world) == 0


async def _kick(world: World, name: str = "destination/ci", *, unwanted: int = 0) -> tuple[str, Counter[str]]:
    """Kick, and return what the command says of ordered routes, and how often each key was tried meanwhile.

    `unwanted` are those that waited and that their route doesn't match any more.
    """
    commands = ControlClient(world.log, TOPICS)
    made = len(world.client.made)
    before = await ordered_backlog_of(world.log, TOPICS, name)
    placed = await commands.kick(name)
    assert await commands.finished(placed, timeout=20) is not None
    outcome = await ordered_outcome_of(world.log, TOPICS, before, commands, placed)
    assert outcome.kick is not None
    told = (outcome.kick.tried or 0) + sum(outcome.kick.untried_by_reason.values())
    assert told == outcome.kick.count == outcome.waited - unwanted
    return str(outcome), Counter(event.split(".")[0] for _, event, _ in world.client.made[made:])


@virtual
async def test_a_kick_reports_ordered_attempts_responses_and_why_others_wait() -> None:
    policy = a_policy(schedule=(1.0,), max_attempts=1)
    world = await a_world(an_ordered_route(halts=True, retry=policy), ci=[404])
    await world.put(*keyed(5, 4))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(10)
        assert by_key(world) == {f"k{key}": [0] for key in range(5)}
        halted = {f"k{key}": 1 for key in range(5)}
        told = "; on ordered routes 5 tried now: 5 got 404 again; 15 wait (behind an earlier event of the key)"
        assert await _kick(world) == (told, halted)
        world.client.scripts["ci"] = [410]
        assert await _kick(world, "route/build") == (told.replace("404 again", "410"), halted)
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
        await asyncio.sleep(1)
        assert await _kick(world) == ("; on ordered routes 0 tried now, 20 wait (paused)", {})
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="active", at=now()))
        world.client.scripts["ci"] = [200]
        await asyncio.sleep(5)
        assert by_key(world) == {f"k{key}": [0, 0, 0, *range(4)] for key in range(5)}, "resumed"
    assert await unfinished(world) == 0


@virtual
async def test_a_kick_claims_no_delivery_of_what_its_route_does_not_match_any_more() -> None:
    """The condition had failed for the second event, and is mended while it waits for the first."""
    policy = a_policy(schedule=(600.0,), max_attempts=50, max_age=1e6)
    world = await a_world(an_ordered_route(when="body.n + 1 > 0", retry=policy), ci=[503, 200])
    values = [0, "x"]
    made = [an_event(id=f"k.{n}", key="k", body={"n": value}, received_at=now()) for n, value in enumerate(values)]
    await world.put(*made)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(5)
        world.rules = rules_of(an_ordered_route(when="body.n == 0", retry=policy))
        await asyncio.sleep(5)
        told, _ = await _kick(world, unwanted=1)
    assert by_key(world) == {"k": [0, 0]}
    assert told == "; on ordered routes 1 tried now, delivered"
    assert await unfinished(world) == 0


@virtual
async def test_a_kick_reports_ordered_deliveries() -> None:
    policy = a_policy(schedule=(1.0,), max_attempts=1)
    world = await a_world(an_ordered_route(halts=True, retry=policy), ci=[404])
    await world.put(*keyed(5, 4))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(10)
        world.client.scripts["ci"] = [200]
        told = "; on ordered routes 20 tried now, all delivered"
        assert await _kick(world) == (told, {f"k{key}": 4 for key in range(5)})
    assert await unfinished(world) == 0


@virtual
async def test_a_kick_reports_ordered_waits_for_a_destination_that_fails_again() -> None:
    patient = a_policy(schedule=(600.0,), max_attempts=50, max_age=1e6)
    world = await a_world(an_ordered_route(retry=patient), ci=[503])
    await world.put(*keyed(40, 2))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
        told, tried = await _kick(world)
    number, waiting = len(tried), 40 - len(tried)
    assert number < 40
    assert told.startswith(f"; on ordered routes {number} tried now: {number} got 503")
    assert told.endswith(f"; 40 wait (behind an earlier event of the key); {waiting} wait (breaker open)")


@virtual
async def test_ordered_attempts_are_not_reported_where_a_process_publishes_none() -> None:
    """It is of an older version, or nobody reads the partition."""
    world = await a_world(an_ordered_route(halts=True, retry=a_policy(schedule=(1.0,), max_attempts=1)), ci=[404])
    await world.put(*keyed(5, 4))
    async with running(world):
        await asyncio.sleep(10)
    commands = ControlClient(world.log, TOPICS)
    async with operated(world):
        before = await ordered_backlog_of(world.log, TOPICS, "route/build")
        placed = await commands.kick("route/build")
        assert await commands.finished(placed, timeout=20) is not None
        outcome = await ordered_outcome_of(world.log, TOPICS, before, commands, placed)
    assert str(outcome) == "; on ordered routes 20 waited, 20 of them still wait"
    assert outcome.as_json == {"waited": 20, "waiting": 20}


@virtual
async def test_the_outcome_of_a_moving_partition_is_unknown() -> None:
    world = await a_world(an_ordered_route(halts=True, retry=a_policy(schedule=(1.0,), max_attempts=1)), ci=[404])
    await world.put(*keyed(5, 4))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(10)
        world.client.scripts["ci"] = [5.0]
        await publish(world, ControlRecord(kind="kick", name="route/build", state="requested", at=now()))
        await asyncio.sleep(1)
        await world.log.rebalance(GROUP)
        await asyncio.sleep(30)
    assert not [key for key in map(_key_of, world.log.records(TOPICS.control)) if key.startswith("checkpoint/tried/")]


def _key_of(record: Record) -> str:
    return record.key.decode()


@virtual
async def test_a_key_that_halts_is_logged_with_its_event_and_so_is_its_end() -> None:
    world = await a_world(an_ordered_route(halts=True, retry=a_policy(schedule=(1.0,), max_attempts=1)), ci=[404, 200])
    first, second = keyed(1, 2)
    await world.put(first, second)
    with structlog.testing.capture_logs() as told:
        world.logger = structlog.get_logger()
        async with operated(world) as control, running(world, world.worker(control)) as worker:
            began = now()
            await asyncio.sleep(50)
            await world.log.rebalance(GROUP)
            await asyncio.sleep(50)
            [key] = worker.ordered_states[PLACE].blocked
            assert key.halted is not None
            assert (key.delivery.event.id, key.halted.reason) == (first.id, "exhausted")
            assert key.since == pytest.approx(began, abs=1.0)
            keys = keys_status([key])
            shown = keys["longest_halted"]
            assert (keys["halted"], shown["event_id"], shown["after"]) == (1, first.id, "404")
            assert shown["since"] == key.since
            await publish(world, ControlRecord(kind="kick", name="route/build", state="requested", at=now()))
            await asyncio.sleep(5)
            assert worker.ordered_states[PLACE].blocked == []
    [halted, released] = [line for line in told if line["event"].startswith("key_")]
    assert halted["event_id"] == released["event_id"] == first.id
    assert (halted["reason"], halted["detail"]) == (key.halted.reason, key.halted.detail)
    assert (released["event"], released["why"]) == ("key_released", "kick")
    assert 99 < released["seconds"] < 105


@virtual
async def test_a_blocked_key_is_blocked_since_its_first_attempt_whatever_is_kicked() -> None:
    policy = a_policy(schedule=(60.0,), max_attempts=2, max_age=3600.0)
    world = await a_world(an_ordered_route(halts=True, retry=policy), ci=[503])
    await world.put(*keyed(1, 2))
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await asyncio.sleep(1)
        [key] = worker.ordered_states[PLACE].blocked
        first = key.delivery.attempts[0].at
        kinds = []
        for _ in range(4):
            await publish(world, ControlRecord(kind="kick", name="route/build", state="requested", at=now()))
            await asyncio.sleep(10)
            [key] = worker.ordered_states[PLACE].blocked
            kinds.append(key.halted is not None)
            assert key.halted or key.since == first
        assert kinds == [True, False, True, False]
        await world.log.rebalance(GROUP)
        await asyncio.sleep(1)
        assert [each.since for each in worker.ordered_states[PLACE].blocked] == [first]
        world.client.scripts["ci"] = [200, 503]
        await publish(world, ControlRecord(kind="kick", name="route/build", state="requested", at=now()))
        await asyncio.sleep(10)
        [key] = worker.ordered_states[PLACE].blocked
        assert (key.delivery.event.id, key.since) == ("k0.1", key.delivery.attempts[0].at)


@virtual
async def test_a_halted_key_continues_once_the_rules_do_not_halt() -> None:
    policy = a_policy(schedule=(1.0,), max_attempts=1)
    world = await a_world(an_ordered_route(halts=True, retry=policy), ci=[503, 200])
    await world.put(*keyed(1, 2))
    async with running(world) as worker:
        await asyncio.sleep(10)
        world.rules = rules_of(an_ordered_route(retry=policy))
        worker.reload()
        await asyncio.sleep(10)
    assert by_key(world) == {"k0": [0, 1]}
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["exhausted"]


@virtual
async def test_a_paused_ordered_route_waits_in_the_log_and_keeps_order() -> None:
    world = await a_world(an_ordered_route())
    async with operated(world) as control:
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
        await asyncio.sleep(1)
        async with running(world, world.worker(control)):
            await world.put(*keyed(5, 5))
            await asyncio.sleep(60)
            assert world.client.made == []
            assert world.log.records(TOPICS.parked) == []
            await publish(world, ControlRecord(kind="pause", name="destination/ci", state="resuming", at=now()))
            await asyncio.sleep(10)
    assert by_key(world) == {f"k{key}": list(range(5)) for key in range(5)}


@virtual
async def test_a_crash_repeats_at_most_the_first_of_each_key() -> None:
    """A worker that is cancelled commits nothing more, as one that is killed."""
    world = await a_world(an_ordered_route(), ci=[0.05])
    await world.put(*keyed(10, 30))
    for _ in range(3):
        task = asyncio.create_task(world.worker().run())
        await asyncio.sleep(0.73)
        world.log.fail_commits()
        world.log.fail_appends()
        task.cancel()
        await asyncio.wait([task])
        world.log._state.members.clear()  # its session is over
        world.log.fail_commits(0)
        world.log.fail_appends(0)
    async with running(world):
        await asyncio.sleep(10)
    tried = by_key(world)
    for key in range(10):
        assert_in_order(tried[f"k{key}"], 30)
        assert len(tried[f"k{key}"]) <= 30 + 3
    assert await unfinished(world) == 0


@virtual
async def test_an_attempt_under_way_ends_before_its_partition_has_another_owner() -> None:
    world = await a_world(an_ordered_route(), ci=[1.5])
    await world.put(*keyed(12, 4))
    async with running(world):
        await asyncio.sleep(1)
        async with running(world):
            await asyncio.sleep(3.3)
        await asyncio.sleep(20)
    assert {key: len(tried) for key, tried in by_key(world).items()} == {f"k{key}": 4 for key in range(12)}
    for tried in by_key(world).values():
        assert_in_order(tried, 4)
    assert REVOKE_GRACE > 1.5


@virtual
async def test_a_delivery_that_hangs_is_cut_before_its_partition_has_another_owner() -> None:
    patient = a_destination("ci", url="http://127.0.0.1:1/ci", timeout=300.0)
    world = await a_world(an_ordered_route(), destinations=[patient], ci=[200.0, 0.01])
    await world.put(*keyed(1, 3))
    async with running(world):
        await asyncio.sleep(1)
        assert world.client.under_way == 1
        async with running(world):
            assert world.client.under_way <= 1
            await asyncio.sleep(60)
    assert_in_order(by_key(world)["k0"], 3)


@virtual
async def test_a_first_deliverys_attempts_survive_a_rebalance_that_returns_it() -> None:
    world = await a_world(an_ordered_route(retry=a_policy(schedule=(5.0,), max_attempts=3, max_age=600.0)), ci=[503])
    await world.put(*keyed(1, 1))
    async with running(world):
        for _ in range(4):
            await asyncio.sleep(2.0)
            await world.log.rebalance(GROUP)
        await asyncio.sleep(30)
    assert [number for _, _, number in world.client.made] == [1, 2, 3]
    assert [len(stored.delivery.attempts) for stored in world.dead()] == [3]


@virtual
async def test_the_state_of_a_head_delivery_is_not_that_of_another_event_with_its_identity() -> None:
    world = await a_world(an_ordered_route(retry=a_policy(schedule=(60.0,), max_attempts=3, max_age=600.0)), ci=[503])
    first = an_event(id="k0.0", key="k0", received_at=now())
    await world.put(first)
    async with running(world):
        await asyncio.sleep(2.0)
        for partition, (_, end) in (await world.log.bounds(ORDERED)).items():
            world.log.delete_below(Partition(ORDERED, partition), end)
        await world.log.rebalance(GROUP)
        await world.put(replace(first, body=b"another", received_at=now()))
        await asyncio.sleep(2.0)
    assert [number for _, _, number in world.client.made] == [1, 1]


@virtual
async def test_nothing_is_tried_while_commits_are_not_accepted() -> None:
    """A member that the group has evicted learns it from its commits; until then it must not overtake."""
    world = await a_world(an_ordered_route())
    world.log.fail_commits()
    async with running(world):
        await world.put(*keyed(2, 3))
        await asyncio.sleep(30)
        assert world.client.made == []
        world.log.fail_commits(0)
        await asyncio.sleep(5)
    assert by_key(world) == {"k0": [0, 1, 2], "k1": [0, 1, 2]}


@virtual
async def test_an_event_without_a_key_waits_for_nobody() -> None:
    world = await a_world(an_ordered_route(), ci=[0.5])
    await world.put(*[an_event(id=f"none.{number}", received_at=now()) for number in range(20)])
    async with running(world):
        await asyncio.sleep(2)
    assert len(world.client.made) == 20


@virtual
async def test_a_key_blocked_for_long_delays_no_other_until_the_window_is_full() -> None:
    world = await a_world(an_ordered_route())
    world.client = client = Refusing("bad.0")
    bad, *others = keys_of_one_partition(4)

    async def put(numbers: range) -> None:
        for n in numbers:
            await world.put(
                *[an_event(id=f"k{of}.{n}", key=key, received_at=now()) for of, key in enumerate(others)],
                an_event(id=f"bad.{n}", key=bad, received_at=now()),
            )

    await world.put(an_event(id="bad.0", key=bad, received_at=now()))
    async with running(world):
        await asyncio.sleep(1)
        await put(range(1, 100))
        await asyncio.sleep(20)
        everything = {f"k{of}": list(range(1, 100)) for of in range(3)}
        assert {**by_key(world), "bad": [0]} == {**everything, "bad": [0]}
        # All but ten offsets of the window are gaps, as a transaction's markers are.
        partition = Partition(ORDERED, 0)
        _, end = (await world.log.bounds(ORDERED))[0]
        world.log.skip_offsets(partition, WINDOW - end - 10)
        await put(range(100, 110))
        await asyncio.sleep(20)
        begun = sum(map(len, by_key(world).values())) - len(by_key(world)["bad"])
        assert 3 * 99 < begun <= 3 * 99 + 10, "what lies beyond the window has to wait"
        assert set(by_key(world)["bad"]) == {0}
        client.refused = ""
        await asyncio.sleep(40)
    for key, tried in by_key(world).items():
        assert_in_order([0, *tried] if key != "bad" else tried, 110)
    assert await unfinished(world) == 0


@virtual
async def test_a_blocked_key_with_more_than_a_window_of_unmatched_events_behind_it_stops_nothing() -> None:
    """What a route doesn't match isn't in its topic: the events' own window goes on, and the key's has room."""
    world = await a_world(an_ordered_route(match={"type": "push"}))
    world.client = client = Refusing("bad.0")
    bad, *others = keys_of_one_partition(3)

    async def put(of: int, number: int) -> None:
        await world.put(an_event(id=f"k{of}.{number}", key=others[of], received_at=now()))

    await world.put(an_event(id="bad.0", key=bad, received_at=now()), an_event(id="bad.1", key=bad, received_at=now()))
    async with running(world):
        await asyncio.sleep(5)
        for number in range(4):
            await put(0, number)
            # Half a window of events that no route matches, the others of its offsets left out for speed.
            for index in range(200):
                await world.put(an_event(id=f"none.{number}.{index}", key=bad, type="ping", received_at=now()))
            for partition in range(6):
                world.log.skip_offsets(Partition(EVENTS, partition), WINDOW // 2)
            await put(1, number)
            await asyncio.sleep(5)
            assert by_key(world)["k1"] == by_key(world)["k0"] == list(range(number + 1))
        assert set(by_key(world)["bad"]) == {0}
        for key in range(100):  # something comes after the last gap of each partition
            await world.put(an_event(id=f"none.{key}", key=str(key), type="ping", received_at=now()))
        await asyncio.sleep(5)
        assert await world.unfinished() == 0, "what is in the route's topic is done here"
        assert await unfinished(world) == 2
        ends = [end for _, end in (await world.log.bounds(ORDERED)).values()]
        assert sum(ends) == 10, "only what it matches"
        client.refused = ""
        await asyncio.sleep(60)
    assert_in_order(by_key(world)["bad"], 2)
    assert await unfinished(world) == 0


@virtual
async def test_other_keys_finished_events_behind_a_blocked_one_fill_no_more_than_a_window() -> None:
    """Up to the window all of them go on at once, and what lies beyond once the key does, in order."""
    world = await a_world(an_ordered_route())
    world.client = client = Refusing("bad.0")
    bad, *others = keys_of_one_partition(5)
    await world.put(an_event(id="bad.0", key=bad, received_at=now()))
    async with running(world) as worker:
        await asyncio.sleep(1)
        ((member, _),) = worker._ordered.values()
        tracker = member.trackers[Partition(ORDERED, 0)]
        tracker.progress.window = 200  # of 16,384 offsets
        for number in range(60):
            for of, key in enumerate(others):
                await world.put(an_event(id=f"k{of}.{number}", key=key, received_at=now()))
            await asyncio.sleep(0.1)
        await asyncio.sleep(10)
        begun = sum([len(tried) for key, tried in by_key(world).items() if key != "bad"])
        assert 199 <= begun < 240
        assert set(by_key(world)["bad"]) == {0}
        client.refused = ""
        await asyncio.sleep(30)
    for of in range(4):
        assert by_key(world)[f"k{of}"] == list(range(60))
    assert await unfinished(world) == 0


@virtual
async def test_ten_ordered_routes_read_and_append_what_each_matches_and_nothing_else() -> None:
    routes = [an_ordered_route(f"build{number}", match={"type": f"t{number}"}) for number in range(10)]
    world = await a_world(*routes)
    async with running(world):
        for number in range(100):
            kind = f"t{number % 11}"  # the last is for none of them
            await world.put(an_event(id=f"k.{number}", key="k", type=kind, received_at=now()))
        await asyncio.sleep(10)
    assert len(world.client.made) == 91
    appended = [len(world.log.records(TOPICS.ordered(route.name, "ci"))) for route in routes]
    assert appended == [10] + [9] * 9
    assert await world.unfinished() == 0


@virtual
async def test_a_failing_expression_dead_letters_in_its_turn() -> None:
    world = await a_world(an_ordered_route(when="body.n + 1 > 0"))
    values = [0, "x", 2]
    made = [an_event(id=f"k.{n}", key="k", body={"n": value}, received_at=now()) for n, value in enumerate(values)]
    await world.put(*made)
    async with running(world):
        await asyncio.sleep(5)
    assert by_key(world) == {"k": [0, 2]}
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["expression_error"]
    assert await unfinished(world) == 0


@virtual
async def test_what_a_halted_key_holds_is_its_routes_though_another_would_take_it_now() -> None:
    route = replace(an_ordered_route(when="body.n + 1 > 0", halts=True), catch_all=True)
    world = await a_world(route)
    await world.put(*[an_event(id=f"k.{n}", key="k", body={"n": n or "x"}, received_at=now()) for n in range(3)])
    async with running(world) as worker:
        await asyncio.sleep(5)
        assert by_key(world) == {}
        mended = replace(an_ordered_route(when="type(body.n) in [int, string]", halts=True), catch_all=True)
        world.rules = rules_of(a_route("takes-all", to=("audit",)), mended)
        worker.reload()
        await asyncio.sleep(10)
    assert by_key(world) == {"k": [0, 1, 2]}
    assert await unfinished(world) == 0


@pytest.mark.parametrize("condition", ["type(body.n) == int", "type(body.n) == int || body.n == 'x'"])
def test_keys_halted_by_a_condition_continue_once_it_can_be_evaluated(condition: str) -> None:
    run(halt_and_mend(condition))


async def halt_and_mend(condition: str) -> None:
    world = await a_world(an_ordered_route(when="body.n + 1 > 0", halts=True))
    values = [0, "x", "x", 3, "x", 5]
    for key in ("k", "l"):
        events = [
            an_event(id=f"{key}.{n}", key=key, body={"n": value}, received_at=now()) for n, value in enumerate(values)
        ]
        await world.put(*events)
    async with running(world) as worker:
        await asyncio.sleep(5)
        assert by_key(world) == {"k": [0], "l": [0]}
        assert world.metrics.ordered_halted_keys.labels("build", "ci").value == 2
        world.rules = rules_of(an_ordered_route(when=condition, halts=True))
        worker.reload()
        await asyncio.sleep(10)
        assert world.metrics.ordered_halted_keys.labels("build", "ci").value == 0
    taken = [n for n, value in enumerate(values) if "'x'" in condition or value != "x"]
    assert by_key(world) == {"k": taken, "l": taken}
    assert world.metrics.deliveries.labels("build", "ci", "dropped").value == 2 * (len(values) - len(taken))
    assert not world.dead()
    assert await unfinished(world) == 0


@virtual
async def test_a_key_halted_by_a_condition_stays_while_no_rules_know_its_source_or_route() -> None:
    route = an_ordered_route(when="body.n + 1 > 0", halts=True)
    world = await a_world(route)
    await world.put(an_event(id="k.0", key="k", body={"n": "x"}, received_at=now()))
    async with running(world) as worker:
        await asyncio.sleep(5)
        for rules in (replace(rules_of(route), sources={}), rules_of()):
            world.rules = rules
            worker.reload()
            await asyncio.sleep(10)
            assert await unfinished(world) == 1
        world.rules = rules_of(an_ordered_route(when="body.n == 'x'", halts=True))
        worker.reload()
        await asyncio.sleep(30)
    assert by_key(world) == {"k": [0]}
    assert await unfinished(world) == 0


@virtual
async def test_a_delivery_whose_dead_letter_waits_for_a_leader_is_not_retried_on_a_rebalance() -> None:
    world = await a_world(an_ordered_route(retry=a_policy(schedule=(1.0,), max_attempts=2, max_age=86400.0)), ci=[503])
    letters = [Partition(TOPICS.dead, number) for number in range(6)]
    for partition in letters:
        world.log.lose_leader(partition)
    await world.put(*keyed(1, 1))
    async with running(world):
        await asyncio.sleep(5)
        for _ in range(3):
            await world.log.rebalance(GROUP)
            await asyncio.sleep(5)
        assert len(world.client.made) == 2
        for partition in letters:
            world.log.find_leader(partition)
        await asyncio.sleep(60)
    assert len(world.client.made) == 2
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["exhausted"]
    assert await unfinished(world) == 0


@virtual
async def test_memory_is_bounded_where_a_destination_hangs() -> None:
    world = await a_world(an_ordered_route(), a_route("audit", to=("audit",)), ci=[Result.CONNECT])
    large = b"x" * 500_000
    await world.put(*[an_event(id=f"k{n}.0", key=f"k{n}", body=large, received_at=now()) for n in range(600)])
    async with running(world) as worker:
        await asyncio.sleep(30)
        ((member, _),) = worker._ordered.values()
        assert member._memory_bytes < (128 << 20) + 6 * (1 << 20) * 6
        assert not any(member.has_room_for(tracker) for tracker in member.trackers.values())
    assert len({event for name, event, _ in world.client.made if name == "audit"}) == 600


@virtual
async def test_a_template_that_cannot_be_rendered_ends_its_delivery_and_not_its_key() -> None:
    template = RequestTemplate(body=Template({"text": "${{ body.absent }}"}))
    world = await a_world(an_ordered_route(request=template))
    await world.put(*keyed(1, 2))
    async with running(world):
        await asyncio.sleep(5)
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["expression_error"] * 2
    assert await unfinished(world) == 0


@virtual
async def test_an_unreadable_record_is_one_dead_letter_however_many_groups_read_it() -> None:
    world = await a_world(a_route("audit", to=("audit",)), *[an_ordered_route(f"ordered-{n}") for n in range(3)])
    await world.log.append(EVENTS, key=b"k", value=b"{}", headers=[])
    async with running(world):
        await asyncio.sleep(5)
    assert len(world.log.records(TOPICS.dead)) == 1
    assert [await unfinished(world, (f"ordered-{n}", "ci")) for n in range(3)] == [0, 0, 0]


@virtual
async def test_each_of_several_kicks_reports_its_own_outcome() -> None:
    policy = a_policy(schedule=(1.0,), max_attempts=1)
    world = await a_world(an_ordered_route(halts=True, retry=policy), ci=[404])
    await world.put(*keyed(5, 4))

    async def kicked_after(seconds: float, name: str) -> str:
        await asyncio.sleep(seconds)
        told, _ = await _kick(world, name)
        return told

    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(10)
        names = ("destination/ci", "route/build")
        # At once, while the job of the first runs, and while what those came to is read.
        told = await asyncio.gather(
            *[kicked_after(seconds, name) for seconds in [n * 0.5 for n in range(12)] for name in names]
        )
    again = "; on ordered routes 5 tried now: 5 got 404 again; 15 wait (behind an earlier event of the key)"
    assert Counter(told) == {again: 24}


class BehindLog(MemoryLog):
    """A log whose clock is behind."""

    behind = 0.0

    @override
    def now(self) -> float:
        return now() - self.behind


@virtual
async def test_a_kick_of_a_route_is_obeyed_after_the_clock_was_set_back() -> None:
    world = await a_world(an_ordered_route(halts=True, retry=a_policy(max_attempts=1)), ci=[404, 404, 404, 200])
    world.log = log = BehindLog()
    await log.create(TOPICS.specs([EVENTS], world.rules.ordered))
    await world.put(*keyed(1, 2))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(5)
        await _kick(world, "destination/ci")
        assert by_key(world) == {"k0": [0, 0]}
    log.behind = 3600.0
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(5)
        assert by_key(world) == {"k0": [0, 0, 0]}, "a restart tries it once more"
        told, _ = await _kick(world, "route/build")
        assert told == "; on ordered routes 2 tried now, all delivered"
    assert by_key(world) == {"k0": [0, 0, 0, 0, 1]}
