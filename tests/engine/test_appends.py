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


class Sources:
    """Begin appends, of which each has a source of its own, and remember which are in flight."""

    def __init__(self) -> None:
        self.appends = Appends()
        self.in_flight: list[tuple[str, Append]] = []

    def put(self, key: str, count: int = 1) -> None:
        for _ in range(count):
            self._begin(key, object())

    def _begin(self, key: str, source: object) -> None:
        append = self.appends.begin("tier", key.encode(), SIZE, source=source, retry=lambda: self._begin(key, source))
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
    sources = Sources()
    sources.put("many", 100)
    assert (len(sources.of("many")), sources.appends.waiting) == (PART, 100 - PART)
    sources.put("one")
    assert len(sources.of("one")) == 1
    sources.end_all()


def test_without_memory_keys_take_turns() -> None:
    sources = Sources()
    sources.fill()
    sources.put("a", 3)
    sources.put("b", 3)
    for number in range(4):
        sources.end(f"other{number}")
    assert (len(sources.of("a")), len(sources.of("b"))) == (2, 2)
    sources.end_all()


def test_a_failing_append_gives_its_memory_to_others_once() -> None:
    sources = Sources()
    sources.fill()
    sources.put("a", 2)
    for _ in range(3):
        sources.appends.mark_failed(sources.of("other0")[0])
    assert len(sources.of("a")) == 1
    assert sources.appends.memory_bytes == (MAXIMUM + 1) * SIZE
    sources.end_all()


def test_while_an_append_fails_no_other_of_its_key_begins_before_one_is_stored() -> None:
    sources = Sources()
    sources.put("a", 3)
    sources.appends.mark_failed(sources.of("a")[0])
    sources.put("a", 5)
    sources.put("b")
    assert (len(sources.of("a")), len(sources.of("b"))) == (3, 1)
    sources.end("a", is_stored=False)
    assert len(sources.of("a")) == 2
    sources.end("a")
    assert len(sources.of("a")) == PART
    sources.end_all()


def test_appends_for_a_failing_key_begin_once_none_of_it_is_in_flight() -> None:
    sources = Sources()
    sources.put("a", 2)
    for append in sources.of("a"):
        sources.appends.mark_failed(append)
    sources.put("a", 2)
    sources.end("a", is_stored=False)
    assert sources.appends.waiting == 2
    sources.end("a", is_stored=False)
    assert (len(sources.of("a")), sources.appends.waiting) == (2, 0)
    sources.end_all()


def test_an_append_whose_source_may_belong_to_another_keeps_none_of_its_key_back() -> None:
    sources = Sources()
    sources.put("a", 1)
    (first,) = sources.of("a")
    sources.appends.mark_failed(first)
    sources.put("a", 1)
    sources.appends.suspend(first)
    assert len(sources.of("a")) == 2
    sources.appends.mark_failed(first)
    sources.put("a", 1)
    assert sources.appends.waiting == 1
    sources.end_all()


def test_failing_appends_take_only_their_share() -> None:
    sources = Sources()
    for number in range(SHARES + OVERFLOW_SHARES):
        sources.put(f"bad{number}", PART)
        for append in sources.of(f"bad{number}"):
            sources.appends.mark_failed(append)
    assert sources.appends.memory_bytes == (SHARES + OVERFLOW_SHARES) * PART * SIZE
    sources.put("good")
    assert not sources.of("good")
    sources.end("bad0")
    sources.appends.mark_failed(sources.of(f"bad{OVERFLOW_SHARES}")[0])
    assert sources.of("good"), "it moves to where there is room again"
    sources.end_all()


def test_a_source_that_is_looked_at_again_waits_only_once() -> None:
    sources = Sources()
    sources.put("a", PART)
    calls: list[str] = []
    assert sources.appends.begin("tier", b"a", SIZE, source="lost", retry=lambda: calls.append("lost")) is None
    sources.appends.retry_now("lost")
    sources.appends.retry_now("lost")
    assert (calls, sources.appends.waiting) == (["lost"], 0)
    sources.end_all()


def test_an_abandoned_append_never_begins() -> None:
    sources = Sources()
    sources.put("a", 2 * PART)
    sources.appends.abandon()
    sources.end_all()
