"""Room for bodies: what is bounded, who gives way, and what a source can't take from another."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from typing_extensions import override

from gateway.ingress.room import PATIENCE, SMALL, Held, Room, Share

TOTAL = 64 * SMALL
LARGE = 4 * SMALL


class Body(Held):
    """One that keeps whether it was told to go."""

    def __init__(self, room: Room, source: str = "a") -> None:
        super().__init__(room.share(source))
        self.told = 0

    @override
    def give_up(self) -> None:
        self.told += 1


def loose(room: Room, source: str, size: int, *, now: float = 0.0) -> Body:
    body = Body(room, source)
    assert room.take(body, size, now=now)
    return body


def test_what_is_held_open_gives_way_to_what_comes_the_oldest_first() -> None:
    room = Room(TOTAL)
    held_open = [loose(room, "a", SMALL) for _ in range(32)]
    assert room.free == TOTAL // 2
    for number in range(8):
        loose(room, "a", SMALL)
        assert [body.told for body in held_open] == [1] * (number + 1) + [0] * (31 - number)
    assert not room.take(held_open[0], 1, now=9.0)  # it has been told


def test_who_holds_bodies_open_to_one_source_takes_nothing_from_another() -> None:
    room = Room(TOTAL)
    slow = loose(room, "b", LARGE)
    many = [loose(room, "a", SMALL) for _ in range(28)]
    many += [loose(room, "a", SMALL, now=5.0) for _ in range(100)]
    assert room.take(slow, LARGE, now=5.0)
    assert slow.told == 0
    assert sum(body.told for body in many) == 100 + 4


def test_what_came_whole_takes_the_half_that_is_not_for_what_is_held_open_and_then_has_the_oldest_give_way() -> None:
    room = Room(TOTAL)
    held_open = [loose(room, "a", SMALL) for _ in range(32)]
    assert all(room.keep(room.share("b"), SMALL, now=1.0) for _ in range(32))
    assert (room.free, sum(body.told for body in held_open)) == (0, 0)
    assert all(room.keep(room.share("b"), SMALL, now=1.0) for _ in range(2))
    assert [body.told for body in held_open] == [1, 1] + [0] * 30
    for _ in range(34):
        room.give_back(room.share("b"), SMALL)
    assert room.free == TOTAL - 30 * SMALL


def test_what_came_whole_has_no_more_than_its_sources_share() -> None:
    room = Room(TOTAL)
    taken = 0
    while room.keep(room.share("a"), SMALL, now=0.0):
        taken += 1
    assert taken == 48
    assert room.keep(room.share("b"), SMALL, now=0.0)


def test_a_large_body_has_others_of_its_source_give_way_only_after_a_while() -> None:
    room = Room(TOTAL)
    first = [loose(room, "a", LARGE) for _ in range(8)]
    assert not room.take(Body(room), LARGE, now=PATIENCE / 2)
    assert room.take(Body(room), SMALL, now=PATIENCE / 2)  # a small one is soon done
    assert [body.told for body in first] == [1] + [0] * 7
    loose(room, "a", LARGE, now=PATIENCE)
    assert [body.told for body in first] == [1, 1] + [0] * 6


def test_the_oldest_of_all_gives_way_to_nobody_when_it_asks_itself() -> None:
    room = Room(TOTAL)
    oldest = loose(room, "a", LARGE)
    for _ in range(28):
        loose(room, "a", SMALL)
    assert not room.take(oldest, LARGE, now=9.0)
    assert (oldest.told, oldest.size) == (0, LARGE)


def test_what_waits_for_its_append_gives_way_to_nobody() -> None:
    room = Room(TOTAL)
    while room.keep(room.share("a"), SMALL, now=0.0):
        pass
    held_open = loose(room, "b", SMALL)
    assert all(room.take(Body(room, "b"), SMALL, now=9.0) for _ in range(64))
    assert (room.free, held_open.told) == (0, 1)


@pytest.mark.parametrize(("size", "share"), [(SMALL, 3 / 4), (LARGE, 1 / 2)])
def test_a_source_leaves_room_for_the_others_and_large_bodies_for_small_ones(size: int, share: float) -> None:
    room = Room(TOTAL)
    count = 0
    while room.keep(room.share("a"), size, now=0.0):
        count += 1
    assert count * size == TOTAL * share
    if size > SMALL:
        assert room.keep(room.share("a"), SMALL, now=0.0)
    for _ in range(4):
        assert room.keep(room.share("b"), SMALL, now=0.0)


def test_bodies_that_were_read_beside_each_other_have_no_more_than_their_sources_share() -> None:
    room = Room(TOTAL)
    read = [loose(room, "a", SMALL) for _ in range(32)]
    while room.keep(room.share("a"), SMALL, now=0.0) and room.free:
        pass
    for body in read:
        room.close(body)
    kept = sum(room.keep(room.share("a"), SMALL, now=0.0) for _ in read)
    assert (32 + kept) * SMALL == TOTAL * 3 / 4


def test_an_empty_body_takes_nothing() -> None:
    room = Room(TOTAL)
    room.close(loose(room, "a", 0))
    assert room.keep(room.share("a"), 0, now=0.0)
    room.give_back(room.share("a"), 0)
    assert room.free == TOTAL


class Worlds(RuleBasedStateMachine):
    """Whatever bodies do, the room adds up, is never exceeded, and is whole again when all are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.room = Room(TOTAL)
        self.bodies: list[Body] = []
        self.kept: list[tuple[Share, int]] = []
        self.now = 0.0

    @rule(source=st.sampled_from("abc"))
    def open(self, source: str) -> None:
        self.bodies.append(Body(self.room, source))

    @precondition(lambda self: self.bodies)
    @rule(data=st.data(), more=st.sampled_from([0, 1, SMALL // 2, SMALL, LARGE]), seconds=st.sampled_from([0.0, 0.6]))
    def grow(self, data: st.DataObject, more: int, seconds: float) -> None:
        self.now += seconds
        body = data.draw(st.sampled_from(self.bodies))
        before = body.size
        assert self.room.take(body, more, now=self.now) == (body.size == before + more and not body.is_given_up)

    @rule(source=st.sampled_from("abc"), size=st.sampled_from([0, 1, SMALL, LARGE]))
    def keep(self, source: str, size: int) -> None:
        free, share = self.room.free, self.room.share(source)
        if self.room.keep(share, size, now=self.now):
            self.kept.append((share, size))
        else:
            assert self.room.free >= free

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.kept) - 1))
        self.room.give_back(*self.kept.pop(which))

    @precondition(lambda self: self.bodies)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        body = data.draw(st.sampled_from(self.bodies))
        self.bodies.remove(body)
        self.room.close(body)
        self.room.close(body)

    @invariant()
    def it_adds_up(self) -> None:
        loose, settled = sum(body.size for body in self.bodies), sum(size for _, size in self.kept)
        assert self.room.free == TOTAL - loose - settled >= 0
        assert all(body.told == body.is_given_up for body in self.bodies)
        assert not any(body.is_given_up and body.size for body in self.bodies)
        assert loose <= TOTAL // 2
        assert set(self.room._crowd) == {body.share for body in self.bodies if body.size}
        for share in self.room._shares.values():
            assert share.loose_bytes == sum(body.size for body in share.loose)
            assert share.settled == sum(size for owner, size in self.kept if owner is share)

    @override
    def teardown(self) -> None:
        for body in self.bodies:
            self.room.close(body)
        for share, size in self.kept:
            self.room.give_back(share, size)
        assert self.room.free == TOTAL
        assert self.room._crowd == {}


Worlds.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=60, stateful_step_count=40)
TestWorlds = Worlds.TestCase
