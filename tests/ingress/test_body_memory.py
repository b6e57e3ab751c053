"""Memory for bodies: what is bounded, who gives way, and what a source can't take from another."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from typing_extensions import override

from gateway.ingress.body import no_room
from gateway.ingress.body_memory import MIN_AGE, SMALL, BodyMemory, BodyReservation, Share

TOTAL = 64 * SMALL
LARGE = 4 * SMALL


class Body(BodyReservation):
    """One that keeps whether it was evicted."""

    def __init__(self, memory: BodyMemory, source: str = "a") -> None:
        super().__init__(memory.share(source))
        self.evictions = 0

    @override
    def evict(self) -> None:
        self.evictions += 1


def unverified(memory: BodyMemory, source: str, size: int, *, now: float = 0.0) -> Body:
    body = Body(memory, source)
    assert memory.grow(body, size, now=now)
    return body


def test_the_oldest_unverified_bodies_are_evicted_first() -> None:
    memory = BodyMemory(TOTAL)
    held_open = [unverified(memory, "a", SMALL) for _ in range(32)]
    assert memory.free == TOTAL // 2
    for number in range(8):
        unverified(memory, "a", SMALL)
        assert [body.evictions for body in held_open] == [1] * (number + 1) + [0] * (31 - number)
    assert not memory.grow(held_open[0], 1, now=9.0)  # it was evicted


def test_a_refusal_says_whether_slow_senders_or_slow_appends_fill_the_memory() -> None:
    memory = BodyMemory(TOTAL)
    assert all(memory.reserve(memory.share("a"), SMALL, now=0.0) for _ in range(20))
    held_open = [unverified(memory, "b", SMALL) for _ in range(24)]
    large = 21 * SMALL
    assert not memory.reserve(memory.share("b"), large, now=0.0)  # "b" has too many in progress
    assert (no_room(memory).status, no_room(memory).reason) == (503, "slow_bodies")
    assert not memory.reserve(memory.share("a"), large, now=0.0)  # the appends of "a" take its share
    assert (no_room(memory).status, no_room(memory).reason) == (503, "overloaded")
    for body in held_open:
        memory.close(body)
    assert not memory.reserve(memory.share("a"), large, now=0.0), "refused without any unverified body as well"
    assert no_room(memory).reason == "overloaded"


def test_a_growing_body_is_refused_when_memory_is_full() -> None:
    memory = BodyMemory(TOTAL)
    assert all(memory.reserve(memory.share("a"), SMALL, now=0.0) for _ in range(20))
    read = Body(memory, "b")
    assert not memory.grow(read, 33 * SMALL, now=0.0)  # more than the share of "b", whatever is unverified
    assert no_room(memory).reason == "overloaded"
    read = unverified(memory, "b", 20 * SMALL)
    other = Body(memory, "b")
    assert not memory.grow(other, 20 * SMALL, now=0.0)
    assert no_room(memory).reason == "slow_bodies"


def test_open_bodies_of_one_source_take_nothing_from_another() -> None:
    memory = BodyMemory(TOTAL)
    slow = unverified(memory, "b", LARGE)
    many = [unverified(memory, "a", SMALL) for _ in range(28)]
    many += [unverified(memory, "a", SMALL, now=5.0) for _ in range(100)]
    assert memory.grow(slow, LARGE, now=5.0)
    assert slow.evictions == 0
    assert sum(body.evictions for body in many) == 100 + 4


def test_verified_bodies_take_their_half_and_then_evict_the_oldest_unverified_ones() -> None:
    memory = BodyMemory(TOTAL)
    held_open = [unverified(memory, "a", SMALL) for _ in range(32)]
    assert all(memory.reserve(memory.share("b"), SMALL, now=1.0) for _ in range(32))
    assert (memory.free, sum(body.evictions for body in held_open)) == (0, 0)
    assert all(memory.reserve(memory.share("b"), SMALL, now=1.0) for _ in range(2))
    assert [body.evictions for body in held_open] == [1, 1] + [0] * 30
    for _ in range(34):
        memory.release(memory.share("b"), SMALL)
    assert memory.free == TOTAL - 30 * SMALL


def test_verified_bodies_stay_within_their_sources_share() -> None:
    memory = BodyMemory(TOTAL)
    taken = 0
    while memory.reserve(memory.share("a"), SMALL, now=0.0):
        taken += 1
    assert taken == 48
    assert memory.reserve(memory.share("b"), SMALL, now=0.0)


def test_a_large_body_has_others_of_its_source_give_way_only_after_a_while() -> None:
    memory = BodyMemory(TOTAL)
    first = [unverified(memory, "a", LARGE) for _ in range(8)]
    assert not memory.grow(Body(memory), LARGE, now=MIN_AGE / 2)
    assert memory.grow(Body(memory), SMALL, now=MIN_AGE / 2)  # a small one is soon done
    assert [body.evictions for body in first] == [1] + [0] * 7
    unverified(memory, "a", LARGE, now=MIN_AGE)
    assert [body.evictions for body in first] == [1, 1] + [0] * 6


def test_the_oldest_of_all_gives_way_to_nobody_when_it_asks_itself() -> None:
    memory = BodyMemory(TOTAL)
    oldest = unverified(memory, "a", LARGE)
    for _ in range(28):
        unverified(memory, "a", SMALL)
    assert not memory.grow(oldest, LARGE, now=9.0)
    assert (oldest.evictions, oldest.size) == (0, LARGE)


def test_a_body_waiting_for_its_append_is_not_evicted() -> None:
    memory = BodyMemory(TOTAL)
    while memory.reserve(memory.share("a"), SMALL, now=0.0):
        pass
    held_open = unverified(memory, "b", SMALL)
    assert all(memory.grow(Body(memory, "b"), SMALL, now=9.0) for _ in range(64))
    assert (memory.free, held_open.evictions) == (0, 1)


@pytest.mark.parametrize(("size", "share"), [(SMALL, 3 / 4), (LARGE, 1 / 2)])
def test_a_source_leaves_room_for_the_others_and_large_bodies_for_small_ones(size: int, share: float) -> None:
    memory = BodyMemory(TOTAL)
    count = 0
    while memory.reserve(memory.share("a"), size, now=0.0):
        count += 1
    assert count * size == TOTAL * share
    if size > SMALL:
        assert memory.reserve(memory.share("a"), SMALL, now=0.0)
    for _ in range(4):
        assert memory.reserve(memory.share("b"), SMALL, now=0.0)


def test_bodies_that_were_read_beside_each_other_have_no_more_than_their_sources_share() -> None:
    memory = BodyMemory(TOTAL)
    read = [unverified(memory, "a", SMALL) for _ in range(32)]
    while memory.reserve(memory.share("a"), SMALL, now=0.0) and memory.free:
        pass
    for body in read:
        memory.close(body)
    kept = sum(memory.reserve(memory.share("a"), SMALL, now=0.0) for _ in read)
    assert (32 + kept) * SMALL == TOTAL * 3 / 4


def test_an_empty_body_takes_nothing() -> None:
    memory = BodyMemory(TOTAL)
    memory.close(unverified(memory, "a", 0))
    assert memory.reserve(memory.share("a"), 0, now=0.0)
    memory.release(memory.share("a"), 0)
    assert memory.free == TOTAL


class Worlds(RuleBasedStateMachine):
    """Whatever bodies do, the memory adds up, is never exceeded, and is whole again when all are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = BodyMemory(TOTAL)
        self.bodies: list[Body] = []
        self.kept: list[tuple[Share, int]] = []
        self.now = 0.0

    @rule(source=st.sampled_from("abc"))
    def open(self, source: str) -> None:
        self.bodies.append(Body(self.memory, source))

    @precondition(lambda self: self.bodies)
    @rule(data=st.data(), more=st.sampled_from([0, 1, SMALL // 2, SMALL, LARGE]), seconds=st.sampled_from([0.0, 0.6]))
    def grow(self, data: st.DataObject, more: int, seconds: float) -> None:
        self.now += seconds
        body = data.draw(st.sampled_from(self.bodies))
        before = body.size
        assert self.memory.grow(body, more, now=self.now) == (body.size == before + more and not body.is_evicted)

    @rule(source=st.sampled_from("abc"), size=st.sampled_from([0, 1, SMALL, LARGE]))
    def reserve(self, source: str, size: int) -> None:
        free, share = self.memory.free, self.memory.share(source)
        if self.memory.reserve(share, size, now=self.now):
            self.kept.append((share, size))
        else:
            assert self.memory.free >= free

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.kept) - 1))
        self.memory.release(*self.kept.pop(which))

    @precondition(lambda self: self.bodies)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        body = data.draw(st.sampled_from(self.bodies))
        self.bodies.remove(body)
        self.memory.close(body)
        self.memory.close(body)

    @invariant()
    def it_adds_up(self) -> None:
        unverified, settled = sum(body.size for body in self.bodies), sum(size for _, size in self.kept)
        assert self.memory.free == TOTAL - unverified - settled >= 0
        assert all(body.evictions == body.is_evicted for body in self.bodies)
        assert not any(body.is_evicted and body.size for body in self.bodies)
        assert unverified <= TOTAL // 2
        assert set(self.memory._reading) == {body.share for body in self.bodies if body.size}
        for share in self.memory._shares.values():
            assert share.unverified_bytes == sum(body.size for body in share.unverified)
            assert share.verified_bytes == sum(size for owner, size in self.kept if owner is share)

    @override
    def teardown(self) -> None:
        for body in self.bodies:
            self.memory.close(body)
        for share, size in self.kept:
            self.memory.release(share, size)
        assert self.memory.free == TOTAL
        assert self.memory._reading == {}


Worlds.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=60, stateful_step_count=40)
TestWorlds = Worlds.TestCase
