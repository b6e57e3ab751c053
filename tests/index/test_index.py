"""What the index says of events and deliveries: as the log has them, and no more than that."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gateway.engine.control.records import ControlRecord, DeadFilter
from gateway.index import segments
from gateway.index.index import Index, open_index
from gateway.index.notes import Note
from gateway.index.query import QueryError
from gateway.index.results import IndexedEvent
from gateway.index.statuses import Status
from gateway.log.attempt_records import Decision
from gateway.log.base import Commit, Partition, Record, TopicSpec
from gateway.log.records import (
    DEDUPE_ENTRY,
    dedupe_entries_key,
    encode_dedupe_entries,
    encode_event,
    event_key,
    fingerprint,
)
from gateway.model import Event, ForbiddenError, LogUnavailableError, Result, identity_of
from tests.builders import an_attempt, an_event
from tests.index.company import DAY, Company, repeated
from tests.index.conftest import Calendar
from tests.memory_log import MemoryLog


def deleted(path: Path) -> None:
    path.unlink()


async def found(index: Index, text: str = "") -> list[IndexedEvent]:
    """Return all events that match, page by page."""
    events: list[IndexedEvent] = []
    cursor = None
    while True:
        page = await index.search(text, limit=3, cursor=cursor)
        events += page.events
        if (cursor := page.cursor) is None:
            return events


async def ids(index: Index, text: str = "") -> set[str]:
    return {event.id for event in await found(index, text)}


async def status(index: Index, id: str) -> Status:  # noqa: A002 - what it is
    event = await index.event(id)
    assert event is not None
    return event.status


async def test_a_topic_that_the_rules_name_is_read_before_any_group_has_committed_there(
    company: Company, path: Path
) -> None:
    await company.log.create([TopicSpec(name="orders", partitions=1, retention=7 * DAY)])
    event = an_event(received_at=company.log.now())
    await company.log.append("orders", key=event_key(event), value=event.body, headers=encode_event(event))
    named = set[str]()
    async with open_index(path, company.log, company.topics, event_topics=lambda: named) as index:
        await index.refresh()
        assert await ids(index) == set()
        named |= {"orders", "not-there-yet"}
        await index.refresh()
        assert await ids(index) == {event.id}


async def test_events_are_found_in_each_log(any_company: Company, path: Path) -> None:
    company = any_company
    push, partition, offset = await company.event(type="push", key="acme/app", body={"customer": {"id": 42}})
    charge, *_ = await company.event(source="stripe", type="charge.failed", body={"text": "Card was declined"})
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index) == {push.id, charge.id}
        for text in ("source:github", "type:push", "key:ACME/app", "body.customer.id:42", "identity:'x' -type:y"):
            assert await ids(index, text) == ({push.id} if "identity" not in text else set())
        for text in ("declined", "type:charge.*", "-source:github", "DECLINED card", "source:stripe,other"):
            assert await ids(index, text) == {charge.id}
        assert await ids(index, "identity:'delivery 1'".replace("'", '"')) == {push.id}
        assert await ids(index, f"id:{charge.id},evt_x") == {charge.id}
        assert await ids(index, f"-id:{charge.id}") == {push.id}
        event = await index.event(push.id)
        assert event is not None
        assert (event.partition, event.offset, event.type, event.key) == (partition, offset, "push", "acme/app")
        assert await index.event(event.position) == event
        assert await index.content(event) == push
        assert event.status is Status.PENDING


async def test_what_is_stored_later_is_found_after_the_next_look(any_company: Company, path: Path) -> None:
    company = any_company
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await found(index) == []
        first, *_ = await company.event()
        await index.refresh()
        second, *_ = await company.event()
        await index.refresh()
        assert [event.id for event in await found(index)] == [second.id, first.id]


async def test_an_event_has_ended_once_its_commit_says_so(any_company: Company, path: Path) -> None:
    company = any_company
    event, partition, offset = await company.event()
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index, "status:pending") == {event.id}
        await company.commit(partition, offset + 1)
        await index.refresh()
        assert await status(index, event.id) is Status.DONE
        assert await ids(index, "status:pending") == set()
        assert await ids(index, "status:done") == {event.id}


async def test_a_delivery_is_followed_through_retries_to_its_end(any_company: Company, path: Path) -> None:
    company = any_company
    event, partition, offset = await company.event()
    async with open_index(path, company.log, company.topics) as index:
        _, tier, at = await company.retry(event)
        await company.commit(partition, offset + 1)
        await index.refresh()
        assert await ids(index, "status:retrying route:build destination:ci") == {event.id}
        assert await ids(index, "status:retrying route:other") == set()
        attempts = (an_attempt(1, status=503), an_attempt(2, status=500))
        await company.retry(event, "5h", attempts=attempts, successor=2)
        await company.commit(tier, at + 1)
        await index.refresh()
        [delivery] = await index.deliveries((await found(index))[0])
        assert (delivery.status, [each.status for each in delivery.attempts]) == (Status.RETRYING, [503, 500])
        await company.die(event, attempts=(*attempts, an_attempt(3, result=Result.TIMEOUT)), successor=3)
        await index.refresh()
        assert await ids(index, "status:dead") == {event.id}
        [delivery] = await index.deliveries((await found(index))[0])
        assert (delivery.status, delivery.reason, len(delivery.attempts)) == (Status.DEAD, "exhausted", 3)


async def test_a_retry_that_is_done_without_a_successor_has_ended(company: Company, path: Path) -> None:
    event, partition, offset = await company.event()
    _, tier, at = await company.retry(event)
    await company.commit(partition, offset + 1)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        await company.commit(tier, 0, bytes([1 << at]))
        await index.refresh()
        assert await status(index, event.id) is Status.DONE


async def test_a_recorded_success_is_a_delivery(any_company: Company, path: Path) -> None:
    company = any_company
    event, partition, offset = await company.event()
    await company.attempt(event)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index, "status:delivered route:build") == {event.id}
        assert await status(index, event.id) is Status.PENDING  # it may have another delivery
        await company.commit(partition, offset + 1)
        await index.refresh()
        assert await status(index, event.id) is Status.DELIVERED
        assert await ids(index, "-status:delivered") == set()
        [delivery] = await index.deliveries((await found(index))[0])
        [attempt] = delivery.attempts
        assert (attempt.decision, attempt.status, attempt.partition is not None) == ("delivered", 200, True)


async def test_a_failure_without_a_record_of_what_followed_ends_as_unrecorded(company: Company, path: Path) -> None:
    """Only failures are recorded: the attempt after it has succeeded, or was the last."""
    event, partition, offset = await company.event()
    await company.attempt(event, result=Result.SERVER_ERROR, status=503, decision=Decision.RETRY)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index, "status:retrying") == {event.id}
        await company.commit(partition, offset + 1)
        await index.refresh()
        assert await status(index, event.id) is Status.DONE


async def test_a_commit_comes_into_force_only_with_the_successors_before_it(company: Company, path: Path) -> None:
    event, partition, offset = await company.event()
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        dead = Partition(company.topics.dead, 0)
        company.log.lose_leader(dead)  # type: ignore[attr-defined] # the log in memory
        await company.commit(partition, offset + 1)
        done = await index.refresh()
        assert done.unreadable == {dead: "no leader"}
        assert await status(index, event.id) is Status.PENDING
        assert (await index.statistics()).unreadable == {dead: "no leader"}
        company.log.find_leader(dead)  # type: ignore[attr-defined] # as above
        await index.refresh()
        assert await status(index, event.id) is Status.DONE


async def test_a_parked_delivery_is_parked_until_it_is_resumed(company: Company, path: Path) -> None:
    event, partition, offset = await company.event()
    await company.park(event)
    await company.commit(partition, offset + 1)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index, "status:parked") == {event.id}
        checkpoint = ControlRecord(
            kind="checkpoint",
            name="pause/destination/ci",
            state="done",
            at=company.log.now(),
            checkpoint=await company.end_of(company.topics.parked),
        )
        await company.command(checkpoint)
        _, tier, at = await company.retry(event, successor=2)
        await index.refresh()
        assert await ids(index, "status:parked") == set()
        assert await ids(index, "status:retrying") == {event.id}
        await company.commit(tier, at + 1)
        await index.refresh()
        assert await status(index, event.id) is Status.DONE


@pytest.mark.parametrize(("action", "after"), [("drop", Status.DROPPED), ("replay", Status.DONE)])
async def test_a_dead_letter_is_dead_until_a_command_resolves_it(
    company: Company, path: Path, action: str, after: Status
) -> None:
    event, partition, offset = await company.event()
    other, *_ = await company.event()
    await company.die(event)
    await company.die(other, route="announce")
    await company.commit(partition, offset + 1)
    ends = await company.end_of(company.topics.dead)
    command = ControlRecord(
        kind="dead",
        name="1",
        state="done",
        at=company.log.now(),
        action=action,  # type: ignore[arg-type] # one of them
        filter=DeadFilter(route="build"),
        checkpoint=ends,
    )
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index, "status:dead") == {event.id, other.id}
        await company.command(command)
        await index.refresh()
        assert await ids(index, "status:dead") == {other.id}
        assert await ids(index, f"status:{after}") == {event.id}
    deleted(path)
    async with open_index(path, company.log, company.topics) as index:  # the command is read first
        await index.refresh()
        assert await ids(index, "status:dead") == {other.id}
        assert await ids(index, f"status:{after}") == {event.id}


async def test_a_replay_is_another_life_of_a_delivery(company: Company, path: Path) -> None:
    event, *_ = await company.event()
    await company.die(event)
    await company.retry(event, successor=4, replayed_at=company.log.now(), attempts=())
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        [indexed] = await found(index)
        its = await index.deliveries(indexed)
        assert [each.status for each in its] == [Status.DEAD, Status.PENDING]
        assert len({each.id for each in its}) == 1


async def test_an_ordered_delivery_is_pending_until_its_own_group_is_done(company: Company, path: Path) -> None:
    event, partition, offset = await company.event()
    topic = company.topics.ordered("ship", "warehouse")
    await company.carry(topic, event, route="ship", destination="warehouse", successor=0)
    await company.commit(partition, offset + 1)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index, "status:pending route:ship") == {event.id}
        assert await ids(index, "status:pending") == {event.id}


async def test_a_halted_delivery_that_a_kick_begins_again_is_one_until_its_own_group_is_done(
    company: Company, path: Path
) -> None:
    """A kick writes no record: the attempts after it are known by the time of the kick alone."""
    event, partition, offset = await company.event()
    topic = company.topics.ordered("ship", "warehouse")
    ship: dict[str, Any] = {"route": "ship", "destination": "warehouse"}
    _, own, at = await company.carry(topic, event, **ship, successor=0)
    await company.commit(partition, offset + 1)
    failed = {**ship, "result": Result.SERVER_ERROR, "status": 503}

    async def told() -> tuple[Status, list[int | None]]:
        """Return the status of the only delivery, and those of the responses to its attempts."""
        await index.refresh()
        [indexed] = await found(index)
        [delivery] = await index.deliveries(indexed)
        assert (delivery.status, delivery.partition) == (indexed.status, own)
        return delivery.status, [each.status for each in delivery.attempts]

    async with open_index(path, company.log, company.topics) as index:
        for number, decision in ((1, Decision.RETRY), (2, Decision.HALTED)):
            await company.attempt(event, number=number, decision=decision, **failed)
        assert await told() == (Status.RETRYING, [503, 503])
        first = company.log.now()
        await company.attempt(event, decision=Decision.HALTED, replayed_at=first, **(failed | {"status": 500}))
        assert await told() == (Status.RETRYING, [503, 503, 500])
        for number in (502, 504):  # in one round
            kick, again = company.log.now(), failed | {"status": number}
            await company.attempt(event, decision=Decision.HALTED, replayed_at=kick, **again)
        assert await told() == (Status.RETRYING, [503, 503, 500, 502, 504])
        # After a crash the record is read again as it was before the kicks, or before the last one.
        await company.attempt(event, number=2, decision=Decision.RETRY, replayed_at=first, **(failed | {"status": 501}))
        assert await told() == (Status.RETRYING, [503, 503, 500, 501, 502, 504])
        await company.log.seed(company.topics.ordered_group("ship", "warehouse"), {own: Commit(at + 1)})
        assert await told() == (Status.DONE, [503, 503, 500, 501, 502, 504])
    deleted(path)
    async with open_index(path, company.log, company.topics) as index:  # all of it in one round
        assert await told() == (Status.DONE, [503, 503, 500, 501, 502, 504])


async def test_a_halted_delivery_that_a_kick_begins_again_is_counted_once_whenever_it_is_read(
    company: Company, path: Path
) -> None:
    event, partition, offset = await company.event()
    ship: dict[str, Any] = {"route": "ship", "destination": "warehouse"}
    _, own, at = await company.carry(company.topics.ordered("ship", "warehouse"), event, **ship, successor=0)
    await company.commit(partition, offset + 1)
    failed = {**ship, "result": Result.SERVER_ERROR, "status": 503, "decision": Decision.HALTED}

    async def told() -> tuple[list[tuple[Status, int]], Sequence[Sequence[object]]]:
        await index.refresh()
        [indexed] = await found(index)
        with closing(sqlite3.connect(path)) as connection:
            counts = connection.execute(
                "SELECT status, letter, sum(count) FROM delivery_counts GROUP BY 1, 2"
            ).fetchall()
        its = await index.deliveries(indexed)
        return [(each.status, len(each.attempts)) for each in its], [each for each in counts if each[2]]

    async with open_index(path, company.log, company.topics) as index:
        await company.attempt(event, **failed)
        await told()
        kick = company.log.now()
        await company.attempt(event, replayed_at=kick, **failed)
        await told()
        await company.die(event, **ship, successor=1, replayed_at=kick)
        await company.log.seed(company.topics.ordered_group("ship", "warehouse"), {own: Commit(at + 1)})
        read_as_it_came = await told()
        assert read_as_it_came[0] == [(Status.DEAD, 2)]
        assert [each[:2] for each in read_as_it_came[1]] == [("dead", "exhausted")]
    deleted(path)
    async with open_index(path, company.log, company.topics) as index:
        assert await told() == read_as_it_came


async def test_a_dead_letter_outlives_its_event(company: Company, path: Path) -> None:
    event, partition, offset = await company.event(body={"order": 7})
    await company.die(event)
    company.log.delete_below(partition, offset + 1)  # type: ignore[attr-defined] # the log in memory
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        [indexed] = await found(index, "status:dead body.order:7")
        assert (indexed.id, indexed.position, indexed.status) == (event.id, "", Status.DEAD)


async def test_an_event_whose_partition_comes_back_isnt_told_twice(company: Company, path: Path) -> None:
    event, partition, offset = await company.event(key="k")
    await company.die(event)
    company.log.lose_leader(partition)  # type: ignore[attr-defined] # the log in memory
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        [indexed] = await found(index)
        assert indexed.partition is None
        company.log.find_leader(partition)  # type: ignore[attr-defined] # as above
        await index.refresh()
        [indexed] = await found(index)
        assert (indexed.partition, indexed.offset, indexed.status) == (partition, offset, Status.DEAD)


async def test_attempts_wait_for_events_that_cant_be_read(company: Company, path: Path) -> None:
    event, partition, _ = await company.event()
    await company.attempt(event)
    company.log.lose_leader(partition)  # type: ignore[attr-defined] # the log in memory
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        company.log.find_leader(partition)  # type: ignore[attr-defined] # as above
        await index.refresh()
        assert await ids(index, "status:delivered") == {event.id}


async def test_events_with_one_identity_have_their_own_deliveries(company: Company, path: Path) -> None:
    first, *_ = await company.event(received_at=company.log.now() - 10)
    again, *_ = await company.store(an_event(id=first.id, received_at=company.log.now(), body={"n": 2}))
    await company.die(again)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert [event.status for event in await index.events(first.id)] == [Status.DEAD, Status.PENDING]


async def test_what_cant_be_decoded_is_left_out_and_counted(company: Company, path: Path) -> None:
    event, *_ = await company.event()
    for topic in ("events.github", "retry.5s", "dead", "parked", "attempts", "dedupe", "control"):
        await company.log.append(f"gateway.{topic}", key=b"k/1", value=b"poison", headers=[])
        newer = [("gw_v", b"9")] if topic != "control" else []
        value = b'{"v":9}' if topic == "control" else b""
        await company.log.append(f"gateway.{topic}", key=b"pause/route/x", value=value, headers=newer)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index) == {event.id}
        assert (await index.statistics()).left_out == {"undecodable": 7, "newer": 7}


async def test_a_recreated_topic_is_read_from_its_beginning(company: Company, path: Path) -> None:
    old, *_ = await company.event()
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        await company.log.recreate(company.topics.events("github"))  # type: ignore[attr-defined] # the log in memory
        new, partition, offset = await company.event()
        await index.refresh()
        assert await ids(index) == {new.id}
        assert await ids(index, "source:github") == {new.id}
        assert await index.event(old.id) is None
        await company.commit(partition, offset + 1)
        await index.refresh()
        assert await status(index, new.id) is Status.DONE


async def test_a_recreated_topic_of_retries_leaves_unknown_what_was_in_it(company: Company, path: Path) -> None:
    event, partition, offset = await company.event()
    await company.retry(event)
    await company.commit(partition, offset + 1)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        await company.log.recreate(company.topics.retry("5s"))  # type: ignore[attr-defined] # the log in memory
        await index.refresh()
        assert await status(index, event.id) is Status.UNKNOWN


async def test_what_the_log_deletes_before_it_is_read_is_counted(company: Company, path: Path) -> None:
    first, partition, offset = await company.event(key="k")
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        for _ in range(3):
            await company.event(key="k")
        company.log.delete_below(partition, offset + 3)  # type: ignore[attr-defined] # the log in memory
        await index.refresh()
        assert (await index.statistics()).left_out == {"deleted": 2}
        assert await status(index, first.id) is Status.UNKNOWN  # nobody was known to be done with it
        assert len(await found(index)) == 2


async def test_a_topic_that_grows_is_read_as_a_whole(company: Company, path: Path) -> None:
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        specs = company.topics.specs([company.topics.events("github")])
        grown = next(spec for spec in specs if spec.name == company.topics.events("github"))
        company.log.grow(type(grown)(name=grown.name, partitions=20, retention=grown.retention))  # type: ignore[attr-defined] # the log in memory
        events = [(await company.event())[0] for _ in range(40)]
        await index.refresh()
        assert await ids(index) == {event.id for event in events}


async def test_a_log_that_isnt_available_is_told_and_waited_for(company: Company, path: Path) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise asyncio.CancelledError

    class Down(type(company.log)):  # type: ignore[misc] # whatever it is
        async def topics(self) -> set[str]:
            raise LogUnavailableError("the log is down")

    down = Down()
    async with open_index(path, down, company.topics, sleep=sleep) as index:
        with pytest.raises(asyncio.CancelledError):
            await index.run()
        assert slept == [5.0, 10.0]
        assert (await index.statistics()).problem == "the log is down"


async def test_a_cursor_goes_on_where_the_page_ended(company: Company, path: Path) -> None:
    events = [(await company.event(type=f"t{number % 2}"))[0] for number in range(20)]
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert [event.id for event in await found(index)] == [event.id for event in reversed(events)]
        assert [event.id for event in await found(index, "type:t1")] == [event.id for event in reversed(events[1::2])]


async def test_times_limit_a_search(company: Company, path: Path) -> None:
    event, *_ = await company.event()
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index, "since:1m") == {event.id}
        assert await ids(index, "until:1m") == set()
        assert await ids(index, "since:2000-01-01 until:2100-01-01") == {event.id}


async def test_a_query_or_a_limit_that_means_nothing_is_refused(company: Company, path: Path) -> None:
    async with open_index(path, company.log, company.topics) as index:
        with pytest.raises(QueryError, match="expected one of source"):
            await index.search("sorce:x")
        with pytest.raises(QueryError, match="limit: expected a number from 1 to 500, got 0"):
            await index.search("", limit=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"\\""', None),  # it isn't a query
        ("'; DROP TABLE deliveries", None),
        ("*", None),
        ("drop table deliveries", True),
        ('"\\" OR *"', True),
        ('body.x:"\'; DROP TABLE deliveries \\" OR * 😀"', True),
        ("😀", True),
        ('body.x:"a\\" OR \\"*"', False),
        ('body.x:"a"" OR *"', False),
        ('type:"a\\") OR (\\"*"', False),
        ("type:\"push' OR '1\"", False),
        ('"\0"', False),
        ("route:'", False),
    ],
)
async def test_hostile_text_is_only_text(company: Company, path: Path, text: str, *, expected: bool | None) -> None:
    event, *_ = await company.event(body={"x": "'; DROP TABLE deliveries \" OR * 😀"})
    other, *_ = await company.event(body={"x": "else"})
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        if expected is None:
            with pytest.raises(QueryError):
                await ids(index, text)
        else:
            assert await ids(index, text) == ({event.id} if expected else set())
        assert await ids(index) == {event.id, other.id}


async def let_through(company: Company, partition: Partition, event: Event, offset: int) -> None:
    """Store the dedupe entry of an event."""
    identity = identity_of(event.id)
    assert identity is not None
    row = DEDUPE_ENTRY.pack(identity, fingerprint(event), offset, round(company.log.now() * 1e6))
    headers = encode_dedupe_entries(event.source, 0)
    await company.log.append(company.topics.dedupe, key=dedupe_entries_key(partition), value=row, headers=headers)


async def test_a_duplicate_is_one_by_the_entry_of_its_original(any_company: Company, path: Path) -> None:
    company = any_company
    now = round(company.log.now(), 6)
    original, partition, offset = await company.event(key="k")
    repeat, _, last = await company.store(repeated(original, received_at=now + 1))
    changed, *_ = await company.store(repeated(original, received_at=now + 2, body=b'{"other":1}'))
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index, "status:duplicate") == set()
        await let_through(company, partition, original, offset)
        await let_through(company, partition, changed, last + 1)
        await company.commit(partition, last + 2)
        await index.refresh()
        found = await index.events(original.id)
        assert [(each.received_at, each.status) for each in found] == [
            (changed.received_at, Status.DONE),
            (repeat.received_at, Status.DUPLICATE),
            (original.received_at, Status.DONE),
        ]
        assert len((await index.search("status:duplicate")).events) == 1
        await company.die(repeat)  # it was delivered all the same, by rules without dedupe
        await index.refresh()
        assert await ids(index, "status:duplicate") == set()


async def test_an_event_with_an_entry_of_its_own_is_no_duplicate(company: Company, path: Path) -> None:
    """It came after the window of its original."""
    original, partition, offset = await company.event(key="k")
    repeat, _, last = await company.store(repeated(original, received_at=round(company.log.now(), 6)))
    for event, at in ((original, offset), (repeat, last)):
        await let_through(company, partition, event, at)
    await company.commit(partition, last + 1)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert {event.status for event in await index.events(original.id)} == {Status.DONE}


async def test_an_event_whose_original_has_no_entry_is_no_duplicate(company: Company, path: Path) -> None:
    """Dedupe was off when both came, and is on since."""
    original, partition, _ = await company.event(key="k")
    await company.store(repeated(original, received_at=round(company.log.now(), 6)))
    other, _, last = await company.event(key="k", id=original.id, body=b"another")
    await let_through(company, partition, other, last)
    await company.commit(partition, last + 1)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert {event.status for event in await index.events(original.id)} == {Status.DONE}


async def test_without_dedupe_an_event_is_no_duplicate(company: Company, path: Path) -> None:
    original, partition, _ = await company.event(key="k")
    _, _, last = await company.store(repeated(original, received_at=round(company.log.now(), 6)))
    await company.commit(partition, last + 1)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert {event.status for event in await index.events(original.id)} == {Status.DONE}


async def test_a_retry_that_the_log_may_have_deleted_before_it_was_done_is_unknown(path: Path) -> None:
    clock = Calendar()
    company = await Company.found(MemoryLog(now=clock))
    event, partition, offset = await company.event()
    _, tier, at = await company.retry(event)
    await company.commit(partition, offset + 1)
    async with open_index(path, company.log, company.topics, days=30) as index:
        await index.refresh()
        assert await status(index, event.id) is Status.RETRYING
        clock.now += 8 * 86400.0
        company.log.delete_below(tier, at + 1)  # type: ignore[attr-defined] # the log in memory
        await company.commit(tier, at + 1)
        await index.refresh()
        assert await status(index, event.id) is Status.UNKNOWN


async def test_a_retry_whose_record_is_deleted_as_it_is_done_has_ended(company: Company, path: Path) -> None:
    event, partition, offset = await company.event()
    _, tier, at = await company.retry(event)
    await company.commit(partition, offset + 1)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        await company.commit(tier, at + 1)
        company.log.delete_below(tier, at + 1)  # type: ignore[attr-defined] # the log in memory
        await index.refresh()
        assert await status(index, event.id) is Status.DONE


async def test_a_partition_that_fails_while_it_is_read_holds_up_no_other(company: Company, path: Path) -> None:
    events = [(await company.event(key=str(number)))[0] for number in range(20)]
    bad = Partition(company.topics.events("github"), 2)
    scan = company.log.scan

    async def failing(partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        if partition == bad:
            raise LogUnavailableError("its leader is gone")
        async for records in scan(partition, start, end):
            yield records

    async with open_index(path, company.log, company.topics) as index:
        company.log.scan = failing  # type: ignore[method-assign] # one broker fails
        done = await index.refresh()
        assert done.unreadable == {bad: "its leader is gone"}
        assert 0 < len(await found(index)) < 20
        company.log.scan = scan  # type: ignore[method-assign] # it is back
        await index.refresh()
        assert await ids(index) == {event.id for event in events}


async def test_bodies_of_all_kinds_are_indexed(company: Company, path: Path) -> None:
    rows = [{"id": number, "name": f"row {number}"} for number in range(25_000)]
    large, *_ = await company.event(body={"rows": rows})
    deep, *_ = await company.event(body=b'{"deep":' * 900 + b'"bottom"' + b"}" * 900)
    form, *_ = await company.event(body=b"a=one&b=two", headers={"Content-Type": "application/x-www-form-urlencoded"})
    xml, *_ = await company.event(body=b"<o><n>seven</n></o>", headers={"Content-Type": "application/xml"})
    binary, *_ = await company.event(body=bytes(range(256)) * 100)
    strange, *_ = await company.event(type="t\udc80", key="k\udcff", body=b'{"a":"\\u0000 x"}')
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await ids(index, "body.rows.id:7") == {large.id}
        assert [event.is_cut for event in await index.events(large.id)] == [True]
        assert await ids(index, "bottom") == {deep.id}
        assert await ids(index, "body.b:two") == {form.id}
        assert await ids(index, "seven") == {xml.id}
        assert await ids(index, "x") == {strange.id}
        assert binary.id in await ids(index)


async def test_it_follows_the_log_until_it_is_cancelled(company: Company, path: Path) -> None:
    slept: list[float] = []
    event, *_ = await company.event()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise asyncio.CancelledError
        if len(slept) == 2:
            await company.event()

    async with open_index(path, company.log, company.topics, sleep=sleep) as index:
        with pytest.raises(asyncio.CancelledError):
            await index.run()
        assert len(await found(index)) == 2
        assert slept == [1.0, 1.0, 1.0]
        statistics = await index.statistics()
        assert (statistics.events, statistics.lag, statistics.problem) == (2, 0, "")
        assert statistics.oldest == pytest.approx(event.received_at, abs=1.0)


async def test_a_topic_whose_commits_cant_be_asked_for_holds_up_no_other(company: Company, path: Path) -> None:
    event, partition, offset = await company.event()
    charge, other, at = await company.event(source="stripe")
    await company.commit(partition, offset + 1)
    await company.commit(other, at + 1)
    committed = company.log.committed

    async def failing(group: str, topic: str) -> Mapping[int, Commit]:
        if topic == partition.topic:
            raise ForbiddenError("the right to it is missing")
        return await committed(group, topic)

    async with open_index(path, company.log, company.topics) as index:
        company.log.committed = failing  # type: ignore[method-assign] # one group is forbidden
        await index.refresh()
        assert (await index.statistics()).unsettled == {partition.topic: "the right to it is missing"}
        assert await status(index, charge.id) is Status.DONE
        assert await status(index, event.id) is Status.UNKNOWN
        company.log.committed = committed  # type: ignore[method-assign] # it is allowed again
        await index.refresh()
        assert (await index.statistics()).unsettled == {}
        assert await status(index, event.id) is Status.DONE


async def test_terms_of_closed_segments_are_merged(
    company: Company, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_EVENTS", 50)
    async with open_index(path, company.log, company.topics) as index:
        for _ in range(12):
            for _ in range(10):
                await company.event()
            await index.refresh()
        writer = index._file.writer
        assert writer.execute("SELECT is_merged FROM segments ORDER BY start").fetchall() == [(1,), (1,), (0,)]
        assert writer.execute("SELECT count(DISTINCT segid) FROM terms_1_idx").fetchone() == (1,)
        assert len(await found(index, "source:github")) == 120


async def test_it_says_that_it_is_complete_only_once_searches_see_that(company: Company, path: Path) -> None:
    """Who has seen all up to then looks further from there, and would never see what is committed later."""
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        before, later = index.complete_to, company.log.now() + 60
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(index._writing, index._writer.note, Note.COMPLETE_TO, later)
        assert index.complete_to == before
        await loop.run_in_executor(index._writing, index._writer.commit, company.log.now())
        assert index.complete_to == later
