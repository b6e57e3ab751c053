"""The ledger itself finds what is lost, altered or duplicated without a reason."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tests.faults.accounts import (
    Account,
    Arrival,
    Incident,
    OrderedAccount,
    Origin,
    Written,
    rows_of,
    settle,
    settle_ordered,
)

BODIES = {"one": b'{"n":1,"filler":"x"}', "two": b'{"n":2,"filler":"x"}'}
SENT = {"one": 100.0, "two": 101.0}


def an_arrival(
    event: str,
    destination: str = "ci",
    *,
    at: float = 102.0,
    attempt: int = 1,
    status: int = 200,
    gateway: str = "g1",
    body: bytes = b"",
) -> Arrival:
    return Arrival(
        destination=destination,
        event=event,
        attempt=attempt,
        status=status,
        body=body or BODIES[event],
        origin=Origin(at, gateway),
    )


def an_account(
    arrivals: Sequence[Arrival],
    *,
    dead: Sequence[tuple[str, str]] = (),
    incidents: Sequence[Incident] = (),
    stored: Mapping[str, int] | None = None,
    destinations: Sequence[str] = ("ci",),
    deferred: Mapping[tuple[str, str], Sequence[float]] | None = None,
) -> Account:
    return settle(
        acknowledged=SENT,
        refused=0,
        bodies=BODIES,
        arrivals=arrivals,
        destinations=destinations,
        dead=dead,
        stored=stored or {},
        incidents=incidents,
        deferred=deferred,
    )


BOTH = [an_arrival("one"), an_arrival("two")]


def test_single_deliveries_are_clean() -> None:
    account = an_account(BOTH)
    assert (account.acknowledged, account.delivered) == (2, 2)
    assert (account.slowest, account.latest) == (2.0, {"ci": 2.0})
    assert (account.lost, account.altered, account.duplicated, account.unexplained) == (0, 0, 0, 0)


def test_an_event_that_never_arrived_or_was_refused_is_lost() -> None:
    assert an_account([an_arrival("one")]).lost == 1
    assert an_account([an_arrival("one"), an_arrival("two", status=410)]).lost == 1


def test_a_dead_letter_is_no_loss() -> None:
    account = an_account([an_arrival("one"), an_arrival("two", status=410)], dead=[("two", "ci")])
    assert (account.delivered, account.dead, account.lost) == (1, 1, 0)


def test_a_body_that_differs_is_altered() -> None:
    assert an_account([an_arrival("one"), an_arrival("two", body=BODIES["one"])]).altered == 1


def test_a_duplicate_needs_a_reason() -> None:
    account = an_account([*BOTH, an_arrival("one", at=103.0)])
    assert (account.duplicated, account.unexplained) == (1, 1)


def test_a_crash_explains_its_gateways_last_deliveries() -> None:
    again = [*BOTH, an_arrival("one", at=110.0, gateway="g2")]
    for crash, unexplained in (
        (Incident.crash(102.5, "g1"), 0),
        (Incident.crash(102.5, "g2"), 1),
        (Incident.crash(101.0, "g1"), 1),
        (Incident.crash(104.0, "g1"), 1),
    ):
        assert an_account(again, incidents=[crash]).unexplained == unexplained, crash


def test_a_crash_explains_what_comes_from_a_retry_topic_as_well_as_from_its_event() -> None:
    """It was deferred in the moment before, and then its gateway was killed, and read its event again."""
    crash = Incident.crash(100.0, "g1")
    late = [an_arrival("one", at=103.0), an_arrival("one", at=107.0), an_arrival("two")]
    place = ("one", "ci")
    assert an_account(late, incidents=[crash]).unexplained == 1
    assert an_account(late, incidents=[crash], deferred={place: [99.9]}).unexplained == 0
    assert an_account(late, incidents=[crash], deferred={place: [103.5]}).unexplained == 1
    assert an_account(late, deferred={place: [99.9]}).unexplained == 1
    thrice = [*late, an_arrival("one", at=108.0)]
    assert an_account(thrice, incidents=[crash], deferred={place: [99.9]}).unexplained == 1


def test_a_crash_explains_one_duplicate() -> None:
    copies = [an_arrival("two"), *[an_arrival("one", at=at) for at in (102.0, 103.0, 104.0)]]
    first, second = Incident.crash(102.1, "g1"), Incident.crash(103.1, "g1")
    assert an_account(copies, incidents=[first]).unexplained == 1
    assert an_account(copies, incidents=[first, second]).unexplained == 0


def test_a_fault_of_the_log_explains_no_more_than_could_not_be_committed() -> None:
    again = [*BOTH, an_arrival("one", at=103.0), an_arrival("two", at=103.0)]
    for at_most in (0, 1, 2):
        fault = Incident(since=101.0, until=102.5, at_most=at_most)
        account = an_account(again, incidents=[fault])
        assert (account.duplicated, account.allowed, account.unexplained) == (2, at_most, 2 - at_most)


def test_a_fault_of_one_destination_explains_nothing_at_another() -> None:
    arrivals = [an_arrival("one", name, at=at) for name in ("ci", "other") for at in (102.0, 103.0)]
    for name in ("ci", "other"):
        fault = Incident(since=101.0, until=102.5, destination=name, at_most=10)
        account = an_account(arrivals, incidents=[fault], destinations=["ci", "other"])
        assert (account.duplicated, account.unexplained) == (2, 1)
        assert f"at {'other' if name == 'ci' else 'ci'}: " in account.oddities[0]


def test_a_destination_that_gets_an_event_late_is_not_excused_by_one_that_got_it_at_once() -> None:
    arrivals = [*BOTH, an_arrival("one", "other", at=130.0), an_arrival("two", "other", at=101.5)]
    account = an_account(arrivals, destinations=["ci", "other"])
    assert (account.slowest, account.latest) == (30.0, {"ci": 2.0, "other": 30.0})


def test_another_attempt_is_no_duplicate() -> None:
    account = an_account([*BOTH, an_arrival("one", at=103.0, attempt=2)])
    assert (account.retried, account.duplicated) == (1, 0)


def test_a_repeated_attempt_may_have_left_two_successors() -> None:
    repeated = [*BOTH, an_arrival("one", at=103.0)]
    twice = [an_arrival("one", at=108.0, attempt=2), an_arrival("one", at=109.0, attempt=2)]
    account = an_account(repeated + twice, incidents=[Incident.crash(102.1, "g1")])
    assert (account.duplicated, account.allowed, account.unexplained) == (2, 3, 0)
    assert an_account(BOTH + twice).unexplained == 1


def test_a_record_that_the_producer_wrote_twice_is_delivered_twice() -> None:
    account = an_account([*BOTH, an_arrival("one", at=103.0)], stored={"one": 2, "two": 1})
    assert (account.stored_again, account.duplicated, account.unexplained) == (1, 0, 0)


def test_a_table_has_a_line_for_each_account() -> None:
    heading, row = rows_of([("killed", an_account(BOTH))])
    assert heading.split()[:3] == ["fault", "acknowledged", "refused"]
    assert row.split() == ["killed", "2", "0", "2", *["0"] * 8, "2.0", "s"]


def test_a_gateway_evicted_without_knowing_may_send_duplicates() -> None:
    twice = [*BOTH, an_arrival("one", at=103.5, gateway="g2")]
    woken = Incident(since=103.0, until=106.0, gateway="g2")
    assert an_account(twice, incidents=[woken]).unexplained == 1
    assert an_account(twice, incidents=[replace(woken, is_zombie=True)]).unexplained == 0
    assert an_account(twice, incidents=[replace(woken, is_zombie=True, gateway="g3")]).unexplained == 1


WRITTEN = {
    "a": [Written("k", 2, 0)],
    "b": [Written("k", 2, 1)],
    "c": [Written("k", 7, 0)],
    "d": [Written("k", 7, 1)],
    "x": [Written("another", 2, 2)],
}
"""Two events of a key, two more of it after its topic has grown, and one of another key."""


def an_ordered_account(answered: str, *, twice: str = "") -> OrderedAccount:
    written = WRITTEN | {event: [*WRITTEN[event], Written("k", 7, 2)] for event in twice}
    return settle_ordered(acknowledged=WRITTEN, answered=list(answered), written=written, settled={"c", "d"})


def test_deliveries_in_the_order_of_their_key_are_clean() -> None:
    for answered in ("abcdx", "xabcd", "axbcd"):
        assert an_ordered_account(answered) == OrderedAccount(lost=0, repeated=0, apart=0, misplaced=0)


def test_an_event_that_comes_after_a_later_one_of_its_key_is_misplaced() -> None:
    for answered, misplaced in (("bacdx", "a"), ("abdcx", "c"), ("acdbx", "b"), ("cdabx", "ab")):
        account = an_ordered_account(answered)
        assert (account.lost, account.repeated, account.apart, account.misplaced) == (0, 0, 0, len(misplaced)), answered
        assert account.oddities == tuple([f"key k: {event} at {WRITTEN[event]}" for event in misplaced])


def test_an_event_may_come_again_right_after_itself_and_not_after_a_later_one() -> None:
    account = an_ordered_account("aabcddx")
    assert (account.repeated, account.apart, account.misplaced) == (2, 0, 0)
    account = an_ordered_account("abacdx")
    assert (account.repeated, account.apart, account.misplaced) == (0, 1, 0)
    assert an_ordered_account("abacdx", twice="a").apart == 0


def test_an_event_that_an_ordered_route_never_delivers_is_lost() -> None:
    assert an_ordered_account("abcd").lost == 1
