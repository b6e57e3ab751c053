"""The simulation finds what it is there for: engines with a bug break the invariant that the bug is against."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from gateway.client import request
from gateway.client.request import Outbound
from gateway.engine import router, tiers
from gateway.engine.commit_progress import CommitProgress
from gateway.engine.committer import Committer
from gateway.engine.control.records import ControlRecord, partition_key
from gateway.engine.control.redelivery_records import Redelivery
from gateway.engine.control.state import Control
from gateway.engine.delivery import retry_decision
from gateway.engine.delivery.breaker import Breaker
from gateway.engine.delivery.destination_lanes import Budget, Lane
from gateway.engine.delivery.queues import Queues
from gateway.engine.event_topics import wanted_topics
from gateway.engine.group_member import GroupMember
from gateway.engine.jobs import redeliver
from gateway.engine.jobs.injector import Injector
from gateway.engine.jobs.redelivery_plan import PlannedDelivery
from gateway.engine.jobs.redelivery_plan import plan as planned
from gateway.engine.jobs.scan import ScanningJob
from gateway.engine.ordered.appender import _Entry
from gateway.engine.ordered.route import OrderedRoute
from gateway.engine.partition_tracker import PendingDelivery, Tracker
from gateway.engine.router import Router
from gateway.engine.successor_writer import SuccessorWriter
from gateway.log.base import NO_TOPIC, Commit, Log, Partition
from gateway.log.topics import Topics
from gateway.model import Attempt, Event, LogUnavailableError
from gateway.rules.event_view import EventView
from gateway.rules.rules import Rules
from tests.simulation.plan import REDELIVERED, Plan, Step, plan_of
from tests.simulation.test_regressions import a_plan, an_event, behaves
from tests.simulation.world import simulate

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # of what is killed

Mutant = Callable[[pytest.MonkeyPatch], None]
MANY = 100
"""Seeds within which each has to be found."""


def successors_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """Done before the successor is acknowledged: lost with the process, or with the append."""
    append = SuccessorWriter._append
    started: list[asyncio.Task[bool]] = []

    async def hasty(self: SuccessorWriter, topic: str, *rest: Any, **claim: Any) -> bool:
        started.append(asyncio.create_task(append(self, topic, *rest, **claim)))
        return True

    patch.setattr(SuccessorWriter, "_append", hasty)


def a_lost_append_is_believed(patch: pytest.MonkeyPatch) -> None:
    """An append that failed counts as stored."""

    async def credulous(self: SuccessorWriter, topic: str, key: bytes, value: bytes, headers: Any, **_: Any) -> bool:
        with suppress(LogUnavailableError):
            await self._log.append(topic, key=key, value=value, headers=headers)
        return True

    patch.setattr(SuccessorWriter, "_append", credulous)


def read_records_are_committed(patch: pytest.MonkeyPatch) -> None:
    """A commit covers what was received, done or not."""

    def eager(self: CommitProgress, *, is_known: bool = False) -> Commit | None:  # noqa: ARG001 - the same signature
        return Commit(self._next)

    patch.setattr(CommitProgress, "committable", eager)


def nothing_is_committed_on_a_revocation(patch: pytest.MonkeyPatch) -> None:
    """A graceful restart repeats what was done since the last second."""
    revoked = GroupMember.revoked

    async def forgetful(self: GroupMember, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        await revoked(self, partitions)
        return {}

    patch.setattr(GroupMember, "revoked", forgetful)


def retries_are_early(patch: pytest.MonkeyPatch) -> None:
    """A tier that is too long for the rest of a delay is no reason to be early, but here it is."""
    delay = retry_decision._delay
    patch.setattr(retry_decision, "_delay", lambda *given: 0.7 * delay(*given))


def every_record_looks_like_a_duplicate(patch: pytest.MonkeyPatch) -> None:
    """DuplicateFilter are recognised by the delivery alone, without its step."""

    def hasty(self: Tracker, delivery: Any, offset: int) -> bool:
        return self._first_offsets.setdefault((delivery.unique_key, 0), offset) != offset

    patch.setattr(Tracker, "is_duplicate_record", hasty)


def the_longest_tier_carries_everything(patch: pytest.MonkeyPatch) -> None:
    """A delay of seconds goes to where it waits for hours: late, and left over at the end."""
    plan = tiers.plan
    patch.setattr(tiers, "plan", lambda due, now: plan(due, now) and "20h")


def an_adopted_record_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What comes straight back is taken for finished."""

    def careless(self: Tracker, old: Tracker) -> list[Any]:
        self.progress.merge(old.progress)
        for offset in old.records:
            self.progress.mark_done(offset)
        return []

    patch.setattr(Tracker, "adopt", careless)


def a_byte_is_lost(patch: pytest.MonkeyPatch) -> None:
    """A body that ends a byte early."""
    compose = request.compose

    def lossy(*given: Any, **named: Any) -> Outbound:
        outbound = compose(*given, **named)
        return replace(outbound, body=outbound.body[:-1])

    patch.setattr("gateway.engine.delivery.attempts.compose", lossy)


def duplicates_of_any_content_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """An event of an identity that was there passes for a duplicate, whatever its body says."""
    patch.setattr("gateway.engine.dedupe.filter.fingerprint", lambda _event: bytes(8))


def order_is_not_proven(patch: pytest.MonkeyPatch) -> None:
    """An attempt of an ordered route begins without a commit that was accepted: a zombie goes on."""
    commit = Committer.commit

    async def hasty(
        self: Committer, partitions: Iterable[Partition] | None = None, *, is_ownership_check: bool = False
    ) -> bool | None:
        return True if is_ownership_check else await commit(self, partitions)

    patch.setattr(Committer, "commit", hasty)


def open_breakers_let_everything_through(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Breaker, "allows", lambda _self, _now, _in_flight: True)


def a_kick_is_a_recovery(patch: pytest.MonkeyPatch) -> None:
    """Whoever kicks knows that it is fixed: all that waits goes out at once."""
    patch.setattr(Breaker, "kick", Breaker.__init__)


def a_lane_has_no_bottom(patch: pytest.MonkeyPatch) -> None:
    """A destination gets whatever there is."""
    limit = Lane.set_limits

    def generous(self: Lane, *, concurrency: int, rate: float | None, share: float = 1.0) -> None:
        limit(self, concurrency=2 * concurrency, rate=rate, share=share)

    patch.setattr(Lane, "set_limits", generous)


def there_is_no_rate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lane, "_take_token", lambda _self, _now: True)


def places_are_kept(patch: pytest.MonkeyPatch) -> None:
    """What has failed keeps its place: in the end there is none."""
    give_back = Budget.give_back
    patch.setattr(Budget, "give_back", lambda self, pending: None if pending.is_retry else give_back(self, pending))


def revoked_partitions_are_kept(patch: pytest.MonkeyPatch) -> None:
    """The memory of records that another owner reads again stays taken."""
    lose = GroupMember._abandon

    def careless(self: GroupMember, tracker: Tracker) -> None:
        held = self._memory_bytes
        lose(self, tracker)
        self._memory_bytes = held

    patch.setattr(GroupMember, "_abandon", careless)


def nobody_is_left_in_peace(patch: pytest.MonkeyPatch) -> None:
    """A destination that asks for silence gets the next delivery at once."""
    finished = Lane.finished

    def deaf(self: Lane, pending: PendingDelivery, attempt: Attempt, now: float) -> None:
        finished(self, pending, replace(attempt, retry_after=None), now)

    patch.setattr(Lane, "finished", deaf)


def nobody_is_paused(patch: pytest.MonkeyPatch) -> None:
    """A pause is ordered, and nothing heeds it."""
    patch.setattr(Control, "paused_by", lambda _self, _route, _destination: None)


def jobs_inject_nothing(patch: pytest.MonkeyPatch) -> None:
    """What was parked, and what is replayed, is marked as done and nowhere."""

    async def lazy(_: object, deliveries: Collection[object], *_more: object) -> Sequence[bool]:
        return [True] * len(deliveries)

    patch.setattr(Injector, "inject", lazy)


def nobody_waits_for_the_next_of_its_key(patch: pytest.MonkeyPatch) -> None:
    """Each event has a key of its own."""
    patch.setattr(
        OrderedRoute, "_key", lambda _self, pending: (pending.record.tracker.partition, pending.delivery.event.id)
    )


def nothing_waits_for_events_of_former_rules(patch: pytest.MonkeyPatch) -> None:
    """What is read by new rules goes to its ordered topic at once."""
    patch.setattr(_Entry, "may_be_appended", property(lambda self: not self.pending.record.tracker.is_suspended))


def losses_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    """What isn't there can't be counted."""
    patch.setattr(GroupMember, "_count_lost", lambda *_: None)


def deleted_records_are_waited_for(patch: pytest.MonkeyPatch) -> None:
    """It is counted, and no commit passes it."""
    records_deleted = CommitProgress.records_deleted

    def patient(self: CommitProgress, deleted: range) -> int:
        self.received(deleted.start)
        return 1 + records_deleted(self, deleted)

    patch.setattr(CommitProgress, "records_deleted", patient)


def a_checkpoint_covers_later_records(patch: pytest.MonkeyPatch) -> None:
    """What is below an offset was there when the offset was written down."""

    def is_below(self: ControlRecord, partition: Partition, offset: int, _: float) -> bool:
        return offset < self.checkpoint.get(partition_key(partition), 0)

    patch.setattr(ControlRecord, "is_before_checkpoint", is_below)


def a_job_goes_on_behind_a_topics_end(patch: pytest.MonkeyPatch) -> None:
    """A job goes on where the one before it has ended, whatever topic that was."""

    async def nothing(*_: object) -> Mapping[str, tuple[int, float]]:
        return {}

    patch.setattr(ScanningJob, "_first_records", nothing)


def a_recreated_topic_is_the_same(patch: pytest.MonkeyPatch) -> None:
    """The consumer goes on with the partition by itself."""
    patch.setattr(GroupMember, "restarted", lambda *_: None)


def new_owners_are_silent(patch: pytest.MonkeyPatch) -> None:
    """Who is given partitions again reads nothing for a while, and then goes on."""
    assigned, has_room = GroupMember.assigned, vars(GroupMember)["has_room"].fget
    silent_until: dict[GroupMember, float] = {}

    def silenced(self: GroupMember, *given: Any, **named: Any) -> None:
        assigned(self, *given, **named)
        # The first time is that of its start.
        silent_until[self] = asyncio.get_running_loop().time() + 20.0 if self in silent_until else 0.0

    def reads(self: GroupMember) -> bool:
        return bool(has_room(self)) and asyncio.get_running_loop().time() >= silent_until.get(self, 0.0)

    patch.setattr(GroupMember, "assigned", silenced)
    patch.setattr(GroupMember, "has_room", property(reads))


def a_condition_is_for_retries_too(patch: pytest.MonkeyPatch) -> None:
    """What a route isn't for any more isn't retried."""
    resume = Router.resume

    def picky(self: Router, pending: PendingDelivery, now: float) -> None:
        delivery, rules = pending.delivery, self._services.rules()
        names = [route.name for route, _ in rules.table.match(EventView.of(delivery.event))]
        if delivery.route in rules.routes and delivery.route not in names:
            self._dispatcher.finish(pending)
        else:
            resume(self, pending, now)

    patch.setattr(Router, "resume", picky)


def removed_destinations_get_nothing(patch: pytest.MonkeyPatch) -> None:
    """A delivery in a tier is dropped whose route doesn't go to its destination by now."""
    resume = Router.resume

    def picky(self: Router, pending: PendingDelivery, now: float) -> None:
        route = self._services.rules().routes.get(pending.delivery.route)
        if route is not None and pending.delivery.destination not in route.destinations:
            self._dispatcher.finish(pending)
        else:
            resume(self, pending, now)

    patch.setattr(Router, "resume", picky)


@pytest.mark.parametrize(
    ("mutant", "invariants"),
    [
        (successors_are_not_waited_for, ("2",)),
        (a_lost_append_is_believed, ("2",)),
        (read_records_are_committed, ("2",)),
        (nothing_is_committed_on_a_revocation, ("8",)),
        (retries_are_early, ("7",)),
        (every_record_looks_like_a_duplicate, ("1", "2")),
        (the_longest_tier_carries_everything, ("19",)),
        (an_adopted_record_is_forgotten, ("1", "2")),
        (a_byte_is_lost, ("6",)),
        (duplicates_of_any_content_are_dropped, ("1", "2")),
        (open_breakers_let_everything_through, ("17",)),
        (a_kick_is_a_recovery, ("17",)),
        (a_lane_has_no_bottom, ("24",)),
        (there_is_no_rate, ("24",)),
        (places_are_kept, ("25",)),
        (revoked_partitions_are_kept, ("25",)),
        (nobody_is_left_in_peace, ("17",)),
        (nobody_is_paused, ("12",)),
        (jobs_inject_nothing, ("12", "19")),
        (losses_are_not_counted, ("3",)),
        (a_condition_is_for_retries_too, ("1", "2")),
        (removed_destinations_get_nothing, ("1", "2")),
    ],
)
@pytest.mark.rotated(share=1 / 12)
def test_a_mutant_is_found(mutant: Mutant, invariants: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    for seed in range(MANY):
        violation = simulate(plan_of(seed)).violation
        if violation is not None and violation.invariant.split()[0] in invariants:
            return
    pytest.fail(f"{MANY} seeds passed with {mutant.__name__}")


def test_a_crash_amid_a_key_shows_if_its_order_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn plans seldom kill a process within a second of two deliveries of one key."""
    what = {"source": "s0", "type": "push", "key": "k", "size": 10}
    events = [
        Step(5.0 + number / 100, "event", {**what, "n": number, "id": f"evt_{number}", "body": number})
        for number in range(40)
    ]

    def violation(steps: int) -> str | None:
        crash = Step(5.2, "crash", {"process": "p0", "steps": steps, "again": 0.1})
        plan = a_plan(*sorted([*events, crash], key=lambda step: step.at), horizon=20.0)
        [route] = plan.routes
        found = simulate(replace(plan, faults=("crash",), routes=(replace(route, is_ordered=True),))).violation
        return None if found is None else found.invariant

    moments = range(20, 200, 20)
    assert not any(violation(steps) for steps in moments)
    order_is_not_proven(monkeypatch)
    assert "22 order" in {violation(steps) for steps in moments}


def test_overtaking_an_event_of_former_rules_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn plans seldom kill a process while nothing but what new rules send there has come after such an event."""

    def keyed(at: float, number: int, kind: str) -> Step:
        step = an_event(at, number, kind=kind)
        return replace(step, what={**step.what, "key": "k"})

    plan = a_plan(
        Step(0.5, "behave", {"destination": "d1", "kind": "hang"}),
        keyed(2.0, 0, "open"),
        Step(2.1, "reload", {"without": [], "policies": {}, "changes": {"r0": {"types": None}}, "lag": 0.0}),
        keyed(2.15, 1, "push"),
        Step(2.6, "crash", {"process": "p0", "steps": 1, "again": 0.1}),
        Step(9.0, "behave", {"destination": "d1", "kind": "healthy"}),
        horizon=30.0,
    )
    [route] = plan.routes
    plan = replace(
        plan,
        faults=("reload", "crash"),
        sources=("s0",),
        destinations={**plan.destinations, "d1": plan.destinations["d0"]},
        routes=(
            replace(route, sources=("s0",), types=("push",), is_ordered=True),
            replace(route, name="r1", sources=("s0",), to=("d1",)),
        ),
    )
    assert simulate(plan).violation is None
    nothing_waits_for_events_of_former_rules(monkeypatch)
    violation = simulate(plan).violation
    assert violation is not None
    assert violation.invariant.split()[0] in ("1", "2")


@pytest.mark.parametrize(
    "step",
    [
        Step(5.0, "rebalance"),
        Step(5.0, "start", {"process": "x0"}),
        Step(5.0, "stop", {"process": "p1", "again": 0.1}),
    ],
    ids=lambda step: step.do,
)
def test_a_new_owner_that_reads_nothing_for_a_while_is_found(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ends well nevertheless, a while later."""
    plan = a_plan(*[an_event(4.0 + number / 10, number) for number in range(60)], step, horizon=20.0)
    plan = replace(plan, faults=("rebalance", "join", "stop"), processes=2, partitions=4)
    plan = replace(plan, steps=tuple(sorted(plan.steps, key=lambda each: each.at)))
    assert simulate(plan).violation is None
    new_owners_are_silent(monkeypatch)
    violation = simulate(plan).violation
    assert violation is not None
    assert violation.invariant == "19 reading continues"


def test_waiting_on_for_a_name_that_is_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In drawn plans, few ordered routes are gone for as long as a retry takes, and come back within the minute."""
    plan = a_plan(
        behaves(0.5, "error", status=503, retry_after=None),
        an_event(1.0, 0),
        Step(2.0, "reload", {"without": ["r0"], "policies": {}, "lag": 0.0}),
        behaves(10.0, "healthy"),
        Step(30.0, "reload", {"without": [], "policies": {}, "lag": 0.0}),
        horizon=60.0,
    )
    [route] = plan.routes
    plan = replace(plan, routes=(replace(route, is_ordered=True),))
    assert simulate(plan).violation is None
    monkeypatch.setattr(Queues, "wake_returned", lambda *_: None)
    violation = simulate(plan).violation
    assert violation is not None
    assert violation.invariant.startswith("21 ")


def test_a_member_that_waits_for_deleted_records_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = Step(5.0005, "delete", {"kind": "events", "number": 0, "share": 1.0})
    plan = a_plan(*[an_event(5.0, number) for number in range(3)], deleted, an_event(15.0, 3), horizon=20.0)
    plan = replace(plan, faults=("retention",))
    assert simulate(plan).violation is None
    deleted_records_are_waited_for(monkeypatch)
    violation = simulate(plan).violation
    assert violation is not None
    assert violation.invariant == "19 everything ends"


def a_recreated_topic(seconds: float) -> Plan:
    """Make a plan of a retry topic that is recreated after a kick, and of another kick of what came into it then."""

    def kick(at: float) -> Step:
        return Step(at, "order", {"kind": "kick", "name": "destination/d0"})

    plan = a_plan(
        behaves(1.0, "error", status=503, retry_after=None),
        *[an_event(2.0 + number / 10, number) for number in range(3)],
        kick(5.0),
        Step(15.0, "remake", {"kind": "retry", "number": 1, "seconds": seconds}),
        *[an_event(30.0 + number / 10, 3 + number) for number in range(2)],
        kick(36.0),
        behaves(45.0, "healthy"),
        horizon=60.0,
    )
    return replace(plan, faults=("order", "remake"))


@pytest.mark.parametrize(
    ("mutant", "seconds"),
    [
        (a_checkpoint_covers_later_records, 0.0),
        (a_checkpoint_covers_later_records, 10.0),
        (a_job_goes_on_behind_a_topics_end, 0.0),
        (a_job_goes_on_behind_a_topics_end, 10.0),
        (
            a_recreated_topic_is_the_same,
            0.0,
        ),  # of one that was away first, its readers get all partitions anew
    ],
)
def test_a_stale_mention_of_a_deleted_topic_is_found(
    mutant: Mutant, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_recreated_topic(seconds)
    assert simulate(plan).violation is None
    mutant(monkeypatch)
    violation = simulate(plan).violation
    assert violation is not None
    assert violation.invariant == "12 nothing is skipped"


def a_deleted_topic_is_missed_for_ever(patch: pytest.MonkeyPatch) -> None:
    """What was read once is there, or something is wrong."""
    patch.setattr(GroupMember, "deleted_topics", lambda _: set())


def a_deleted_topic_stays_deleted(patch: pytest.MonkeyPatch) -> None:
    """What was deleted is nobody's any more."""
    all_deleted = set[str]()

    async def forgetful(
        log: Log, topics: Topics, needed: Collection[str], subscribed: frozenset[str], deleted: Collection[str]
    ) -> frozenset[str]:
        all_deleted.update(deleted)
        return await wanted_topics(log, topics, needed, subscribed, deleted) - all_deleted

    patch.setattr(router, "wanted_topics", forgetful)


def a_member_ends_without_a_topic(patch: pytest.MonkeyPatch) -> None:
    """A topic that is subscribed to is there."""
    tick = GroupMember.tick

    def strict(self: GroupMember) -> None:
        tick(self)
        assert not any(unread.reason == NO_TOPIC for unread in self.unread.values())

    patch.setattr(GroupMember, "tick", strict)


@pytest.mark.parametrize(
    ("mutant", "returns", "invariant"),
    [
        (a_deleted_topic_is_missed_for_ever, False, "31 a deleted topic of no source is not missed"),
        (a_deleted_topic_stays_deleted, True, "19 everything ends"),
        (a_member_ends_without_a_topic, False, "no bug"),
    ],
)
def test_what_a_deleted_topic_of_a_removed_source_does_is_found(
    mutant: Mutant, invariant: str, monkeypatch: pytest.MonkeyPatch, *, returns: bool
) -> None:
    back = [Step(200.0, "reload", {"without": [], "policies": {}, "lag": 0.0}), an_event(201.0, 9, "s1")]
    plan = a_plan(
        *[an_event(1.0 + number / 10, number, f"s{number % 2}") for number in range(4)],
        Step(10.0, "reload", {"without": ["s1"], "policies": {}, "lag": 0.0}),
        Step(20.0, "retire", {"source": "s1"}),
        *[an_event(40.0 + number, 4 + number) for number in range(4)],
        *(back if returns else []),
        horizon=230.0,
    )
    plan = replace(plan, is_shared=False)
    assert simulate(plan).violation is None
    mutant(monkeypatch)
    violation = simulate(plan).violation
    assert violation is not None
    assert violation.invariant == invariant


def a_redelivery_forgets_its_answer(patch: pytest.MonkeyPatch) -> None:
    """What is asked for is done, whatever was done under that name."""
    patch.setattr(Control, "last_checkpoint", lambda *_: None)


def a_redelivery_goes_everywhere(patch: pytest.MonkeyPatch) -> None:
    """An event belongs to all who take it."""

    def generous(rules: Rules, event: Event, which: Redelivery) -> Sequence[PlannedDelivery] | str:
        return planned(rules, event, replace(which, destination=None))

    patch.setattr(redeliver, "plan", generous)


def a_redelivery_leaves_one_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(redeliver, "plan", lambda *given: planned(*given)[:-1])


def a_redelivery_is_told_and_not_queued(patch: pytest.MonkeyPatch) -> None:
    async def credulous(_self: Injector, deliveries: Iterable[object], _is_wanted: object) -> list[bool]:
        return [True for _ in deliveries]

    patch.setattr(Injector, "inject", credulous)


@pytest.mark.parametrize(
    ("mutant", "invariant"),
    [
        (a_redelivery_forgets_its_answer, "12 a redelivery is done once"),
        (a_redelivery_goes_everywhere, "12 a redelivery is of what was asked for"),
        (a_redelivery_leaves_one_out, "12 nothing is skipped"),
        (a_redelivery_is_told_and_not_queued, "31 a redelivery reports truly"),
    ],
)
def test_a_wrong_redelivery_is_found(mutant: Mutant, invariant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an event that two destinations get, once to all of them and once to one; asked for twice."""

    def asked(at: float, name: str, **narrowed: str) -> Step:
        return Step(at, "redeliver", {"name": name, "event": 1, **narrowed})

    plan = a_plan(
        *[an_event(2.0 + number / 10, number) for number in range(3)],
        *[asked(at, "all") for at in (10.0, 10.001, 20.0)],
        *[asked(at, "one", destination="d1") for at in (30.0, 40.0)],
        horizon=60.0,
    )
    [route] = plan.routes
    plan = replace(
        plan,
        faults=("order", REDELIVERED),
        destinations={**plan.destinations, "d1": plan.destinations["d0"]},
        routes=(replace(route, to=("d0", "d1")),),
    )
    assert simulate(plan).violation is None
    mutant(monkeypatch)
    violation = simulate(plan).violation
    assert violation is not None
    assert violation.invariant == invariant


def test_order_is_seen_where_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_waits_for_the_next_of_its_key(monkeypatch)
    calm = [plan for plan in map(plan_of, range(MANY)) if not plan.faults]
    found = [violation.invariant for plan in calm if (violation := simulate(plan).violation) is not None]
    assert "22 order" in found


def test_a_kick_that_a_lane_does_not_hear_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn plans seldom have destinations that were down for long when all is well again."""
    down = behaves(1.0, "error", status=503, retry_after=None)
    plan = a_plan(down, *[an_event(2.0, number) for number in range(8)], horizon=400.0, schedule=(30.0,))
    [route] = plan.routes
    plan = replace(plan, routes=(replace(route, max_attempts=50),), is_kicked=True)
    assert simulate(plan).violation is None
    monkeypatch.setattr(Lane, "kick", lambda _self: None)
    violation = simulate(plan).violation
    assert violation is not None
    assert violation.invariant == "17 a kick releases everything"
