"""What of a destination's response a waiting sender gets: nothing that repeats a credential, in bounded time."""

import gzip
import time
import zlib
from dataclasses import replace

import pytest

from gateway.client.client import SENDERS_RESPONSE_LIMIT
from gateway.client.observation import Observation
from gateway.client.own_credentials import WithoutCredentials
from gateway.client.request import Outbound, compose
from gateway.model import DestinationResponse
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Egress, Rules
from tests.builders import a_delivery, a_destination

TOKEN = b"a-token-0815-for-this-destination"
FETCHED = b"Bearer fetched-0815-from-the-issuer"
DESTINATION = a_destination("ci", headers=(("Authorization", f"Bearer {TOKEN.decode()}"),))
RULES = Rules(sources={}, destinations={"ci": DESTINATION}, routes={}, egress=Egress(), table=RouteTable([]), files=())


class Senders:
    def __init__(self) -> None:
        self.got: list[DestinationResponse | str | None] = []

    def wait_for(self, outbound: Outbound) -> bool:  # noqa: ARG002 - the protocol's signature
        return True

    def take(self, outbound: Outbound, response: DestinationResponse | None) -> None:  # noqa: ARG002 - as above
        self.got.append(response)

    def is_for_them(self, response: DestinationResponse) -> bool:
        return response.status < 500

    def withhold(self, outbound: Outbound) -> None:  # noqa: ARG002 - as above
        self.got.append("withheld")


def got(
    body: bytes,
    coding: bytes | None = None,
    *,
    content_type: bytes = b"text/plain",
    rules: Rules = RULES,
    status: int = 200,
) -> bytes | str | None:
    """Return the body if the sender gets it; None, or "withheld"."""
    senders = Senders()
    seen = Observation(lambda: 0.0)
    seen.authorizations = (FETCHED,)
    outbound = replace(compose(a_delivery(destination="ci"), DESTINATION, None, now=0.0), observation=seen)
    response = DestinationResponse(status=status, content_type=content_type, content_encoding=coding, body=body)
    WithoutCredentials(senders, lambda: rules).take(outbound, response)
    [found] = senders.got
    return found.body if isinstance(found, DestinationResponse) else found


@pytest.mark.parametrize("secret", [TOKEN, FETCHED])
def test_a_response_that_repeats_a_credential_is_withheld(secret: bytes) -> None:
    page = b"you have sent: " + secret
    assert got(page) == "withheld"
    assert got(gzip.compress(page), b"gzip") == "withheld"
    assert got(gzip.compress(zlib.compress(page)), b"deflate, gzip") == "withheld"
    assert got(b"", content_type=b"text/plain; echo=" + secret) == "withheld"
    in_json = b'{"sent": "' + secret.replace(b"-", b"\\u002D") + b'"}'  # as .NET writes what it takes for unsafe
    assert got(in_json) == "withheld"
    assert got(gzip.compress(in_json), b"gzip") == "withheld"


def test_a_response_that_no_sender_gets_anyway_is_not_told_as_withheld() -> None:
    assert got(b"you have sent: " + TOKEN, status=500) is None


def test_a_response_of_a_destination_that_the_rules_have_no_more_is_withheld() -> None:
    assert got(b"done", rules=replace(RULES, destinations={})) == "withheld"


@pytest.mark.parametrize("coding", [None, b"gzip", b"br"])
def test_any_other_response_is_passed_on_as_it_came(coding: bytes | None) -> None:
    body = gzip.compress(b"done") if coding == b"gzip" else b"done"
    assert got(body, coding) == body


def test_what_cannot_be_decompressed_is_passed_on_as_it_came() -> None:
    assert got(b"no gzip", b"gzip") == b"no gzip"


def test_a_response_that_is_long_once_it_is_decompressed_takes_nobodys_time() -> None:
    """A kilobyte may become a mebibyte, which would be looked through for each form of each credential."""
    at_most, longer = [gzip.compress(b"a" * size) for size in (SENDERS_RESPONSE_LIMIT, 1 << 20)]
    assert got(at_most, b"gzip") == at_most
    began = time.thread_time()
    for _ in range(20):
        assert got(longer, b"gzip") is None
    assert (time.thread_time() - began) / 20 < 0.003
