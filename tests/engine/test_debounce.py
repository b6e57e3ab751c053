"""A route with `debounce`: of the events that follow one another the last one is delivered, whatever happens."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn

import pytest
import structlog

from gateway.engine.control.records import ControlRecord
from gateway.engine.ordered.quiet_periods import CATCH_UP
from gateway.log.base import FETCH_RECORDS, NewRecord, Partition, partition_of
from gateway.log.records import Origin, encode_delivery, encode_origin, order_key_of
from gateway.model import NO_METADATA, Delivery, Event, delivery_id
from gateway.rules.debounce import LONGEST_BURST, Debounce
from gateway.rules.expressions import Expression
from gateway.rules.rules import Route
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_ordered import unfinished
from tests.engine.test_replay import a_replay
from tests.engine.test_worker import (
    EVENTS,
    TOPICS,
    World,
    a_world,
    operated,
    publish,
    reload,
    rules_of,
    running,
    virtual,
)
from tests.run_seeds import drawn
from tests.virtual_time import now, run

QUIET = 10.0
PATIENT = a_policy(schedule=(2.0, 4.0), max_attempts=40, max_age=3600.0)
PLACE = ("build", "ci")


def debounced(quiet: float = QUIET, key: str = "body.site", **fields: object) -> Route:
    route = a_route(**{"retry": PATIENT, "is_ordered": True, **fields})  # type: ignore[arg-type] # a builder's
    return replace(route, debounce=Debounce(key=Expression(key), quiet=quiet))


def an_edit(number: int, site: str | None = "a") -> Event:
    body = {"number": number} if site is None else {"site": site, "number": number}
    return an_event(id=f"{site}.{number}", body=body, received_at=now())


def sent(world: World) -> list[str]:
    return [event for _, event, _ in world.client.made]


def superseded(world: World) -> float:
    return world.metrics.deliveries.labels(*PLACE, "superseded").value


async def edit(world: World, count: int, *, every: float = 1.0, site: str | None = "a", first: int = 0) -> None:
    for number in range(first, first + count):
        await world.put(an_edit(number, site))
        await asyncio.sleep(every)


@virtual
async def test_the_last_of_a_burst_is_delivered_once_it_is_quiet_and_the_others_are_superseded() -> None:
    world = await a_world(debounced())
    with structlog.testing.capture_logs() as lines:
        world.logger = structlog.get_logger()
        async with running(world):
            await edit(world, 40)
            assert sent(world) == []
            last = now() - 1.0
            await asyncio.sleep(QUIET + 2)
    assert sent(world) == ["a.39"]
    assert QUIET <= world.client.at[0] - last < QUIET + 1
    ends = [line for line in lines if line["event"] == "delivery_finished"]
    assert [(line["outcome"], line["event_id"], line.get("by")) for line in ends] == [
        *[("superseded", f"a.{number}", f"a.{number + 1}") for number in range(39)],
        ("delivered", "a.39", None),
    ]
    assert superseded(world) == 39
    assert world.metrics.deliveries_late.labels("build").value == 0, "what waits as it shall isn't late"
    assert await unfinished(world) == 0


@virtual
async def test_each_key_is_quiet_by_itself_and_what_has_none_goes_alone() -> None:
    world = await a_world(debounced())
    async with running(world):
        await asyncio.gather(edit(world, 5, site="a"), edit(world, 9, site="b"), edit(world, 3, site=None))
        await asyncio.sleep(QUIET + 2)
    assert sorted(sent(world)) == ["None.0", "None.1", "None.2", "a.4", "b.8"]
    assert superseded(world) == 4 + 8


@virtual
async def test_a_sender_supersedes_no_event_of_another_source() -> None:
    """Whatever it has as its key: that is up to it."""
    world = await a_world(debounced(sources=("github", "stripe")))
    known = world.rules.sources
    stripe = replace(known["github"], name="stripe", path="/in/stripe")
    world.rules = replace(world.rules, sources={**known, "stripe": stripe})
    async with running(world):
        for number in range(3):
            for source in ("github", "stripe"):
                event = an_event(source=source, id=f"{source}.{number}", body={"site": "a"}, received_at=now())
                await world.put(event)
            await asyncio.sleep(1)
        await asyncio.sleep(QUIET + 2)
    assert sorted(sent(world)) == ["github.2", "stripe.2"]


@virtual
async def test_events_that_are_far_enough_apart_are_all_delivered() -> None:
    world = await a_world(debounced())
    async with running(world):
        await edit(world, 3, every=QUIET + 0.5)
        await asyncio.sleep(QUIET)
    assert sent(world) == ["a.0", "a.1", "a.2"]


@virtual
async def test_a_key_that_is_never_quiet_is_delivered_after_ten_times_as_long() -> None:
    world = await a_world(debounced())
    async with running(world):
        await edit(world, 250, every=1.0)
        await asyncio.sleep(QUIET + 2)
    assert sent(world)[-1] == "a.249"
    assert len(sent(world)) == 3
    times = world.client.at
    assert all(
        LONGEST_BURST * QUIET <= later - earlier < LONGEST_BURST * QUIET + 3 for earlier, later in pairwise(times[:2])
    )


@virtual
async def test_what_was_attempted_is_never_superseded_and_what_waits_behind_it_is() -> None:
    """The destination is down for a while: the event whose quiet period is over arrives, and then the last one."""
    world = await a_world(debounced(), ci=[503] * 5 + [200])
    async with running(world):
        await edit(world, 1, every=QUIET + 1)
        assert sent(world) == ["a.0"]
        await edit(world, 8, first=1)
        await asyncio.sleep(60)
    assert list(dict.fromkeys(sent(world))) == ["a.0", "a.8"]
    assert world.dead() == []
    assert superseded(world) == 7
    assert await unfinished(world) == 0


@virtual
async def test_restarts_lose_no_last_event_and_repeat_nothing() -> None:
    world = await a_world(debounced())

    async def restarts() -> None:
        for pause in (0.3, 4.0, 2.0, 7.0, 1.0, 11.0, 3.0):
            async with running(world):
                await asyncio.sleep(pause)

    await asyncio.gather(restarts(), edit(world, 12, every=1.5), edit(world, 5, every=0.5, site="b"))
    async with running(world):
        await asyncio.sleep(QUIET + 2)
    assert sorted(sent(world)) == ["a.11", "b.4"]
    assert superseded(world) == 11 + 4, "each is told once: its end was committed with it"


async def crash(world: World, task: "asyncio.Task[None]") -> None:
    """End a worker so that it commits nothing more."""
    world.log.fail_commits()
    world.log.fail_appends()
    task.cancel()
    await asyncio.wait([task])
    world.log._state.members.clear()  # its session is over
    world.log.fail_commits(0)
    world.log.fail_appends(0)


@virtual
async def test_a_crash_delivers_at_most_one_more() -> None:
    world = await a_world(debounced())
    for _ in range(6):
        task = asyncio.create_task(world.worker().run())
        await edit(world, 3, first=len(world.log.records(EVENTS)))
        await crash(world, task)
    async with running(world):
        await asyncio.sleep(QUIET + 3)
    assert sent(world)[-1] == "a.17"
    assert len(sent(world)) <= 2
    assert await unfinished(world) == 0


def as_appended(event: Event, offset: int | None) -> NewRecord:
    """Return an event as a router appends it to the route's topic; without an offset, one that it had deferred."""
    name = delivery_id(event.id, *PLACE)
    burst = event.id.partition(".")[0]
    delivery = Delivery(id=name, event=event, route="build", destination="ci", successor=1, burst=burst)
    headers = encode_delivery(delivery, NO_METADATA, at=now())
    debounce = debounced().debounce
    if offset is not None and debounce is not None:
        headers.append(encode_origin(Origin(Partition(EVENTS, 0), offset, now(), debounce.by)))
    return NewRecord(order_key_of(delivery).encode(), event.body, headers)


@virtual
async def test_what_was_due_while_nobody_read_waits_for_what_follows_it_in_the_log() -> None:
    """The reader finds the second event of the burst a fetch later than the first."""
    world = await a_world(debounced())
    edits = [an_edit(0), *[an_edit(number, "b") for number in range(3 * FETCH_RECORDS)], an_edit(1)]
    records = [as_appended(each, offset) for offset, each in enumerate(edits)]
    await world.log.append_in_order(Partition(TOPICS.ordered(*PLACE), 0), records)
    await asyncio.sleep(60)
    began = now()
    async with running(world):
        await asyncio.sleep(CATCH_UP + 0.5)
    assert sorted(sent(world)) == ["a.1", f"b.{len(edits) - 3}"]
    assert began + CATCH_UP <= min(world.client.at)


@virtual
async def test_what_a_router_deferred_supersedes_nothing_since_its_key_may_be_by_another_expression() -> None:
    """As long as it doesn't know the source, for example."""
    world = await a_world(debounced())
    deferred, known = [an_edit(0), an_edit(1)], [an_edit(2), an_edit(3)]
    records = [*[as_appended(each, None) for each in deferred], *[as_appended(each, n) for n, each in enumerate(known)]]
    await world.log.append_in_order(Partition(TOPICS.ordered(*PLACE), 0), records)
    async with running(world):
        await asyncio.sleep(QUIET + 2)
    assert sorted(sent(world)) == ["a.0", "a.1", "a.3"]
    assert superseded(world) == 1


@virtual
async def test_an_older_event_that_comes_late_supersedes_nothing() -> None:
    """Between partitions of the events' topic, one router may be behind another."""
    world = await a_world(debounced())
    older = an_edit(0)
    await asyncio.sleep(5)
    newer = an_edit(1)
    async with running(world):
        await world.put(replace(newer, key="x"))
        await asyncio.sleep(1)
        await world.put(replace(older, key="y"))
        await asyncio.sleep(QUIET + 3)
    assert sent(world) == ["a.1"]
    assert superseded(world) == 1


async def kick(world: World, name: str) -> None:
    await publish(world, ControlRecord(kind="kick", name=name, state="requested", at=now()))
    await asyncio.sleep(4)


@virtual
async def test_a_kick_of_the_route_ends_the_quiet_period_and_one_of_the_destination_does_not() -> None:
    world = await a_world(debounced(quiet=60.0))
    async with operated(world) as control, running(world, world.worker(control)):
        await edit(world, 3)
        await kick(world, "destination/ci")
        assert sent(world) == []
        await kick(world, "route/build")
        assert sent(world) == ["a.2"]
        await edit(world, 2, first=3)
        await asyncio.sleep(50)
        assert sent(world) == ["a.2"], "the next one has a quiet period of its own"
        await asyncio.sleep(20)
        assert sent(world) == ["a.2", "a.4"]


@virtual
async def test_a_replay_delivers_each_event_whatever_it_was_superseded_by() -> None:
    world = await a_world(debounced())
    async with operated(world) as control, running(world, world.worker(control)):
        await edit(world, 4)
        await a_replay(world)
        await asyncio.sleep(QUIET - 2)
        assert sorted(sent(world)) == ["a.0", "a.1", "a.2", "a.3"]
        await asyncio.sleep(4)
        assert sorted(sent(world)) == ["a.0", "a.1", "a.2", "a.3", "a.3"]


@virtual
async def test_what_a_kick_has_tried_before_it_was_due_is_superseded_by_nothing() -> None:
    world = await a_world(debounced(quiet=60.0, retry=a_policy(schedule=(8.0,), max_attempts=9)), ci=[503, 200])
    async with operated(world) as control, running(world, world.worker(control)):
        await edit(world, 1)
        await kick(world, "route/build")
        assert sent(world) == ["a.0"]
        await edit(world, 2, first=1)
        await asyncio.sleep(70)
    assert sent(world) == ["a.0", "a.0", "a.2"]


@virtual
async def test_what_a_kick_has_released_is_superseded_by_nothing_though_it_is_paused() -> None:
    world = await a_world(debounced(quiet=60.0))
    async with operated(world) as control, running(world, world.worker(control)):
        pause = ControlRecord(kind="pause", name="route/build", state="paused", at=now())
        await publish(world, pause)
        await edit(world, 2)
        await kick(world, "route/build")
        await edit(world, 2, first=2)
        await publish(world, replace(pause, state="resuming", at=now()))
        await asyncio.sleep(5)
        assert sent(world) == ["a.1"], "as the operator has asked"
        await asyncio.sleep(60)
    assert sent(world) == ["a.1", "a.3"]


@virtual
async def test_a_pause_keeps_what_was_due_and_the_last_of_each_burst() -> None:
    world = await a_world(debounced())
    async with operated(world) as control, running(world, world.worker(control)):
        pause = ControlRecord(kind="pause", name="route/build", state="paused", at=now())
        await publish(world, pause)
        await edit(world, 5)
        await asyncio.sleep(QUIET + 5)
        await edit(world, 5, first=5)
        await asyncio.sleep(QUIET + 5)
        assert sent(world) == []
        await publish(world, replace(pause, state="resuming", at=now()))
        await asyncio.sleep(5)
    assert sent(world) == ["a.4", "a.9"]


@virtual
async def test_a_route_that_is_debounced_no_longer_delivers_what_waits_and_then_at_once() -> None:
    world = await a_world(debounced())
    async with running(world) as worker:
        await edit(world, 3)
        await reload(world, worker, rules_of(a_route(is_ordered=True, retry=PATIENT)))
        await asyncio.sleep(1)
        assert sent(world) == ["a.2"]
        await world.put(an_edit(3))
        await asyncio.sleep(1)
        assert sent(world) == ["a.2", "a.3"]


@virtual
async def test_a_reload_changes_how_long_keys_wait() -> None:
    world = await a_world(debounced(quiet=600.0))
    async with running(world) as worker:
        await edit(world, 3)
        await reload(world, worker, rules_of(debounced(quiet=10.0)))
        await asyncio.sleep(12)
        assert sent(world) == ["a.2"]
        await edit(world, 1, first=3)
        await reload(world, worker, rules_of(debounced(quiet=60.0)))
        await asyncio.sleep(50)
        assert sent(world) == ["a.2"]
        await asyncio.sleep(15)
        assert sent(world) == ["a.2", "a.3"]


@virtual
async def test_an_event_whose_condition_fails_is_a_dead_letter_and_supersedes_nothing() -> None:
    """The condition is evaluated again, once it is the event's turn: of the event as it came."""
    route = debounced(when="key == 'prod' && body.n > 3")
    world = await a_world(route)
    good, bad = ({"site": "a", "n": n} for n in (7, "x"))
    async with running(world):
        await world.put(an_event(id="good", key="prod", body=good, received_at=now()))
        await asyncio.sleep(1)
        await world.put(an_event(id="bad", key="prod", body=bad, received_at=now()))
        await asyncio.sleep(QUIET + 3)
    assert sent(world) == ["good"]
    assert [(each.delivery.event.id, each.metadata.dead_reason) for each in world.dead()] == [
        ("bad", "expression_error")
    ]


@virtual
async def test_an_attempt_of_a_recreated_topic_lets_the_next_burst_wait_and_be_superseded() -> None:
    world = await a_world(debounced(), ci=[2 * QUIET, 200])
    async with running(world):
        await edit(world, 1, every=QUIET + 1)
        assert world.client.under_way == 1
        await world.log.recreate(TOPICS.ordered(*PLACE))
        await edit(world, 5, first=1)
        await asyncio.sleep(3 * QUIET)
    assert sent(world) == ["a.0", "a.5"]
    assert superseded(world) == 4


@virtual
async def test_no_key_is_counted_as_quiet_once_the_rules_do_not_debounce_their_route() -> None:
    world = await a_world(debounced())
    worker = world.worker()
    async with running(world, worker):
        await edit(world, 3)
        assert world.metrics.ordered_quiet_keys.labels(*PLACE).value == 1
        await reload(world, worker, rules_of(replace(debounced(), debounce=None)))
        await asyncio.sleep(2)
        assert sent(world) == ["a.2"]
        assert world.metrics.ordered_quiet_keys.labels(*PLACE).value == 0


@virtual
async def test_another_key_loses_nothing_that_is_read_again() -> None:
    """By the former key the first event could not be appended; by the new one, the second is there already."""
    keys = [f"{number}" for number in range(200)]
    spread = {key: partition_of(f"github\0{key}".encode(), 6) for key in keys}
    there = [key for key in keys if spread[key] == 0]
    elsewhere = [key for key in keys if spread[key] == 1]
    first = an_event(id="one", key="same", body={"a": there[0], "b": elsewhere[0]}, received_at=now())
    second = an_event(id="two", key="same", body={"a": elsewhere[1], "b": elsewhere[2]}, received_at=now())
    world = await a_world(debounced(key="body.a"))
    world.log.lose_leader(Partition(TOPICS.ordered(*PLACE), 0))
    task = asyncio.create_task(world.worker().run())
    await world.put(first, second)
    await asyncio.sleep(2)
    assert len(world.log.records(TOPICS.ordered(*PLACE))) == 1, "the second is there, and waits"
    await crash(world, task)
    world.log.find_leader(Partition(TOPICS.ordered(*PLACE), 0))
    world.rules = rules_of(debounced(key="body.b"))
    async with running(world):
        await asyncio.sleep(QUIET + 3)
    assert set(sent(world)) == {"one", "two"}
    assert await unfinished(world) == 0


@virtual
async def test_a_route_that_becomes_debounced_loses_nothing() -> None:
    world = await a_world(a_route(retry=PATIENT), ci=[503, 503, 200])
    async with running(world) as worker:
        await edit(world, 2, every=0.1)
        await reload(world, worker, rules_of(debounced()))
        await edit(world, 3, first=2)
        await asyncio.sleep(QUIET + 10)
    assert sorted(set(sent(world))) == ["a.0", "a.1", "a.4"]


@virtual
async def test_what_a_route_had_before_it_was_debounced_supersedes_nothing() -> None:
    """It is in the order of its own key, whichever sites these events are of."""
    world = await a_world(a_route(is_ordered=True, retry=PATIENT), ci=[503, 200])
    task = asyncio.create_task(world.worker().run())
    for number, site in enumerate("aba"):
        await world.put(replace(an_edit(number, site), key="x"))
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    assert sent(world) == ["a.0"], "the others wait for it"
    await crash(world, task)
    world.rules = rules_of(debounced())
    async with running(world):
        await asyncio.sleep(QUIET / 2)
        assert sent(world) == ["a.0", "a.0", "b.1", "a.2"], "they wait for nothing"
        await asyncio.sleep(QUIET)
    assert len(sent(world)) == 4
    assert await unfinished(world) == 0


@virtual
async def test_what_comes_once_a_route_is_debounced_supersedes_nothing_that_it_had_before() -> None:
    """Both have the same text as their key, which is a site only since then."""
    world = await a_world(a_route(is_ordered=True, retry=PATIENT), ci=[503, 503, 200])
    worker = world.worker()
    task = asyncio.create_task(worker.run())
    for number in range(3):
        await world.put(replace(an_edit(number, "b"), key="a"))
    await asyncio.sleep(0.1)
    await reload(world, worker, rules_of(debounced()))
    await edit(world, 2, first=3)
    await crash(world, task)
    async with running(world):
        await asyncio.sleep(QUIET + 20)
    assert list(dict.fromkeys(sent(world))) == ["b.0", "b.1", "b.2", "a.4"]
    assert superseded(world) == 1


@virtual
async def test_what_has_the_same_text_as_its_key_by_another_expression_supersedes_nothing() -> None:
    world = await a_world(debounced(key="body.page"))
    async with running(world) as worker:
        for number in range(2):
            await world.put(an_event(id=f"page.{number}", body={"page": 7, "site": number}, received_at=now()))
        await asyncio.sleep(1)
        await reload(world, worker, rules_of(debounced(key="body.site")))
        for number in range(2):
            await world.put(an_event(id=f"site.{number}", body={"page": number, "site": 7}, received_at=now()))
        await asyncio.sleep(QUIET + 3)
    assert sent(world) == ["page.1", "site.1"]
    assert superseded(world) == 2


@virtual
async def test_events_of_one_identity_without_a_key_are_all_delivered_each_once_it_was_quiet() -> None:
    world = await a_world(debounced())
    began = now()
    async with running(world):
        for number in range(2):
            await world.put(an_event(id="same", body={"number": number}, received_at=now()))
            await asyncio.sleep(1)
        await asyncio.sleep(QUIET + 3)
    assert sent(world) == ["same", "same"]
    assert superseded(world) == 0
    assert [at - began for at in world.client.at] == [QUIET, QUIET + 1]


def test_keys_that_fill_the_memory_go_out_early_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.engine.worker.MAX_ORDERED_MEMORY", 1_000_000)
    monkeypatch.setattr("gateway.engine.worker.MIN_ORDERED_MEMORY", 1_000_000)
    lines: list[Mapping[str, Any]] = []

    async def scenario() -> None:
        world = await a_world(debounced(quiet=600.0))
        world.logger = structlog.wrap_logger(None, processors=[partial(note, lines)])
        worker = world.worker()
        async with running(world, worker):
            for first in range(0, 1000, 100):
                await world.put(*[an_edit(number, f"s{number}") for number in range(first, first + 100)])
                await asyncio.sleep(5)
            assert await unfinished(world) == 1000 - len(sent(world))
            assert 300 < len(sent(world)) < 900, "as many wait as there is room for"
            assert worker.ordered_states[PLACE].quiet_keys > 100
            early = {int(event.partition(".")[2]) for event in sent(world)}
            assert max(early) < 900, "the first ones go first"

    run(scenario())
    assert sum(line["count"] for line in lines if line["event"] == "quiet_periods_cut_short") > 0


def note(lines: list[Mapping[str, Any]], _: object, __: str, line: Mapping[str, Any]) -> NoReturn:
    lines.append(line)
    raise structlog.DropEvent


@virtual
async def test_status_and_metrics_tell_how_many_keys_wait_and_until_when() -> None:
    world = await a_world(debounced())
    worker = world.worker()
    async with running(world, worker):
        await edit(world, 3)
        began = now() - 1.0
        await world.put(an_edit(0, "b"))
        await asyncio.sleep(1)
        state = worker.ordered_states[PLACE]
        assert state.quiet_keys == 2
        assert state.quiet_until is not None
        assert began + QUIET < state.quiet_until < began + QUIET + 2
        assert world.metrics.ordered_quiet_keys.labels(*PLACE).value == 2
        await asyncio.sleep(QUIET + 2)
        assert (worker.ordered_states[PLACE].quiet_keys, worker.ordered_states[PLACE].quiet_until) == (0, None)
        assert world.metrics.ordered_quiet_keys.labels(*PLACE).value == 0


@virtual
async def test_a_clock_that_is_set_back_lets_nothing_wait_for_it() -> None:
    shift = 3600.0
    world = await a_world(debounced())
    world.log.now = lambda: now() + shift  # type: ignore[method-assign]
    async with running(world):
        await edit(world, 2)
        shift = 0.0
        await asyncio.sleep(QUIET)
    assert sent(world) == ["a.1"]


def last_ones(edits: Iterable[tuple[float, int]], quiet: float) -> list[int]:
    """Return the numbers of the events of a key after which it was quiet, by when they were appended.

    One that was received before the last one, and is appended after it, isn't the last.
    """
    found: list[int] = []
    last: tuple[float, int] | None = None
    for at, number in edits:
        if last is None or at >= last[0] + quiet:
            found.append(number)
            last = at, number
        elif number > last[1]:
            found[-1] = number
            last = at, number
    return found


@pytest.mark.rotated(share=1 / 2)
@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize("number", range(4))
def test_the_last_event_of_each_quiet_period_is_delivered_and_few_others(number: int, *, crashes: bool) -> None:
    """Random keys, gaps, restarts and failures, against what the log says."""
    chance = random.Random(f"{drawn()}/{number}/{crashes}")
    quiet = chance.choice((1.0, 3.0, 10.0))
    answers = [chance.choice((200, 200, 503)) for _ in range(300)] + [200]

    async def scenario() -> None:
        world = await a_world(debounced(quiet=quiet), ci=answers)
        ends = 0

        async def edits() -> None:
            for number in range(150):
                await world.put(an_edit(number, chance.choice("abc")))
                await asyncio.sleep(chance.choice((0.05, 0.3, quiet * 0.6, quiet * 1.5)))

        async def restarts() -> None:
            nonlocal ends
            while True:
                worker = world.worker()
                task = asyncio.create_task(worker.run())
                try:
                    await asyncio.sleep(chance.uniform(0.2, 6 * quiet))
                finally:
                    if crashes:
                        await crash(world, task)
                    else:
                        worker.stop()
                        await task
                ends += 1
                await asyncio.sleep(chance.choice((0.0, 0.0, quiet * 2)))

        task = asyncio.create_task(restarts())
        await edits()
        task.cancel()
        await asyncio.wait([task])
        world.client.scripts["ci"] = [200]
        async with running(world):
            await asyncio.sleep(20 * quiet + 300)  # the breaker's pause has doubled with each failure
        assert await unfinished(world) == 0
        appended = defaultdict[str, dict[int, float]](dict)
        for record in world.log.records(TOPICS.ordered(*PLACE)):
            site, _, number = dict(record.headers)["ce_id"].decode().partition(".")
            appended[site].setdefault(int(number), record.appended_at)
        wanted = {
            f"{site}.{each}"
            for site, times in appended.items()
            for each in last_ones([(at, number) for number, at in times.items()], quiet)
        }
        told = (quiet, drawn(), ends)
        assert set(sent(world)) >= wanted, told
        never_quiet = sum(
            (max(times.values()) - min(times.values())) // (LONGEST_BURST * quiet) for times in appended.values()
        )
        others = len(set(sent(world)) - wanted)
        assert others <= never_quiet + (len(appended) * ends if crashes else 0), told
        assert not superseded(world) + len(set(sent(world))) < 150, told

    run(scenario())
