"""Each handshake's response as it comes over the wire, compared byte for byte with what the vendor's document shows.

The requests are those of the documents, too. Where a document shows a signature without its secret, ours is by the
secret below, by openssl: `printf %s CHALLENGE | openssl dgst -sha256 -hmac SECRET`. JSON is without blanks.
"""

import asyncio
import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from gateway.rules.rules import Source
from gateway.verify.handshakes import HANDSHAKES
from gateway.verify.schemes import build_verifier
from tests.ingress.test_handshake_time import WITHIN, a_head, a_post
from tests.ingress.test_ingress import a_request, running, some_rules
from tests.ingress.test_subscriptions import CERTIFICATE
from tests.machine_speed import slowness
from tests.verify.test_sns import VERIFIER, signed

SECRET = "token-of-32-characters-012345678"
TRIES = 7
CHALLENGE = "3eZbrw1aBm2rZgRNFdxV2595E9CY3gmdALWMmHkvFXO7tYXAYM8P"
ASANAS = "b537207f20cbfa02357cf448134da559e8bd39d61597dcd5631b8012eae53e81"
GRIDS = b"""[{
  "id": "2d1781af-3a4c-4d7c-bd0c-e34b19da4e66",
  "topic": "/subscriptions/xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx",
  "subject": "",
  "data": {"validationCode": "512d38b6-c7b8-40c8-89fe-f46f9e9622b6",
           "validationUrl": "https://rp-eastus2.eventgrid.azure.net:553/eventsubscriptions/myeventsub/validate"},
  "eventType": "Microsoft.EventGrid.SubscriptionValidationEvent",
  "eventTime": "2022-10-28T04:23:35.1981776Z",
  "metadataVersion": "1",
  "dataVersion": "1"
}]"""
NO_SNIFFING = "X-Content-Type-Options: nosniff"
TEXT, JSON = ("Content-Type: text/plain", NO_SNIFFING), ("Content-Type: application/json", NO_SNIFFING)
NOTHING = ("Content-Type: text/plain",)
OURS = {"content-length", "date", "server"}
"""Headers that are there beside those of a document; RFC 9110 has them for every response."""


class Documented(NamedTuple):
    """A request, and the response to it: the headers that matter, and the body."""

    url: str
    request: bytes
    headers: tuple[str, ...]
    body: bytes


DOCUMENTED: Mapping[str, Documented] = {
    "slack": Documented(
        "https://docs.slack.dev/reference/events/url_verification",
        a_post(
            b'{"token": "Jhj5dZrVaK7ZwHHjRyZWjbDl", '
            b'"challenge": "3eZbrw1aBm2rZgRNFdxV2595E9CY3gmdALWMmHkvFXO7tYXAYM8P", "type": "url_verification"}'
        ),
        TEXT,
        b"3eZbrw1aBm2rZgRNFdxV2595E9CY3gmdALWMmHkvFXO7tYXAYM8P",
    ),
    "zoom": Documented(
        "https://developers.zoom.us/docs/api/webhooks/#validate-your-webhook-endpoint",
        a_post(
            b'{"payload": {"plainToken": "qgg8vlvZRS6UYooatFL8Aw"}, "event_ts": 1654503849680, '
            b'"event": "endpoint.url_validation"}'
        ),
        JSON,
        b'{"plainToken":"qgg8vlvZRS6UYooatFL8Aw",'
        b'"encryptedToken":"4033109c450368161133e7233ea63307df0ab7b5313bb52508989793262f0603"}',
    ),
    "discord": Documented(
        "https://discord.com/developers/docs/interactions/overview#setting-up-an-endpoint",
        a_post(b'{"type": 1}'),
        JSON,
        b'{"type":1}',
    ),
    "twitch": Documented(
        "https://dev.twitch.tv/docs/eventsub/handling-webhook-events/#responding-to-a-challenge-request",
        a_post(
            b'{"challenge": "pogchamp-kappa-360noscope-vohiyo", "subscription": {"type": "channel.follow"}}',
            "Twitch-Eventsub-Message-Type: webhook_callback_verification",
        ),
        TEXT,
        b"pogchamp-kappa-360noscope-vohiyo",
    ),
    "challenge-json": Documented(
        "https://developer.monday.com/api-reference/docs/webhooks#url-verification",
        a_post(b'{"challenge": "3eZbrw1aBm2rZgRNFdxV2595E9CY3gmdALWMmHkvFXO7tYXAYM8P"}'),
        JSON,
        b'{"challenge":"3eZbrw1aBm2rZgRNFdxV2595E9CY3gmdALWMmHkvFXO7tYXAYM8P"}',
    ),
    "front": Documented(
        "https://dev.frontapp.com/docs/webhooks-1",
        a_post(b"{}", f"X-Front-Challenge: {CHALLENGE}"),
        TEXT,
        CHALLENGE.encode(),
    ),
    "smartsheet": Documented(
        "https://developers.smartsheet.com/api/smartsheet/guides/webhooks/webhook-verification",
        a_post(
            b'{"challenge": "d78dd1d3-01ce-4481-81de-92b4f3aa5ab1", "webhookId": 8444254503626628}',
            "Smartsheet-Hook-Challenge: d78dd1d3-01ce-4481-81de-92b4f3aa5ab1",
        ),
        JSON,
        b'{"smartsheetHookResponse":"d78dd1d3-01ce-4481-81de-92b4f3aa5ab1"}',
    ),
    "event-grid": Documented(
        "https://learn.microsoft.com/en-us/azure/event-grid/end-point-validation-event-grid-events-schema",
        a_post(GRIDS, "aeg-event-type: SubscriptionValidation"),
        JSON,
        b'{"validationResponse":"512d38b6-c7b8-40c8-89fe-f46f9e9622b6"}',
    ),
    "sns": Documented(
        "https://docs.aws.amazon.com/sns/latest/dg/SendMessageToHttp.prepare.html",
        a_request("/in/it", body=signed(Type="SubscriptionConfirmation").body),
        NOTHING,
        b"",
    ),
    "notion": Documented(
        "https://developers.notion.com/reference/webhooks#step-2-validating-the-subscription",
        a_request("/in/it", body=b'{"verification_token": "secret_tMrlL1qK5vuQAh1b6cZGhFChZTSYJlce98V0pYn7yBl"}'),
        NOTHING,
        b"",
    ),
    "meta": Documented(
        "https://developers.facebook.com/docs/graph-api/webhooks/getting-started#verification-requests",
        a_head("GET", "hub.mode=subscribe&hub.challenge=1158201444&hub.verify_token=meatyhamhock"),
        TEXT,
        b"1158201444",
    ),
    "x": Documented(
        "https://docs.x.com/x-api/webhooks/introduction#challenge-response-checks",
        a_head("GET", "crc_token=challenge_string&nonce=random_string"),
        JSON,
        b'{"response_token":"sha256=7ScpU0JCSjae4Z3hV3Qx0BML3VuoCJhup9FRfVS0Bmc="}',
    ),
    "asana": Documented(
        "https://developers.asana.com/docs/webhooks-guide#the-webhook-handshake",
        a_head("POST", "", f"X-Hook-Secret: {ASANAS}"),
        (*NOTHING, f"X-Hook-Secret: {ASANAS}"),
        b"",
    ),
    "braintree": Documented(  # with the keys of its library's tests
        "https://github.com/braintree/braintree_python/blob/master/tests/unit/test_webhooks.py",
        a_head("GET", "bt_challenge=20f9f8ed05f77439fe955c977e4c8a53"),
        TEXT,
        b"integration_public_key|d9b899556c966b3f06945ec21311865d35df3ce4",
    ),
    "linkedin": Documented(
        "https://learn.microsoft.com/en-us/linkedin/shared/api-guide/webhook-validation",
        a_head("GET", "challengeCode=890e4665-4dfe-4ab1-b689-ed553bceeed0"),
        JSON,
        b'{"challengeCode":"890e4665-4dfe-4ab1-b689-ed553bceeed0",'
        b'"challengeResponse":"6a092642a15aefe6647247c91370f94d0227af76375452bd3b5b1bf1625debb8"}',
    ),
    "okta": Documented(
        "https://developer.okta.com/docs/concepts/event-hooks/#one-time-verification-request",
        a_head("GET", "", "X-Okta-Verification-Challenge: my verification challenge"),
        JSON,
        b'{"verification":"my verification challenge"}',
    ),
    "challenge-query": Documented(
        "https://www.dropbox.com/developers/reference/webhooks#documentation",
        a_head("GET", "challenge=abc123"),
        TEXT,
        b"abc123",
    ),
    "onfleet": Documented(
        "https://docs.onfleet.com/reference/webhooks",
        a_head("GET", "check=a1b2c3"),
        TEXT,
        b"a1b2c3",
    ),
    "head": Documented(
        "https://developer.atlassian.com/cloud/trello/guides/rest-api/webhooks/#creating-a-webhook",
        a_head("HEAD"),
        NOTHING,
        b"",
    ),
    "get": Documented(
        "https://github.com/mailchimp/mailchimp-client-lib-codegen/issues/11",
        a_head("GET", "secret=a1b2c3"),
        NOTHING,
        b"",
    ),
    "microsoft-graph": Documented(
        "https://learn.microsoft.com/en-us/graph/change-notifications-delivery-webhooks#notificationurl-validation",
        a_head("POST", "validationToken=Validation%3a+Testing+client+application+reachability"),
        TEXT,
        b"Validation: Testing client application reachability",
    ),
    "cloudevents": Documented(
        "https://github.com/cloudevents/spec/blob/main/cloudevents/http-webhook.md#42-validation-response",
        a_head("OPTIONS", "", "WebHook-Request-Origin: eventemitter.example.com", "WebHook-Request-Rate: 120"),
        (
            *NOTHING,
            "Allow: POST, OPTIONS",
            "WebHook-Allowed-Origin: eventemitter.example.com",
            "WebHook-Allowed-Rate: 120",
        ),
        b"",
    ),
}


def a_source(name: str) -> Source:
    kind = HANDSHAKES[name]
    verify: dict[str, object] = {"scheme": "token", "header": "X-Token", "handshake": name, "secrets": [SECRET]}
    if kind.has_token:
        verify["verify_tokens"] = ["meatyhamhock"]
    if kind.shows_token:
        verify = {"scheme": name, "pending": True}
    if name == "braintree":
        verify = {"scheme": name, "public_key": "integration_public_key", "secrets": ["integration_private_key"]}
    return Source(name="it", path="/in/it", verifier=VERIFIER if name == "sns" else build_verifier(verify))


SOURCES = {name: a_source(name) for name in HANDSHAKES}


def test_every_handshake_is_compared() -> None:
    assert DOCUMENTED.keys() == HANDSHAKES.keys()
    assert all(each.url.startswith("https://") for each in DOCUMENTED.values())


@pytest.mark.parametrize("name", HANDSHAKES)
async def test_a_handshakes_response_is_the_documented_one_to_the_byte_and_comes_within_100_milliseconds(
    name: str,
) -> None:
    """From the first byte sent to the last one received: the median of some tries, on a usual machine.

    How slow this one is at the moment, with whatever else runs on it, is measured beside each try.
    """
    url, request, headers, body = DOCUMENTED[name]

    async def fetch(url: str, *, timeout: float, limit: int, request_body: bytes = b"") -> bytes:  # noqa: ARG001 - as it is
        return CERTIFICATE

    taken: list[float] = []
    received: set[bytes] = set()
    async with running(fetch=fetch) as world:
        world.rules[0] = some_rules(SOURCES[name])
        for _ in range(TRIES):
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
            slow = slowness()
            began = time.perf_counter()
            async with asyncio.timeout(5):
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                rest = await reader.readexactly(len(body))
            taken.append((time.perf_counter() - began) / slow)
            writer.write_eof()
            received.add(rest + await reader.read())
            writer.close()
            status, *lines = head.decode("ascii").removesuffix("\r\n\r\n").split("\r\n")
            assert status == "HTTP/1.1 200 OK"
            assert sorted([line for line in lines if line.partition(":")[0].lower() not in OURS]) == sorted(headers)
            assert name == "head" or f"Content-Length: {len(body)}" in lines
        assert not world.log.stored
    assert received == {body}, url
    assert statistics.median(taken) < WITHIN
