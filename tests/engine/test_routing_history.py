"""Which rules an event was routed by: what routers publish, and what is derived from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.engine.commit_progress import CommitProgress
from gateway.engine.control import routing_history
from gateway.engine.control.records import ControlRecord, decode
from gateway.engine.control.routing_history import MAX_EPOCHS, UNUSED_RETENTION, History
from gateway.engine.routing_history_updates import RoutingHistoryUpdates
from gateway.log.base import Commit, Partition
from gateway.rules.routing_revision import decode as decode_revision
from gateway.rules.routing_revision import encode, routing_revision
from gateway.rules.rules import RoutingRevision
from tests.builders import a_route
from tests.engine.test_worker import rules_of

HERE = Partition("events", 0)
PLACE = "events/0"
LOOKED_AT = 40
"""Offsets whose revisions are compared."""
EDITIONS = [RoutingRevision(f"e{number}", {"build": str(number)}) for number in range(3)]


def roundtripped(record: ControlRecord) -> ControlRecord:
    """Return a record as it comes out of the log."""
    return decode(*record.encode())


def a_history(*records: ControlRecord) -> History:
    history = History()
    for revision in EDITIONS:
        history.apply(
            roundtripped(
                ControlRecord(kind="rules", name=revision.name, state="done", at=0.0, routes=encode(revision, None))
            )
        )
    for record in records:
        history.apply(roundtripped(record))
    return history


def a_reading(name: str, offset: int, revision: int, *, at: float = 0.0, place: str = PLACE) -> ControlRecord:
    return ControlRecord(
        kind="routed", name=name, state="done", at=at, checkpoint={place: offset}, revision=EDITIONS[revision].name
    )


@dataclass
class Process:
    """A process that reads the partition, or did."""

    readings: RoutingHistoryUpdates
    revision: int
    progress: CommitProgress = field(default_factory=lambda: CommitProgress(Commit(0), 0))
    under_way: dict[int, int] = field(default_factory=dict)
    """Offset → the revision by which it was routed here."""


def revisions_of(history: History) -> list[str | None]:
    """Return the name of each offset's revision."""
    found = [history.revision_at(HERE, offset) for offset in range(LOOKED_AT)]
    return [None if revision is None else revision.name for revision in found]


class Model:
    """Two processes that take turns in reading a partition. Either may be killed, and get new rules at any time."""

    def __init__(self, *, is_told_late: bool) -> None:
        self.history = a_history()
        self.commit = Commit(0)
        self.routed: dict[int, int] = {}
        """Offset → the revision by which it was routed in the end."""
        self.published: list[ControlRecord] = []
        self.seen = [revisions_of(self.history)]
        """Each offset's revision, before the first epoch was published and after each."""
        self._is_told_late = is_told_late
        self._count = 0
        self._processes = [
            Process(RoutingHistoryUpdates(self.history), 0),
            Process(RoutingHistoryUpdates(self.history), 1),
        ]
        self._take_over()

    @property
    def now(self) -> Process:
        return self._processes[0]

    def tell(self) -> None:
        while (what := self.now.readings.unpublished()) is not None:
            self._count += 1
            record = self.now.readings.record(what, float(self._count))
            self.now.readings.mark_published(what, record.name)
            self.history.apply(roundtripped(record), len(self.published))
            self.published.append(record)
            self.seen.append(revisions_of(self.history))

    def read(self, count: int) -> None:
        last = self.now.progress.last_received
        start = self.commit.base if last is None else last + 1
        for offset in range(start, start + count):
            if self.now.progress.received(offset):
                self.now.under_way.setdefault(offset, self.now.revision)

    def finish(self, offsets: set[int]) -> None:
        for offset in offsets & self.now.under_way.keys():
            self.routed[offset] = self.now.under_way.pop(offset)
            self.now.progress.mark_done(offset)

    def store(self, _: int) -> None:
        self.tell()
        self.commit = self.now.progress.committable(is_known=True) or self.commit

    def reload(self, revision: int) -> None:
        self.now.revision = revision
        self.now.readings.reloaded(EDITIONS[revision], {HERE: self.now.progress.last_received})
        self._tell_at_once()

    def come_back(self, _: int) -> None:
        self._give_up()
        self._take_over()

    def move(self, _: int) -> None:
        """What was under way ends unheard, and the other reads it again."""
        self._give_up()
        self.now.readings.forget_revoked()
        self._processes.reverse()
        self.now.progress, self.now.under_way = CommitProgress(self.commit, 0), {}
        self._take_over()

    def kill(self, revision: int) -> None:
        """What it has finished since the last commit is done again."""
        self.tell()
        self._processes[0] = Process(RoutingHistoryUpdates(self.history), revision)
        self._take_over()

    def _give_up(self) -> None:
        self.commit = self.now.progress.committable() or self.commit
        self.now.readings.revoked(HERE, self.now.progress.last_received)
        self.tell()

    def _take_over(self) -> None:
        self.now.readings.took_over(HERE, self.commit, EDITIONS[self.now.revision], 0.0)
        before, self.now.progress = self.now.progress, CommitProgress(self.commit, 0)
        self.now.progress.merge(before)
        self.now.readings.forget_revoked()
        self._tell_at_once()

    def _tell_at_once(self) -> None:
        if not self._is_told_late:
            self.tell()


steps = st.one_of(
    st.tuples(st.just(Model.read), st.integers(1, 6)),
    st.tuples(st.just(Model.finish), st.sets(st.integers(0, 30), max_size=6)),
    st.tuples(st.sampled_from((Model.store, Model.move, Model.come_back)), st.just(0)),
    st.tuples(st.sampled_from((Model.reload, Model.kill)), st.integers(0, 2)),
)


@settings(max_examples=400)
@given(st.lists(steps, max_size=40), st.booleans())
def test_of_each_event_that_is_done_the_rules_are_known_by_which_it_was_routed(
    plan: list[tuple[Any, Any]],
    is_told_late: bool,  # noqa: FBT001 - drawn
) -> None:
    hold(plan, is_told_late=is_told_late)


@example([(Model.read, 2), (Model.reload, 1)], [0])
@settings(max_examples=100)
@given(st.lists(steps, max_size=40), st.lists(st.integers(0, 20), max_size=3))
def test_an_epoch_that_is_appended_again_late_hides_none_of_those_after_it(
    plan: list[tuple[Any, Any]], late: list[int]
) -> None:
    """It is the try of an append that had no answer, and compaction leaves nothing of the other try."""
    model = Model(is_told_late=False)
    for step, value in plan:
        step(model, value)
    records = model.published + [model.published[each] for each in late if each < len(model.published)]
    compacted = {record.name: (offset, record) for offset, record in enumerate(records)}
    fresh = a_history(*[record for _, record in sorted(compacted.values(), key=itemgetter(0))])
    assert revisions_of(fresh) == model.seen[-1]


@settings(max_examples=100)
@given(st.lists(steps, max_size=40), st.data())
def test_what_was_known_between_two_epochs_is_what_was_known_then(plan: list[tuple[Any, Any]], data: Any) -> None:
    model = Model(is_told_late=False)
    for step, value in plan:
        step(model, value)
    begin = data.draw(st.integers(0, len(model.published)))
    end = data.draw(st.integers(begin, len(model.published)))

    def between(offset: int, first: int, last: float) -> set[str | None]:
        found = model.history.revisions_between(HERE, offset, first, last)
        return {None if revision is None else revision.name for revision in found}

    for offset in range(LOOKED_AT):
        assert between(offset, begin, end) == {names[offset] for names in model.seen[begin : end + 1]}
        assert between(offset, 0, math.inf) == {names[offset] for names in model.seen}


def test_in_a_recreated_control_topic_what_was_known_precedes_what_is_new() -> None:
    """A process that starts then numbers its epochs from the beginning."""
    history = a_history(*[replace(a_reading(str(number), 0, 0), number=number) for number in range(1, 50)])
    history.forget_offsets()
    history.apply(roundtripped(replace(a_reading("new", 0, 1), number=1)), 3)
    assert revisions_of(history)[0] == "e1"
    assert history.last_number == 1
    assert [revision and revision.name for revision in history.revisions_between(HERE, 0, 3, 3)] == ["e0"]


def test_epochs_that_are_published_together_have_numbers_of_their_own() -> None:
    history = a_history()
    readings = RoutingHistoryUpdates(history)
    numbers = []
    for revision in (EDITIONS[0], EDITIONS[1]):
        readings.took_over(HERE, Commit(0), revision, 0.0)
        what = readings.unpublished()
        assert what is not None
        numbers.append(readings.record(what, 0.0).number)
    assert numbers == [1, 2]


def test_records_in_flight_as_a_partition_returns_keep_their_routing() -> None:
    """Also where the rules have changed before it went, or change after it came."""
    for plan in (
        [(Model.read, 3), (Model.reload, 1), (Model.come_back, 0), (Model.finish, {0, 1}), (Model.store, 0)],
        [(Model.read, 3), (Model.come_back, 0), (Model.reload, 1), (Model.finish, {0, 1}), (Model.store, 0)],
    ):
        hold(plan, is_told_late=False)


def test_an_epoch_that_is_published_late_is_followed_by_those_after_it() -> None:
    plan = [(Model.move, 0), (Model.reload, 0), (Model.read, 1), (Model.finish, {0}), (Model.move, 0)]
    hold(plan, is_told_late=True)


def hold(plan: Sequence[tuple[Any, Any]], *, is_told_late: bool) -> None:
    """Carry a plan out, and hold what is known against what has happened."""
    model = Model(is_told_late=is_told_late)
    for step, value in plan:
        step(model, value)
    model.tell()
    for offset, revision in model.routed.items():
        if model.commit.covers(offset):
            known = model.history.revision_at(HERE, offset)
            assert known is not None
            assert known.name == EDITIONS[revision].name, f"offset {offset}"


def test_records_done_before_a_reader_were_routed_by_its_predecessor() -> None:
    later = ControlRecord(
        kind="routed", name="b", state="done", at=2.0, checkpoint={PLACE: 10}, done={PLACE: b"\x05"}, revision="e1"
    )
    history = a_history(a_reading("a", 4, 0), later)
    names = [(known := history.revision_at(HERE, offset)) and known.name for offset in (3, 4, 9, 10, 11, 12, 13, 99)]
    assert names == [None, "e0", "e0", "e0", "e1", "e0", "e1", "e1"]
    assert history.revision_at(Partition("events", 1), 5) is None


def test_the_routing_history_of_a_recreated_topic_is_unknown() -> None:
    history = a_history()
    readings = RoutingHistoryUpdates(history)

    def read_by(revision: RoutingRevision) -> None:
        readings.took_over(HERE, Commit(0), revision, 0.0)
        while (what := readings.unpublished()) is not None:
            record = readings.record(what, float(revision is EDITIONS[1]))
            readings.mark_published(what, record.name)
            history.apply(roundtripped(record))

    read_by(EDITIONS[0])
    readings.revoked(HERE, 9)
    readings.forget(HERE)
    read_by(EDITIONS[1])
    assert history.revision_at(HERE, 3) == EDITIONS[1]


def test_a_revision_is_published_again_once_the_history_has_forgotten_it() -> None:
    history = a_history()
    readings = RoutingHistoryUpdates(history)
    again = RoutingRevision("again", {"build": "again"})
    stored = ControlRecord(kind="rules", name="again", state="done", at=0.0, routes=encode(again, None))
    for at in (0.0, 1.0):
        readings.took_over(HERE, Commit(0), again, at)
        what = readings.unpublished()
        assert what is not None
        assert readings.lacks("again")
        readings.mark_revision_published("again")
        assert not readings.lacks("again"), "it isn't read back yet"
        record = readings.record(what, at)
        readings.mark_published(what, record.name)
        assert readings.unpublished() is None
        for each in (stored, record):
            history.apply(roundtripped(each))
        assert readings.unpublished() is None
        history.apply(ControlRecord(kind="rules", name="again", state="deleted", at=0.0))
        assert readings.unpublished() is not None, "its epochs, and what they name first"


@pytest.mark.parametrize("follows", ["nothing", "a revocation", "a reload"])
def test_an_epoch_that_a_recreated_control_topic_has_lost_is_published_again(follows: str) -> None:
    """It was appended, and nobody had read it yet."""
    history = a_history()
    readings = RoutingHistoryUpdates(history)
    again = RoutingRevision("again", {"build": "again"})
    readings.took_over(HERE, Commit(0), again, 0.0)
    what = readings.unpublished()
    assert what is not None
    readings.mark_revision_published("again")
    readings.mark_published(what, readings.record(what, 0.0).name)
    assert readings.unpublished() is None
    history.forget_offsets()
    if follows == "a revocation":
        readings.revoked(HERE, 5)
    elif follows == "a reload":
        readings.reloaded(EDITIONS[1], {HERE: 5})
    lost = readings.unpublished()
    assert lost is not None
    assert (lost.revision, lost.epochs[HERE].begins) == (again, Commit(0))
    assert readings.lacks("again")


def test_a_record_published_again_counts_once_and_a_deleted_one_never() -> None:
    history = a_history(a_reading("a", 0, 0), a_reading("b", 5, 1), a_reading("a", 0, 0))
    assert history.knows_epoch(HERE, Commit(5), "e1")
    assert not history.knows_epoch(HERE, Commit(4), "e1")
    assert not history.knows_epoch(HERE, Commit(5), "e0")
    history.apply(ControlRecord(kind="routed", name="b", state="deleted", at=0.0))
    assert history.knows_epoch(HERE, Commit(5), "e0")
    history.apply(ControlRecord(kind="routed", name="a", state="deleted", at=0.0))
    history.apply(ControlRecord(kind="rules", name="e0", state="deleted", at=0.0))
    assert history.revision_at(HERE, 5) is None
    assert history.partitions() == {}


def test_a_route_is_unchanged_since_the_last_of_its_partitions() -> None:
    other = {"events/1": 0, PLACE: 0, "events/2": 0}
    history = a_history(
        *[a_reading(f"{place}", 0, 0, place=place) for place in other],
        a_reading("x", 7, 1, at=50.0),
        a_reading("y", 7, 1, at=60.0, place="events/1"),
        a_reading("z", 9, 1, at=70.0),
    )
    assert history.since("build", "1", {PLACE: 0}) == 50.0
    assert history.since("build", "1", {PLACE: 0, "events/1": 0}) == 60.0
    assert history.since("build", "0", {"events/2": 0}) is None, "it always was"
    assert history.since("build", "1", {"none/0": 0}) is None, "nothing is known of it"


def test_history_of_deleted_events_is_forgotten() -> None:
    unused = ControlRecord(kind="rules", name="e9", state="done", at=100.0, routes=encode(EDITIONS[0], None))
    history = a_history(a_reading("a", 0, 0), a_reading("b", 5, 1), a_reading("c", 10, 2), unused)

    def names(now: float, start: int) -> list[str]:
        return [record.name for record in history.obsolete(now, {PLACE: start})]

    assert names(100.0 + UNUSED_RETENTION, 4) == []
    assert names(0.0, 5) == ["a"]
    assert names(101.0 + UNUSED_RETENTION, 5) == ["a", "e0", "e9"]
    assert names(UNUSED_RETENTION + 1, 10) == ["a", "b", "e0", "e1"]
    many = a_history(*[a_reading(f"n{number}", number, number % 2) for number in range(MAX_EPOCHS + 3)])
    assert [record.name for record in many.obsolete(0.0, {PLACE: 0})] == ["n0", "n1", "n2"]


def test_history_of_partitions_that_are_gone_is_forgotten_whole_unless_its_records_are_about_others_too() -> None:
    history = a_history(a_reading("a", 0, 0), a_reading("b", 5, 1))
    assert [record.name for record in history.obsolete(0.0, {PLACE: 5})] == ["a"]
    assert [record.name for record in history.obsolete(0.0, {}, {PLACE})] == ["a", "b"]
    of_both = ControlRecord(
        kind="routed", name="c", state="done", at=0.0, checkpoint={PLACE: 0, "other/0": 0}, revision="e0"
    )
    history.apply(of_both)
    assert [record.name for record in history.obsolete(0.0, {}, {PLACE})] == ["a", "b"]


def test_a_revision_that_is_a_difference_to_itself_or_to_another_difference_is_unknown() -> None:
    history = History()
    for name, base in (("a", "a"), ("b", "c"), ("c", "b"), ("d", "whole"), ("e", "d"), ("whole", "")):
        text = encode(RoutingRevision(name, {name: "{}"}), None)
        history.apply(ControlRecord(kind="rules", name=name, state="done", at=0.0, routes=text, revision=base))
    assert [name for name in "abcde" if history.revision(name) is not None] == ["d"]


def test_a_revision_that_cannot_be_decoded_is_decoded_once_and_again_when_it_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history, decoded = History(), []

    def counted(name: str, text: str, base: RoutingRevision | None) -> RoutingRevision:
        decoded.append(text)
        return decode_revision(name, text, base)

    monkeypatch.setattr(routing_history, "decode", counted)
    for text in ("garbage", encode(EDITIONS[0], None)):
        history.apply(ControlRecord(kind="rules", name="e0", state="done", at=0.0, routes=text))
        for _ in range(3):
            assert (history.revision("e0") is None) is (text == "garbage")
    assert len(decoded) == 2


def test_a_revision_is_kept_as_long_as_another_is_stored_as_a_difference_to_it() -> None:
    base = routing_revision(rules_of(*[a_route(f"r{number}", match={"type": f"t{number}"}) for number in range(100)]))
    changed = RoutingRevision("changed", {**base.routes, "new": "{}"})
    history = History()
    history.apply(ControlRecord(kind="rules", name=base.name, state="done", at=0.0, routes=encode(base, None)))
    text, before = history.encode_revision(changed)
    assert before == base.name
    history.apply(
        roundtripped(ControlRecord(kind="rules", name="changed", state="done", at=0.0, routes=text, revision=before))
    )
    history.apply(
        roundtripped(
            ControlRecord(kind="routed", name="x", state="done", at=0.0, checkpoint={PLACE: 0}, revision="changed")
        )
    )
    assert history.revision_at(HERE, 3) == changed
    assert list(history.obsolete(UNUSED_RETENTION + 1, {PLACE: 0})) == []
    assert history.encode_revision(EDITIONS[0])[1] == "", "one that has nothing in common is told in full"
