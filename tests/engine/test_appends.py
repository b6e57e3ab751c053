"""Which appends begin and which wait: decided without a log."""

from collections.abc import Iterator

import pytest

from gateway.engine.delivery import appends
from gateway.engine.delivery.appends import OVERFLOW_SHARES, SHARES, Append, Appends

SIZE = 10
PART = 4  # appends
MAXIMUM = PART * SHARES


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appends, "MAX_BYTES_IN_APPENDS", MAXIMUM * SIZE)
        yield


class Predecessors:
    """Begin appends, of which each has a predecessor of its own, and remember which are in flight."""

    def __init__(self) -> None:
        self.appends = Appends()
        self.in_flight: list[tuple[str, Append]] = []

    def put(self, key: str, count: int = 1) -> None:
        for _ in range(count):
            self._begin(key, object())

    def _begin(self, key: str, predecessor: object) -> None:
        append = self.appends.begin(
            "tier", key.encode(), SIZE, predecessor=predecessor, when_granted=lambda: self._begin(key, predecessor)
        )
        if append is not None:
            self.in_flight.append((key, append))

    def of(self, key: str) -> list[Append]:
        return [append for name, append in self.in_flight if name == key]

    def end(self, key: str, *, is_stored: bool = True) -> None:
        first = next(index for index, (name, _) in enumerate(self.in_flight) if name == key)
        _, append = self.in_flight.pop(first)
        self.appends.finish(append, is_stored=is_stored)

    def fill(self) -> None:
        for number in range(SHARES):
            self.put(f"other{number}", PART)
        assert self.appends.memory_bytes == MAXIMUM * SIZE

    def end_all(self) -> None:
        while self.in_flight:
            self.end(self.in_flight[0][0])
        assert (self.appends.memory_bytes, self.appends.waiting, self.appends._channels) == (0, 0, {})


def test_a_key_takes_a_part_of_the_memory_and_the_others_begin() -> None:
    predecessors = Predecessors()
    predecessors.put("many", 100)
    assert (len(predecessors.of("many")), predecessors.appends.waiting) == (PART, 100 - PART)
    predecessors.put("one")
    assert len(predecessors.of("one")) == 1
    predecessors.end_all()


def test_without_memory_keys_take_turns() -> None:
    predecessors = Predecessors()
    predecessors.fill()
    predecessors.put("a", 3)
    predecessors.put("b", 3)
    for number in range(4):
        predecessors.end(f"other{number}")
    assert (len(predecessors.of("a")), len(predecessors.of("b"))) == (2, 2)
    predecessors.end_all()


def test_a_failing_append_gives_its_memory_to_others_once() -> None:
    predecessors = Predecessors()
    predecessors.fill()
    predecessors.put("a", 2)
    for _ in range(3):
        predecessors.appends.mark_failed(predecessors.of("other0")[0])
    assert len(predecessors.of("a")) == 1
    assert predecessors.appends.memory_bytes == (MAXIMUM + 1) * SIZE
    predecessors.end_all()


def test_while_an_append_fails_no_other_of_its_key_begins_before_one_is_stored() -> None:
    predecessors = Predecessors()
    predecessors.put("a", 3)
    predecessors.appends.mark_failed(predecessors.of("a")[0])
    predecessors.put("a", 5)
    predecessors.put("b")
    assert (len(predecessors.of("a")), len(predecessors.of("b"))) == (3, 1)
    predecessors.end("a", is_stored=False)
    assert len(predecessors.of("a")) == 2
    predecessors.end("a")
    assert len(predecessors.of("a")) == PART
    predecessors.end_all()


def test_appends_for_a_failing_key_begin_once_none_of_it_is_in_flight() -> None:
    predecessors = Predecessors()
    predecessors.put("a", 2)
    for append in predecessors.of("a"):
        predecessors.appends.mark_failed(append)
    predecessors.put("a", 2)
    predecessors.end("a", is_stored=False)
    assert predecessors.appends.waiting == 2
    predecessors.end("a", is_stored=False)
    assert (len(predecessors.of("a")), predecessors.appends.waiting) == (2, 0)
    predecessors.end_all()


def test_an_append_whose_predecessor_may_belong_to_another_keeps_none_of_its_key_back() -> None:
    predecessors = Predecessors()
    predecessors.put("a", 1)
    (first,) = predecessors.of("a")
    predecessors.appends.mark_failed(first)
    predecessors.put("a", 1)
    predecessors.appends.suspend(first)
    assert len(predecessors.of("a")) == 2
    predecessors.appends.mark_failed(first)
    predecessors.put("a", 1)
    assert predecessors.appends.waiting == 1
    predecessors.end_all()


def test_failing_appends_take_only_their_share() -> None:
    predecessors = Predecessors()
    for number in range(SHARES + OVERFLOW_SHARES):
        predecessors.put(f"bad{number}", PART)
        for append in predecessors.of(f"bad{number}"):
            predecessors.appends.mark_failed(append)
    assert predecessors.appends.memory_bytes == (SHARES + OVERFLOW_SHARES) * PART * SIZE
    predecessors.put("good")
    assert not predecessors.of("good")
    predecessors.end("bad0")
    predecessors.appends.mark_failed(predecessors.of(f"bad{OVERFLOW_SHARES}")[0])
    assert predecessors.of("good"), "it moves to where there is room again"
    predecessors.end_all()


def test_a_predecessor_that_is_looked_at_again_waits_only_once() -> None:
    predecessors = Predecessors()
    predecessors.put("a", PART)
    calls: list[str] = []
    assert (
        predecessors.appends.begin("tier", b"a", SIZE, predecessor="lost", when_granted=lambda: calls.append("lost"))
        is None
    )
    predecessors.appends.grant_waiting("lost")
    predecessors.appends.grant_waiting("lost")
    assert (calls, predecessors.appends.waiting) == (["lost"], 0)
    predecessors.end_all()


def test_an_abandoned_append_never_begins() -> None:
    predecessors = Predecessors()
    predecessors.put("a", 2 * PART)
    predecessors.appends.abandon()
    predecessors.end_all()
