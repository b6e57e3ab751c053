"""How many wrong tokens an address may try."""

import pytest

from gateway.access.guesses import BURST, MAX_NETWORKS, SECONDS, Guesses, client_of
from tests.builders import NOW


def test_a_few_are_free_then_one_at_a_time() -> None:
    guesses = Guesses()
    for _ in range(BURST):
        assert guesses.seconds_to_wait("192.0.2.1", NOW) == 0
        guesses.add("192.0.2.1", NOW)
    assert guesses.seconds_to_wait("192.0.2.1", NOW) == SECONDS
    assert guesses.seconds_to_wait("192.0.2.1", NOW + SECONDS - 1) == pytest.approx(1)
    assert guesses.seconds_to_wait("192.0.2.1", NOW + SECONDS) == 0
    guesses.add("192.0.2.1", NOW + SECONDS)
    assert guesses.seconds_to_wait("192.0.2.1", NOW + SECONDS) == SECONDS
    assert guesses.seconds_to_wait("192.0.2.1", NOW + 3600) == 0


def test_in_a_day_somebody_tries_few() -> None:
    guesses, tried = Guesses(), 0
    for second in range(86_400):
        if not guesses.seconds_to_wait("192.0.2.1", NOW + second):
            guesses.add("192.0.2.1", NOW + second)
            tried += 1
    assert tried <= BURST + 86_400 / SECONDS


def test_who_has_an_ipv6_site_has_one_share_and_others_have_their_own() -> None:
    guesses = Guesses()
    for number in range(BURST):
        guesses.add(f"2001:db8:1:{number}::1", NOW)
    assert guesses.seconds_to_wait("2001:db8:1:ffff::2", NOW) > 0
    assert guesses.seconds_to_wait("2001:db8:2::1", NOW) == 0
    assert guesses.seconds_to_wait("192.0.2.1", NOW) == 0
    for _ in range(BURST):
        guesses.add("::ffff:192.0.2.1", NOW)
    assert guesses.seconds_to_wait("192.0.2.1", NOW) > 0


def test_peers_without_an_address_share_one() -> None:
    guesses = Guesses()
    for _ in range(BURST):
        guesses.add(None, NOW)
    assert guesses.seconds_to_wait("", NOW) > 0


def test_memory_is_bounded_and_who_tries_now_is_remembered() -> None:
    guesses = Guesses()
    for _ in range(BURST):
        guesses.add("192.0.2.1", NOW)
    for number in range(MAX_NETWORKS - 1):
        guesses.add(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", NOW + 1)
    assert guesses.seconds_to_wait("192.0.2.1", NOW + 1) > 0
    guesses.add("192.0.2.1", NOW + 1)
    guesses.add("172.16.0.1", NOW + 1)
    assert len(guesses) == MAX_NETWORKS
    assert guesses.seconds_to_wait("192.0.2.1", NOW + 1) > 0  # it isn't the oldest


def test_a_clock_that_is_set_back_gives_nothing_for_free() -> None:
    guesses = Guesses()
    for _ in range(BURST):
        guesses.add("192.0.2.1", NOW)
    assert guesses.seconds_to_wait("192.0.2.1", NOW - 3600) == SECONDS


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ([], "10.1.0.1"),
        (["192.0.2.1"], "192.0.2.1"),
        (["192.0.2.1, 192.0.2.2 "], "192.0.2.2"),
        (["192.0.2.1", "2001:db8::1"], "2001:db8::1"),
        (["192.0.2.1, unknown"], "10.1.0.1"),
        (["192.0.2.1,"], "10.1.0.1"),
        (["192.0.2.1:8443"], "10.1.0.1"),
    ],
)
def test_a_client_is_who_the_last_proxy_says_and_without_its_word_the_peer(forwarded: list[str], client: str) -> None:
    assert client_of("10.1.0.1", forwarded) == client
