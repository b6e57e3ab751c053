"""How many wrong tokens an address may try."""

import pytest

from gateway.access.throttle import BURST, MAX_NETWORKS, SECONDS, Throttle, client_of
from tests.builders import NOW


def test_a_few_are_free_then_one_at_a_time() -> None:
    throttle = Throttle()
    for _ in range(BURST):
        assert throttle.seconds_to_wait("192.0.2.1", NOW) == 0
        throttle.add("192.0.2.1", NOW)
    assert throttle.seconds_to_wait("192.0.2.1", NOW) == SECONDS
    assert throttle.seconds_to_wait("192.0.2.1", NOW + SECONDS - 1) == pytest.approx(1)
    assert throttle.seconds_to_wait("192.0.2.1", NOW + SECONDS) == 0
    throttle.add("192.0.2.1", NOW + SECONDS)
    assert throttle.seconds_to_wait("192.0.2.1", NOW + SECONDS) == SECONDS
    assert throttle.seconds_to_wait("192.0.2.1", NOW + 3600) == 0


def test_in_a_day_somebody_tries_few() -> None:
    throttle, tried = Throttle(), 0
    for second in range(86_400):
        if not throttle.seconds_to_wait("192.0.2.1", NOW + second):
            throttle.add("192.0.2.1", NOW + second)
            tried += 1
    assert tried <= BURST + 86_400 / SECONDS


def test_who_has_an_ipv6_site_has_one_share_and_others_have_their_own() -> None:
    throttle = Throttle()
    for number in range(BURST):
        throttle.add(f"2001:db8:1:{number}::1", NOW)
    assert throttle.seconds_to_wait("2001:db8:1:ffff::2", NOW) > 0
    assert throttle.seconds_to_wait("2001:db8:2::1", NOW) == 0
    assert throttle.seconds_to_wait("192.0.2.1", NOW) == 0
    for _ in range(BURST):
        throttle.add("::ffff:192.0.2.1", NOW)
    assert throttle.seconds_to_wait("192.0.2.1", NOW) > 0


def test_peers_without_an_address_share_one() -> None:
    throttle = Throttle()
    for _ in range(BURST):
        throttle.add(None, NOW)
    assert throttle.seconds_to_wait("", NOW) > 0


def test_memory_is_bounded_and_who_tries_now_is_remembered() -> None:
    throttle = Throttle()
    for _ in range(BURST):
        throttle.add("192.0.2.1", NOW)
    for number in range(MAX_NETWORKS - 1):
        throttle.add(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", NOW + 1)
    assert throttle.seconds_to_wait("192.0.2.1", NOW + 1) > 0
    throttle.add("192.0.2.1", NOW + 1)
    throttle.add("172.16.0.1", NOW + 1)
    assert len(throttle) == MAX_NETWORKS
    assert throttle.seconds_to_wait("192.0.2.1", NOW + 1) > 0  # it isn't the oldest


def test_a_clock_that_is_set_back_gives_nothing_for_free() -> None:
    throttle = Throttle()
    for _ in range(BURST):
        throttle.add("192.0.2.1", NOW)
    assert throttle.seconds_to_wait("192.0.2.1", NOW - 3600) == SECONDS


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
