"""Dead letters, and whether each is open or resolved."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from gateway.engine.control.records import ControlRecord, DeadFilter
from gateway.engine.control.state import Control
from gateway.log.records import encode_delivery, encode_event
from gateway.log.topics import Topics
from gateway.model import (
    RecordMetadata,
    UsageError,
)
from gateway.ops.dead_letters import DeadLetter, deliveries_of, find_dead_letters, read_dead_letters, result_of
from tests.builders import NOW, a_delivery, an_attempt, an_event
from tests.memory_log import MemoryLog

TOPICS = Topics()
EVERYTHING = DeadFilter()


class Dead:
    """A dead-letter topic with a clock that goes by one second a letter."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.log = MemoryLog(now=lambda: self.at)

    async def write(
        self, event: str, *, route: str = "build", destination: str = "ci", reason: str = "exhausted"
    ) -> str:
        self.at += 1
        delivery = a_delivery(
            event=an_event(id=event), route=route, destination=destination, attempts=(an_attempt(3, status=503),)
        )
        headers = encode_delivery(delivery, RecordMetadata(dead_reason=reason, detail="503 after 3 attempts"), at=NOW)
        await self.log.append(TOPICS.dead, key=destination.encode(), value=delivery.event.body, headers=headers)
        return delivery.id

    async def write_unreadable(self) -> None:
        self.at += 1
        headers = [*encode_event(an_event())[1:3], ("gw_undecodable", b"gw_v: expected 1, got 9")]
        await self.log.append(TOPICS.dead, key=b"k", value=b"\xff", headers=headers)

    async def read(
        self,
        *commands: ControlRecord,
        which: DeadFilter = EVERYTHING,
        include_resolved: bool = False,
    ) -> list[DeadLetter]:
        return [
            letter
            async for letter in read_dead_letters(
                self.log, TOPICS, Control(commands), which, include_resolved=include_resolved
            )
        ]

    async def done(self, which: DeadFilter, action: str = "replay") -> ControlRecord:
        ends = await self.log.bounds(TOPICS.dead)
        return ControlRecord(
            kind="dead",
            name="1",
            state="done",
            at=self.at,
            action="drop" if action == "drop" else "replay",
            filter=which,
            checkpoint={f"{TOPICS.dead}/{number}": end for number, (_, end) in ends.items()},
        )


@pytest.fixture
async def dead() -> Dead:
    dead = Dead()
    await dead.log.create(TOPICS.specs([]))
    return dead


def ids(letters: Sequence[DeadLetter]) -> list[str]:
    return [letter.decoded.delivery.event.id if letter.decoded else letter.problem for letter in letters]


async def test_the_newest_comes_first(dead: Dead) -> None:
    for event in ("a", "b", "c"):
        await dead.write(event, destination=event)
    assert ids(await dead.read()) == ["c", "b", "a"]


async def test_a_filter_narrows(dead: Dead) -> None:
    await dead.write("a", route="one", destination="x")
    await dead.write("b", route="one", destination="y", reason="gone")
    await dead.write("c", route="two", destination="x")
    assert ids(await dead.read(which=DeadFilter(route="one"))) == ["b", "a"]
    assert ids(await dead.read(which=DeadFilter(destination="x"))) == ["c", "a"]
    assert ids(await dead.read(which=DeadFilter(reason="gone"))) == ["b"]
    assert ids(await dead.read(which=DeadFilter(since=1002.0))) == ["c", "b"]
    assert ids(await dead.read(which=DeadFilter(until=1002.0))) == ["a"]


async def test_a_replayed_or_dropped_dead_letter_is_not_open(dead: Dead) -> None:
    await dead.write("a", route="one")
    await dead.write("b", route="two")
    replayed = await dead.done(DeadFilter(route="one"))
    await dead.write("c", route="one")
    assert ids(await dead.read(replayed)) == ["c", "b"]
    everything = await dead.read(replayed, include_resolved=True)
    assert [(*ids([letter]), letter.status) for letter in everything] == [
        ("c", "open"),
        ("b", "open"),
        ("a", "replayed"),
    ]


async def test_an_unfinished_command_resolves_nothing(dead: Dead) -> None:
    await dead.write("a")
    asked = (await dead.done(DeadFilter())).with_state("requested")
    assert ids(await dead.read(asked)) == ["a"]


async def test_an_unreadable_one_is_listed_and_only_a_drop_resolves_it(dead: Dead) -> None:
    await dead.write("a")
    await dead.write_unreadable()
    (unreadable,) = await dead.read(which=DeadFilter(reason="undecodable"))
    assert unreadable.problem == "gw_v: expected 1, got 9"
    replayed = await dead.done(DeadFilter())
    assert ids(await dead.read(replayed)) == ["gw_v: expected 1, got 9"]
    dropped = await dead.done(DeadFilter(), "drop")
    assert await dead.read(dropped) == []


async def test_one_is_found_by_delivery_by_event_and_by_offset(dead: Dead) -> None:
    first = await dead.write("a", destination="x")
    await dead.write("a", destination="y")
    await dead.write_unreadable()
    control = Control([await dead.done(DeadFilter(destination="x"))])
    (found,) = await find_dead_letters(dead.log, TOPICS, control, first)
    assert (found.properties.destination, found.status) == ("x", "replayed")
    assert {letter.properties.destination for letter in await find_dead_letters(dead.log, TOPICS, control, "a")} == {
        "x",
        "y",
    }
    assert await find_dead_letters(dead.log, TOPICS, control, found.position) == [found]
    assert await find_dead_letters(dead.log, TOPICS, control, "b") == []


async def test_names_become_the_open_deliveries(dead: Dead) -> None:
    first = await dead.write("a", destination="x")
    second = await dead.write("a", destination="y")
    third = await dead.write("b")
    found = await deliveries_of(dead.log, TOPICS, Control(), ["a", third])
    assert set(found) == {first, second, third}


async def test_a_name_without_an_open_one_is_refused(dead: Dead) -> None:
    await dead.write("a")
    control = Control([await dead.done(DeadFilter())])
    await dead.write("b")
    with pytest.raises(UsageError, match=r"^a: expected the id of an open dead letter, got none$"):
        await deliveries_of(dead.log, TOPICS, control, ["a", "b"])


async def test_an_unreadable_one_cannot_be_named_in_a_command(dead: Dead) -> None:
    await dead.write_unreadable()
    (letter,) = await dead.read()
    with pytest.raises(UsageError, match=r"expected a dead letter that can be read, got: gw_v"):
        await deliveries_of(dead.log, TOPICS, Control(), [letter.position])


@pytest.mark.parametrize(
    ("detail", "told"),
    [
        ("", "503"),
        ("503 Service Unavailable", "503 Service Unavailable"),
        ("5031 isn't a status", "503: 5031 isn't a status"),
        ("an HTTP/2 frame", "503: an HTTP/2 frame"),
    ],
)
def test_a_result_has_its_status_once(detail: str, told: str) -> None:
    assert result_of(replace(an_attempt(status=503), detail=detail)) == told
