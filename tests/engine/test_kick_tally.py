"""What a kick comes to on an ordered route, by what became of the deliveries that waited."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import replace

from gateway.engine.control.records import ControlRecord
from gateway.engine.ordered.batching import AT_ONCE
from gateway.engine.ordered.kick_tally import OUTCOME_AFTER, KickTally, Standing
from gateway.engine.partition_tracker import Ownership, PendingDelivery, PendingRecord, Stage, Tracker
from gateway.log.base import Assignment, Commit, Partition
from gateway.model import DeadLettered, DeadReason, SpillReason
from tests.builders import NOW, a_delivery, an_attempt
from tests.virtual_time import run

END = DeadLettered(reason=DeadReason.EXPIRED, detail="its time is over")
FAILED = (an_attempt(1, status=503),)


def a_tracker(number: int = 0) -> Tracker:
    return Tracker(Assignment(Partition("t", number), Commit(0), 0), member=None)  # type: ignore[arg-type] # not asked


def waiting(tracker: Tracker, count: int) -> list[PendingDelivery]:
    record = PendingRecord(tracker=tracker, offset=0, appended_at=NOW, size=0)
    return [
        PendingDelivery(delivery=a_delivery(), record=record, size=0, is_retry=False, stage=Stage.WAITING)
        for _ in range(count)
    ]


def begun(*queues: Sequence[PendingDelivery], unread: int = 0, trackers: Collection[Tracker] = ()) -> KickTally:
    tally = KickTally("build", "ci")
    found = {pending.record.tracker for queue in queues for pending in queue} | set(trackers)
    tally.begin(NOW, NOW, dict.fromkeys(found, unread), queues)
    return tally


def taken(
    tally: KickTally,
    heads: Collection[PendingDelivery] = (),
    held_by: str = "",
    after: float = 0.0,
    unreached: Collection[PendingDelivery] = (),
) -> Sequence[ControlRecord]:
    standing = Standing(is_head=set(heads).__contains__, unreached=unreached, hold_reason=held_by)
    found: list[ControlRecord] = []
    run(tally.publish_outcomes(NOW + after, standing, None, found.append, asyncio.sleep))
    return found


def test_what_is_reset_once_the_outcome_is_known_is_not_kept() -> None:
    tracker = a_tracker()
    pending, late = waiting(tracker, 2)
    tally = begun([pending], [late])
    assert taken(tally, [pending, late], after=OUTCOME_AFTER, unreached=[late])
    tally.reset(late)
    assert not tally._reset


def test_each_fate_of_a_delivery_is_counted() -> None:
    tracker = a_tracker()
    ended, failed, dropped, lapsed, halted, on_its_way, behind = deliveries = waiting(tracker, 7)
    for halted_before in (failed, dropped):
        halted_before.delivery = replace(halted_before.delivery, attempts=FAILED)
    tally = begun(*[[pending] for pending in deliveries], unread=4)
    for halted_before in (failed, dropped):
        tally.reset(halted_before)
    ended.stage = Stage.FINISHED
    failed.delivery = replace(failed.delivery, attempts=FAILED)
    dropped.delivery = replace(dropped.delivery, attempts=(an_attempt(1, status=404),))
    dropped.stage = lapsed.stage = Stage.FINISHED
    lapsed.outcome = halted.outcome = END
    on_its_way.stage = Stage.ATTEMPT
    heads = {halted, on_its_way}
    assert not taken(tally, heads), "one is on its way"
    (outcome,) = taken(tally, heads, after=OUTCOME_AFTER)
    assert (outcome.name, outcome.at, outcome.count) == ("tried/build/ci/0", NOW, 11)
    assert (outcome.tried, outcome.delivered) == (3, 1)
    assert (outcome.failed_by_result, outcome.repeated_failures) == ({"503": 1, "404": 1}, {"503": 1})
    assert outcome.untried_by_reason == {"ended": 1, "halted": 1, "on_its_way": 1, "behind": 1, "unread": 4}
    assert outcome.dead == 0
    assert behind.stage is Stage.WAITING
    assert not tally.is_open
    assert not taken(tally, heads, after=60), "once"


def test_what_a_kick_has_not_come_to_is_on_its_way() -> None:
    delayed, halted, reached = deliveries = waiting(a_tracker(), 3)
    tally = begun(*[[pending] for pending in deliveries])
    delayed.delivery = replace(delayed.delivery, due=NOW + 60, delayed_until=NOW + 60)
    halted.outcome = reached.outcome = END
    unreached = {delayed, halted}
    assert not taken(tally, deliveries, unreached=unreached), "each of them waits for something, and is to go on"
    (outcome,) = taken(tally, deliveries, unreached=unreached, after=OUTCOME_AFTER)
    assert outcome.untried_by_reason == {"on_its_way": 2, "halted": 1}


def test_what_a_kick_has_reset_was_tried_once_it_is_attempted_again() -> None:
    reset, waits = deliveries = waiting(a_tracker(), 2)
    for pending in deliveries:
        pending.delivery = replace(pending.delivery, attempts=FAILED)
    tally = begun(*[[pending] for pending in deliveries])
    reset.delivery = replace(reset.delivery, attempts=())
    tally.reset(reset)
    reset.delivery = replace(reset.delivery, attempts=FAILED)
    (outcome,) = taken(tally, deliveries, "breaker_open", after=OUTCOME_AFTER)
    assert (outcome.failed_by_result, outcome.repeated_failures) == ({"503": 1}, {"503": 1})
    assert outcome.untried_by_reason == {"breaker_open": 1}, f"{waits} had one attempt before"


def test_another_kick_ends_the_count_of_the_former() -> None:
    tally = begun(waiting(a_tracker(), 2 * AT_ONCE))
    standing = Standing(is_head=set[PendingDelivery]().__contains__, unreached=(), hold_reason="")

    async def kicked_again(_seconds: float) -> None:
        tally.begin(NOW + 1, NOW + 1, {a_tracker(): 3}, [])

    found: list[ControlRecord] = []
    run(tally.publish_outcomes(NOW + OUTCOME_AFTER, standing, None, found.append, kicked_again))
    assert not found
    (outcome,) = taken(tally)
    assert (outcome.at, outcome.untried_by_reason) == (NOW + 1, {"unread": 3})


def test_an_outcome_is_published_before_what_was_tracked_is_released() -> None:
    tally = begun(waiting(a_tracker(), 2 * AT_ONCE))
    standing = Standing(is_head=set[PendingDelivery]().__contains__, unreached=(), hold_reason="")
    found: list[ControlRecord] = []
    turns_before = []

    async def turn(_seconds: float) -> None:
        turns_before.append(not found)

    run(tally.publish_outcomes(NOW + OUTCOME_AFTER, standing, None, found.append, turn))
    assert turns_before == [True, True, False, False], "it is counted in turns, published, and released in turns"


def test_what_goes_on_in_a_tier_was_neither_tried_nor_delivered() -> None:
    moved, delivered = deliveries = waiting(a_tracker(), 2)
    tally = begun(*[[pending] for pending in deliveries])
    moved.stage = delivered.stage = Stage.FINISHED
    moved.is_moved = True
    (outcome,) = taken(tally)
    assert (outcome.tried, outcome.delivered, outcome.untried_by_reason) == (1, 1, {"later": 1})


def test_the_outcome_is_published_once_it_is_final() -> None:
    first, second = waiting(a_tracker(), 2)
    tally = begun([first, second])
    assert not taken(tally, {first})
    first.delivery = replace(first.delivery, attempts=FAILED)
    (outcome,) = taken(tally, {first})
    assert (outcome.tried, outcome.untried_by_reason) == (1, {"behind": 1})


def test_an_attempts_dead_letter_is_counted_once_it_is_stored() -> None:
    dead, halted, dying = deliveries = waiting(a_tracker(), 3)
    tally = begun(*[[pending] for pending in deliveries])
    for pending, stage in ((dead, Stage.FINISHED), (halted, Stage.WAITING), (dying, Stage.APPEND)):
        pending.delivery = replace(pending.delivery, attempts=FAILED)
        pending.outcome, pending.stage = END, stage
    assert not taken(tally), "one isn't stored"
    (outcome,) = taken(tally, after=OUTCOME_AFTER)
    assert (outcome.tried, outcome.failed_by_result, outcome.dead) == (3, {"503": 3}, 1)


def test_a_pause_holds_each_and_a_breaker_the_first_of_each_key() -> None:
    for held_by, waits in (
        (SpillReason.PAUSED.value, {"paused": 2}),
        (SpillReason.BREAKER_OPEN.value, {"breaker_open": 1, "behind": 1}),
    ):
        first, second = waiting(a_tracker(), 2)
        (outcome,) = taken(begun([first, second]), {first}, held_by, after=OUTCOME_AFTER)
        assert (outcome.tried, outcome.untried_by_reason) == (0, waits)


def test_a_partition_without_a_backlog_or_of_another_owner_is_not_reported() -> None:
    kept, empty, lost = [a_tracker(number) for number in range(3)]
    (ours,), (theirs,) = waiting(kept, 1), waiting(lost, 1)
    tally = begun([ours], [theirs], trackers=[empty])
    lost.ownership = Ownership.REASSIGNED
    ours.stage = theirs.stage = Stage.FINISHED
    assert [outcome.name for outcome in taken(tally)] == ["tried/build/ci/0"]
