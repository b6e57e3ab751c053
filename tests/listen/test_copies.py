"""What a copy of an event is, and where it may go."""

from base64 import b64encode
from typing import Any

import pytest

from gateway.client.egress import EgressRefusedError
from gateway.listen.copies import copy_of, target_of
from gateway.model import UsageError


def raw(*headers: tuple[bytes, bytes], body: bytes = b"{}") -> dict[str, Any]:
    return {
        "id": "evt_1",
        "headers": [
            {"name_base64": b64encode(name).decode(), "value_base64": b64encode(value).decode()}
            for name, value in headers
        ],
        "body_base64": b64encode(body).decode(),
    }


def test_headers_of_the_connection_stay_behind_and_the_others_are_as_they_came() -> None:
    kept = (
        (b"X-Sig", b"\xff=1"),
        (b"x-sig", b"2"),
        (b"User-Agent", b"GitHub-Hookshot/1"),
        (b"X-Forwarded-For", b"::1"),
    )
    connection = (
        *((b"Host", b"hooks.example"), (b"Connection", b"X-Hop, close"), (b"x-hop", b"1"), (b"Content-Length", b"7")),
        *((b"Transfer-Encoding", b"chunked"), (b"TE", b"trailers"), (b"Upgrade", b"h2c"), (b"gateway_event_id", b"x")),
    )
    copy = copy_of(raw(*connection, *kept, body=b"\x00\xff"), "http://localhost/")
    assert copy.headers == (*kept, (b"gateway-event-id", b"evt_1"))
    assert copy.body == b"\x00\xff"


@pytest.mark.parametrize("answer", [{}, {"headers": [{}]}, {**raw(), "body_base64": 7}, {**raw(), "headers": None}])
def test_what_is_no_event_is_an_error_of_a_known_kind(answer: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        copy_of(answer, "http://localhost/")


@pytest.mark.parametrize(
    "url", ["http://localhost:3000/a", "https://127.0.0.2/", "http://[::1]:1/", "http://a.LOCALHOST"]
)
def test_copies_go_to_this_machine_alone(url: str) -> None:
    guard = target_of(url, allowed_host=None).guard
    guard.check("127.0.0.1")
    guard.check("::1")
    for address in ("192.0.2.1", "10.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "0.0.0.0", "fe80::1%eth0"):
        with pytest.raises(EgressRefusedError):
            guard.check(address)


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1/", "http://devbox/", "http://localhost.example/", "http://2130706433/", "http://[::2]/"]
)
def test_another_host_has_to_be_named(url: str) -> None:
    with pytest.raises(UsageError, match="expected an address of this machine"):
        target_of(url, allowed_host=None)
    with pytest.raises(UsageError, match="expected an address of this machine"):
        target_of(url, allowed_host="other")


@pytest.mark.parametrize(
    ("url", "host"),
    [("http://devbox:3000/", "DevBox"), ("http://[fd00::2]:1/", "[fd00::2]"), ("http://10.0.0.2/", "10.0.0.2")],
)
def test_a_host_that_is_named_may_be_anywhere_but_where_credentials_are_served(url: str, host: str) -> None:
    guard = target_of(url, allowed_host=host).guard
    guard.check("10.0.0.2")
    with pytest.raises(EgressRefusedError):
        guard.check("169.254.169.254")


@pytest.mark.parametrize(
    "url", ["", "localhost:3000", "ftp://localhost/", "http://", "http://a:b@localhost/", "http://[x/"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="expected a URL such as"):
        target_of(url, allowed_host=None)
