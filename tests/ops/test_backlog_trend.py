"""What two looks at a topic tell: that it grows, shrinks, or that nobody finishes anything of it."""

import pytest

from gateway.ops.backlog_trend import APART, Look, trend_of, with_trend
from gateway.ops.findings import NOT_READ, WAITING, Finding
from gateway.ops.unfinished import Reading, Unfinished

NOW = 1_700_000_000.0
EVENTS = Reading("gateway.events.github", "gateway.router", None, ("github",))
ORDERED = Reading("gateway.ordered.book.TO.ledger", "gateway.ordered/book/ledger", ("book", "ledger"))
LATE = Finding(rank=WAITING, what="source github", why="events not yet routed and delivered", count=5)


def looks(*seen: tuple[float, int, int]) -> list[Look]:
    """Return looks, of each how many seconds after the first, how many aren't finished, and how many are."""
    return [Look(NOW + at, Unfinished(number, NOW, 6, finished)) for at, number, finished in seen]


def test_one_look_or_two_in_a_row_tell_nothing() -> None:
    assert trend_of([]) is None
    assert trend_of(looks((0, 5, 0))) is None
    assert trend_of(looks((0, 5, 0), (APART - 1, 9, 0))) is None
    assert with_trend(LATE, EVENTS, None, is_idle=False) == LATE


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        (((0, 5, 100), (120, 905, 110)), "; 900 more than 2 minutes ago"),
        (((0, 1905, 100), (120, 905, 1110)), "; 1,000 fewer than 2 minutes ago"),
        (((0, 5, 100), (120, 5, 110)), "; as many as 2 minutes ago"),
        (((0, 5, 100), (60, 7, 110), (120, 9, 110)), "; none was finished for 1 minute"),
        (((0, 5, 100), (100, 7, 110), (120, 9, 110)), "; 4 more than 2 minutes ago"),
    ],
)
def test_what_has_changed_is_told(seen: tuple[tuple[float, int, int], ...], told: str) -> None:
    found = with_trend(LATE, EVENTS, trend_of(looks(*seen)), is_idle=False)
    assert found.why == LATE.why + told
    assert ("gateway status --admin HOST:PORT" in found.next) == ("more" in told or "none" in told)


def test_a_topic_that_was_made_anew_has_no_trend() -> None:
    assert trend_of(looks((0, 5, 100), (120, 3, 2))) is None


def test_a_group_without_members_is_read_by_nobody() -> None:
    found = with_trend(LATE, EVENTS, trend_of(looks((0, 5, 100), (120, 9, 110))), is_idle=True)
    assert found.rank == NOT_READ
    assert found.why.endswith("no process reads them, as the group gateway.router has no member")
    assert found.next[-1] == "gateway run --role router"


def test_an_ordered_route_that_stands_still_may_have_a_halted_key_unless_it_is_paused() -> None:
    trend = trend_of(looks((0, 5, 100), (120, 9, 100)))
    found = with_trend(LATE, ORDERED, trend, is_idle=False)
    assert found.why.endswith("none was finished for 2 minutes; a key may be halted")
    assert found.next[-1] == "gateway route kick book"
    paused = with_trend(LATE, ORDERED, trend, is_idle=False, pauses=("gateway route resume book",))
    assert (paused.why, paused.next) == (LATE.why, ("gateway route resume book",))
