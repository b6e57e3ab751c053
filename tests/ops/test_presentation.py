"""Tables for people: each cell under its own title."""

from collections.abc import Sequence
from contextlib import aclosing

import pytest

from gateway.engine.control.records import DeadFilter
from gateway.engine.control.state import Control
from gateway.log.base import TopicSpec
from gateway.log.records import encode_delivery, encode_event
from gateway.model import RecordMetadata
from gateway.ops.api_answers import event_of
from gateway.ops.dead_letter_presentation import group_row, letter_row
from gateway.ops.dead_letters import DeadLetter, Groups, listed, read_dead_letters
from gateway.ops.index_presentation import indexed_fields, print_indexed
from gateway.ops.log_search import newest_first
from gateway.ops.output import Output, when
from gateway.ops.presentation import event_row, print_rows, topic_row
from tests.builders import NOW, a_delivery, an_attempt, an_event
from tests.engine.test_worker import EVENTS, TOPICS
from tests.memory_log import MemoryLog


async def _letters() -> Sequence[DeadLetter]:
    """Return a dead letter that can be read, and one that can't."""
    log = MemoryLog(now=lambda: NOW)
    await log.create(TOPICS.specs([]))
    delivery = a_delivery(attempts=(an_attempt(2, status=410),))
    headers = encode_delivery(delivery, RecordMetadata(dead_reason="gone"), at=NOW)
    await log.append(TOPICS.dead, key=b"", value=b"{}", headers=headers)
    await log.append(TOPICS.dead, key=b"", value=b"?", headers=[("gw_v", b"1"), ("gw_reason", b"undecodable")])
    async with aclosing(read_dead_letters(log, TOPICS, Control(), DeadFilter(), include_resolved=True)) as letters:
        found = [letter async for letter in letters]
    return sorted(found, key=lambda letter: letter.decoded is None)


async def test_each_cell_of_a_dead_letter_is_under_its_title_with_a_status_or_without() -> None:
    readable, unreadable = [letter_row(listed(letter), with_status=True) for letter in await _letters()]
    assert (readable["reason"], readable["attempts"], readable["last result"]) == ("gone", "2", "410")
    assert readable["when"] == when(NOW).replace(" ", "\n")
    assert readable["status"] == unreadable["status"] == "open"
    assert (unreadable["reason"], unreadable["attempts"], unreadable["last result"]) == ("undecodable", "", "")
    assert list(readable) == list(unreadable)
    for letter, cells in zip(await _letters(), (readable, unreadable), strict=True):
        assert {**letter_row(listed(letter), with_status=False), "status": "open"} == cells


async def test_each_cell_of_a_group_an_event_and_a_topic_is_under_its_title() -> None:
    groups = Groups()
    for letter in await _letters():
        groups.add(letter)
    group = next(group_row(each) for each in groups.largest_first() if each.route)
    assert (group["count"], group["reason"], group["last result"]) == ("1", "gone", "410")
    assert (group["route → destination"], group["oldest"]) == ("build → ci", when(NOW))

    log = MemoryLog(now=lambda: NOW)
    await log.create(TOPICS.specs([EVENTS]))
    event = an_event(key="k")
    await log.append(EVENTS, key=b"", value=event.body, headers=encode_event(event))
    async with aclosing(newest_first(log, [EVENTS], since=None)) as history:
        (found,) = [each async for each in history]
    readable, unreadable = event_row(found, event, ""), event_row(found, None, "gw_v: got 9")
    assert (readable["event"], readable["source"], readable["key"]) == (event.id, event.source, "k")
    assert (unreadable["event"], unreadable["source"]) == ("can't be read: gw_v: got 9", "")
    assert readable["bytes"] == unreadable["bytes"] == f"{len(event.body)}"
    assert list(readable) == list(unreadable)

    topic = topic_row(TopicSpec(name="gateway.dead", partitions=6, retention=2592000.0), "fine")
    assert topic == {"topic": "gateway.dead", "partitions": "6", "retention": "30 d", "": "fine"}


def test_of_an_event_with_many_deliveries_those_told_are_printed_and_how_many_more_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    at = "2026-12-01T12:00:00Z"
    told = {"id": "evt_1", "source": "github", "type": "push", "key": None, "size": 2, "position": None}
    its = {"route": "build", "destination": "ci", "status": "dead", "count": 2}
    answer = {**told, "received_at": at, "stored_at": at, "status": "dead", "deliveries": [its]}
    print_indexed(Output(json=False), [event_of({**answer, "deliveries_left_out": 1_234})])
    printed = capsys.readouterr().out
    assert "build → ci: dead (2)" in printed
    assert "and 1,234 more" in printed
    assert indexed_fields(event_of(answer))["deliveries_left_out"] == 0  # of a gateway that told all of them
    assert [each["status"] for each in indexed_fields(event_of(answer))["deliveries"]] == ["dead", "dead"]  # type: ignore[attr-defined] # a list


def test_rows_are_printed_under_their_titles_and_none_as_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(Output(json=False), [])
    assert capsys.readouterr().out == ""
    print_rows(Output(json=False), [{"reason": "gone", "attempts": "2"}, {"reason": "bug", "attempts": "11"}])
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert [line.split() for line in (title, *rows)] == [["reason", "attempts"], ["gone", "2"], ["bug", "11"]]
    assert title.index("attempts") + 6 == rows[0].index("2") - 1 == rows[1].index("11"), "numbers end where others do"
