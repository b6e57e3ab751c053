"""What the simulation has found, each as the smallest plan that shows it."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulation.plan import Plan, RouteSpec, Step, decode, plan_of
from tests.simulation.world import simulate

pytestmark = pytest.mark.rotated(share=1 / 5, group="regressions")


def a_plan(*steps: Step, horizon: float, timeout: float = 10.0, schedule: tuple[float, ...] = (20.0,)) -> Plan:
    """Make a plan of one process, two sources, and one route to one destination."""
    return replace(
        plan_of(0),
        faults=("reload", "trouble"),
        processes=1,
        partitions=1,
        tier_partitions=1,
        nodes=1,
        skew=0.0,
        horizon=horizon,
        sources=("s0", "s1"),
        windows={},
        destinations={"d0": {"timeout": timeout, "concurrency": 50, "rate": None, "latency": 0.02}},
        routes=(
            RouteSpec(
                name="r0",
                sources=("s0", "s1"),
                types=None,
                to=("d0",),
                schedule=schedule,
                max_attempts=3,
                max_age=3600.0,
                jitter=0.0,
            ),
        ),
        steps=steps,
    )


def an_event(at: float, number: int, source: str = "s0", *, kind: str = "push") -> Step:
    what = {
        "n": number,
        "source": source,
        "id": f"evt_{number}",
        "type": kind,
        "key": None,
        "size": 10,
        "body": number,
    }
    return Step(at, "event", what)


def behaves(at: float, kind: str, **how: object) -> Step:
    return Step(at, "behave", {"destination": "d0", "kind": kind, **how})


def test_an_event_of_an_unknown_source_is_no_duplicate_of_itself() -> None:
    """Each of its records carries the next step, also while an older one of the same tier stays unfinished for long."""
    plan = a_plan(
        behaves(0.5, "error", status=500, retry_after=None),
        an_event(1.0, 0),
        Step(1.5, "reload", {"without": ["s1"], "policies": {}}),
        an_event(4.5, 1, "s1"),
        behaves(5.0, "hang"),
        horizon=60.0,
        timeout=30.0,
    )
    check(plan)


def test_an_event_of_an_unknown_source_waits_though_its_leader_has_a_slow_clock() -> None:
    """By the leader's clock it is due as soon as it is there."""
    plan = a_plan(Step(0.5, "reload", {"without": ["s1"], "policies": {}}), an_event(5.0, 0, "s1"), horizon=30.0)
    for seed in range(6):
        check(replace(plan, seed=seed, skew=30.0, faults=("reload", "skew")))


def test_a_delivery_beyond_the_commits_window_is_not_begun() -> None:
    """A gap puts the last event beyond the window of those that wait for the rate of their destination."""
    plan = a_plan(
        Step(0.9, "rebalance"),
        *(an_event(1.0, number, kind="slow") for number in range(3)),
        Step(1.05, "gap", {"number": 0, "count": 100}),
        an_event(1.1, 3, kind="fast"),
        horizon=30.0,
    )
    [route] = plan.routes
    check(
        replace(
            plan,
            faults=("gap", "rebalance"),
            window=40,
            sources=("s0",),
            destinations={"d0": {**plan.destinations["d0"], "rate": 2.0}, "d1": plan.destinations["d0"]},
            routes=(
                replace(route, sources=("s0",), types=("slow",)),
                replace(route, name="r1", sources=("s0",), types=("fast",), to=("d1",)),
            ),
        )
    )


def test_a_resume_skips_nothing_wherever_it_is_killed() -> None:
    for steps in range(1, 120, 3):
        plan = a_plan(
            Step(0.5, "order", {"kind": "pause", "name": "destination/d0"}),
            *(an_event(2.0, number) for number in range(3)),
            Step(10.0, "order", {"kind": "resume", "name": "destination/d0"}),
            Step(10.0, "crash", {"process": "p0", "steps": steps, "again": 0.1}),
            horizon=30.0,
        )
        check(replace(plan, faults=("orders", "crash")))


def test_an_ordered_route_whose_condition_widens_keeps_the_order_wherever_a_process_is_killed() -> None:
    """What only the new condition matches may then be behind what was delivered by the old one, and is left out."""

    def keyed(at: float, number: int, kind: str) -> Step:
        step = an_event(at, number, kind=kind)
        return replace(step, what={**step.what, "key": "k"})

    for steps in range(20, 320, 100):
        for lag in (0.0, 2.0):
            plan = a_plan(
                Step(0.5, "behave", {"destination": "d1", "kind": "slow", "latency": 6.0}),
                keyed(2.0, 0, "open"),
                keyed(2.05, 1, "push"),
                Step(2.1, "reload", {"without": [], "policies": {}, "changes": {"r0": {"types": None}}, "lag": lag}),
                keyed(2.15, 2, "open"),
                keyed(2.2, 3, "push"),
                Step(2.6, "crash", {"process": "p0", "steps": steps, "again": 0.1}),
                keyed(3.0, 4, "open"),
                Step(9.0, "behave", {"destination": "d1", "kind": "healthy"}),
                horizon=30.0,
            )
            [route] = plan.routes
            check(
                replace(
                    plan,
                    faults=("reload", "crash"),
                    sources=("s0",),
                    destinations={**plan.destinations, "d1": plan.destinations["d0"]},
                    routes=(
                        replace(route, sources=("s0",), types=("push",), is_ordered=True),
                        replace(route, name="r1", sources=("s0",), to=("d1",)),
                    ),
                )
            )


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "plans").glob("*.json")), ids=lambda path: path.stem)
def test_earlier_failures_stay_fixed(path: Path) -> None:
    """As plans in files, since a seed is another world whenever plans are drawn differently.

    stale-commit                a commit that aiokafka repeats in the next generation, since the revocation had none
    stale-commit-after-expiry   the same, of an evicted member
    append-by-a-killed-process  it puts away an event of an unknown source
    backlog-behind-a-rate-that-leaves-its-queue-at-once     all of it is due at the same moment, again and again
    hold-by-a-clock-that-was-ahead          a destination asks for 8 s of silence, and the clock goes back by an hour
    cut-short-after-the-clock-was-set-back  by the clock the attempt ends before it began, and no record can say so
    halted-route-removed                    the last attempt of a route that halts outlives the route
    deletion-from-a-route-that-lost-its-order       no member is left to count the unfinished records that were deleted
    deletion-behind-a-tiers-last-record             no commit passes the deleted records, since nothing comes after them
    deletion-from-a-topic-without-commits           without a commit nobody can know of them, and nobody looks
    two-events-of-one-identity-with-order           the second is taken for the first, whose record has been deleted
    two-log-starts-that-overtake-a-member-at-once   one gets its next record while the other's start is asked
    recreated-topic-as-long-as-it-was-read          its bounds don't show that it is another
    dead-letters-in-a-topic-recreated-after-a-replay    they are below those that the replay has resolved
    undelivered-after-a-replay-whose-route-changed      by which rules it has brought what isn't stored
    undelivered-before-it-was-routed-by-other-rules     a replay leaves it to a router that is killed before it reads it
    resume-whose-early-checkpoint-is-appended-late      compaction leaves that one, and nothing of the last
    parked-in-a-topic-recreated-after-a-resume          it is below the offset at which the resume ended
    parked-late-in-a-topic-recreated-during-a-resume    it is soon as long as the one that was rescanned
    delivered-before-one-with-other-rules-goes-on       a replay can't know of it, as its record wasn't done
    retried-for-a-route-that-no-longer-matches          it did when the event was read
    retried-for-a-route-with-a-new-destination          the old destination still exists
    second-reload-before-the-first-takes-effect     each lets an ordered route match more
    reload-before-a-returning-partition-is-read     one of its older events is still in flight
    retry-of-a-route-whose-source-leaves-and-returns    before it is due, and its partition moves meanwhile
    reload-that-moves-a-source-amid-older-events    its old topic is still read, and appended to
    former-topics-commit-beyond-the-end     the recreated topic grows up to it, and a kick takes the records for done
    evicted-reader-goes-by-rules-that-came-back  its successor left the event out by those before, and went on
    evicted-member-back-at-a-recreated-tier     the offsets that it finishes are those of new records
    duplicates-in-a-recreated-tier              both lie below the position of a reader that takes it for the former one
    kick-whose-scan-meets-a-recreated-tier      it ends before the end that the kick looked up
    kick-behind-one-whose-tier-was-recreated    what the first scanned there vouches for nothing that came before
    attempts-that-hang-before-a-gap             each of them keeps what comes behind it from being read
    dead-letters-of-a-clock-that-is-ahead-before-a-gap  the last record below the command's end is before the gap
    retries-that-wait-before-a-gap              so does each of these, for as long as it waits
    delayed-deliveries-that-wait-before-a-gap           the shortest tier makes them late, but not by more than it takes
    delayed-behind-a-window-full-of-what-waits  a small window of a tier is full of what another destination waits for
    appended-again-by-a-route-that-is-debounced-again   what it had appended meanwhile, undebounced, is no duplicate
    decided-at-last-and-not-wanted-by-then      its condition failed, and was evaluated too late
    kicked-in-a-tier-whose-clock-was-set-back           until then its records are of the future, and so never due
    window-full-of-what-a-clock-that-is-ahead-returns   all of it goes back to its tier, again and again
    an-append-without-an-acknowledgement-before-its-key-changes    the next router appends it to another partition
    two-attempts-of-one-number-that-took-as-long    a record of the second isn't one of the first
    redelivery-from-a-partition-that-another-waited-for     that one has ended, and nobody looks whether it can be read
    events-appended-again-after-retention       an ordered topic has deleted that they came, and the router starts over
    replay-beside-a-dead-letter-of-a-newer-version      it ends there, and says so (the ledger was wrong)
    dropped-by-a-newer-version                  a process of the older one replays it, as it can't read that
    replay-before-its-topic-is-recreated        it is of none of the new topic's events (the ledger was wrong)
    kick-of-what-was-delayed                    a kick makes it as old as its event, and it expires at once
    clock-set-back-before-a-crash-and-new-rules what they match newly is taken for a recreated topic's, and so is what
                                                follows, which is delivered again (the ledger was wrong)
    kick-that-moves-before-it-is-answered       a halted key tries once more (the ledger was wrong)
    unmatched-by-new-rules-once-attempted       after a crash, too, what a condition failed for is matched by the rules
                                                of then, and the next of its key begins (the ledger was wrong)
    commit-sent-again-after-its-topic-was-recreated     it speaks of the former one, and says so (the broker was wrong)
    kick-of-what-another-kick-has-split         it counts the whole event, which isn't committed yet, beside its items
    replay-whose-dead-letters-are-recreated     what it resolves was in the former topic (the ledger was wrong)
    split-once-due-and-handed-over-before       its items began late for what their event had waited (the ledger was
                                                wrong)
    append-of-an-evicted-router-that-knows-by-now
                                                it was sent before that, and is stored after it has rejoined (the ledger
                                                was wrong)
    recreated-while-it-is-replayed              what the new topic has where the former was read isn't left out (the
                                                ledger was wrong)
    replay-of-what-is-split-appended-twice      its items are delivered twice, as it is (the ledger was wrong)
    hang-while-a-process-stops                  nobody reads its partitions until an attempt that hangs has ended
    kick-that-two-owners-hear                   each lets the key's delivery be tried again (the ledger was wrong)
    rate-by-a-clock-that-leaps                  the log's leaps with each older record that is read, and a burst was due
    expired-since-a-kick-ended-its-delay        its age begins with the kick (the ledger was wrong)
    unmatched-once-its-destination-is-gone      what a condition failed for waits for that, and isn't dropped
    """
    check(decode(path.read_bytes()))


def check(plan: Plan) -> None:
    outcome = simulate(plan)
    assert outcome.violation is None, str(outcome.violation)
