"""What tells the replayed deliveries of one identity apart, where the log is whole, and where some of it is deleted."""

import pytest

from gateway.engine.jobs.shared_identities import Identities
from gateway.log.base import Record
from gateway.model import EventId, event_id
from tests.builders import an_event

ONE = event_id("github", "1")


def told_apart(
    *events: tuple[EventId, bytes, float], complete_from: int = 0, window: float | None = 60.0, first: int = 10
) -> list[int | None]:
    """Return the offsets in the ids of events, which are an id, a body and a time of append each."""
    identities = Identities(complete_from)
    return [
        identities.offset_in_id(an_event(id=name, body=body), Record(offset, at, b"", body, ()), lambda: window)
        for offset, (name, body, at) in enumerate(events, first)
    ]


def test_only_events_of_one_identity_are_distinguished() -> None:
    two = event_id("github", "2")
    assert told_apart((ONE, b"a", 0.0), (two, b"a", 0.0), (ONE, b"b", 0.0), (EventId("evt_x"), b"", 0.0)) == [
        None,
        None,
        12,
        None,
    ]


@pytest.mark.parametrize(("window", "second"), [(60.0, None), (9.0, 11), (None, 11)])
def test_a_duplicate_has_the_id_of_its_original(window: float | None, second: int | None) -> None:
    assert told_apart((ONE, b"a", 0.0), (ONE, b"a", 10.0), window=window) == [None, second]


def test_behind_deleted_events_each_identity_is_distinguished_and_duplicates_keep_their_id() -> None:
    two, three = event_id("github", "2"), event_id("github", "3")
    events = [
        (ONE, b"a", 0.0),
        (ONE, b"a", 10.0),
        (two, b"b", 10.0),
        (three, b"c", 10.0),
        (EventId("evt_x"), b"", 10.0),
    ]
    assert told_apart(*events, complete_from=13) == [10, 10, 12, None, None]
