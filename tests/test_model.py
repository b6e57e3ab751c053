"""The ids of events."""

import uuid

import pytest

from gateway.model import EventId, event_id, identity_of


def test_an_identity_has_one_id_in_every_process() -> None:
    r"""By `printf 'github\0delivery-1' | b2sum -l 128`, with the version and the variant of RFC 9562, section 5.8."""
    assert event_id("github", "delivery-1") == "evt_b296e10e88678decbf20d8fc94c6e3e8"
    assert event_id("github", "delivery-1") != event_id("gitlab", "delivery-1")


@pytest.mark.parametrize("identity", [None, ""])
def test_no_identity_makes_an_id_of_its_own_each_time(identity: str | None) -> None:
    assert event_id("github", identity) != event_id("github", identity)


@pytest.mark.parametrize(("identity", "version"), [("delivery-1", 8), (None, 7)])
def test_an_id_is_a_uuid(identity: str | None, version: int) -> None:
    for _ in range(50):
        found = uuid.UUID(event_id("github", identity).removeprefix("evt_"))
        assert (found.variant, found.version) == (uuid.RFC_4122, version)


def test_an_id_gives_back_its_identity() -> None:
    found = {identity_of(event_id("github", str(number))) for number in range(100)}
    assert len(found) == 100
    assert {None if digest is None else len(digest) for digest in found} == {16}
    assert {identity_of(event_id("github", None)) for _ in range(100)} == {None}


@pytest.mark.parametrize(
    "text", ["", "evt_", "evt_1", f"evt_{'8' * 31}", f"evt_{'8' * 33}", f"evt_{'8' * 31}x", "8" * 36]
)
def test_a_foreign_id_gives_no_identity(text: str) -> None:
    assert identity_of(EventId(text)) is None
