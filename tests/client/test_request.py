"""What a delivery sends."""

import base64
import re
from dataclasses import replace
from datetime import UTC, datetime

import orjson
import pytest
from standardwebhooks import Webhook

from gateway.client.request import USER_AGENT, compose, sign
from gateway.model import Attempt, Delivery, Event, EventId, ExpressionError, Headers, Result, delivery_id
from gateway.rules.request_templates import Method, PathTemplate, RequestTemplate, parameters
from gateway.rules.rules import Destination, DestinationAccess, Proxy
from gateway.rules.templates import Template

NOW = 1_700_000_000.9
EVENT = Event(
    id=EventId("evt_1"),
    source="github",
    type="push",
    received_at=1.0,
    headers=((b"Content-Type", b"application/json"),),
    query="token=x",
    body=b'{"a": {"b": "c\\nd"}, "n": 1}',
)
CI = Destination(name="ci", url="https://ci.internal/hook")
OURS = (
    (b"gateway-event-id", b"evt_1"),
    (b"gateway-delivery-id", delivery_id(EVENT.id, "build", "ci").encode()),
    (b"gateway-route", b"build"),
    (b"gateway-attempt", b"1"),
)


def a_delivery(*headers: tuple[bytes, bytes], event: Event = EVENT, attempts: tuple[Attempt, ...] = ()) -> Delivery:
    event = replace(event, headers=headers) if headers else event
    id_ = delivery_id(event.id, "build", "ci")
    return Delivery(id=id_, event=event, route="build", destination="ci", attempts=attempts)


def passed(*headers: tuple[bytes, bytes], destination: Destination = CI) -> Headers:
    """What is left of a provider's headers."""
    sent = compose(a_delivery(*headers), destination, None, now=NOW).headers
    return tuple([pair for pair in sent if not pair[0].startswith(b"gateway-") and pair != USER_AGENT])


def test_without_a_template_the_request_is_forwarded_as_is() -> None:
    headers = (
        (b"User-Agent", b"GitHub-Hookshot/044aadd"),
        (b"X-Twice", b"1"),
        (b"CONTENT-type", b"application/json"),
        (b"Content-Encoding", b"gzip"),
        (b"x-raw", b"caf\xe9\xff"),
        (b"X-Twice", b"2"),
        (b"Stripe-Signature", b"t=1,v1=abc"),
        (b"tracestate", b"a=1"),
    )
    delivery = a_delivery(*headers, event=replace(EVENT, body=b"\xff\x00"))
    outbound = compose(delivery, CI, None, now=NOW)
    assert outbound.headers == (*headers, *OURS)
    assert (outbound.url, outbound.body) == ("https://ci.internal/hook", b"\xff\x00")


CONNECTION_ONLY = (
    "Connection Keep-Alive Proxy-Connection TE Trailer Transfer-Encoding Upgrade Expect Host Content-Length "
    "Cookie Authorization Proxy-Authorization Proxy-Authenticate"
)


@pytest.mark.parametrize("name", CONNECTION_ONLY.split())
def test_hop_by_hop_headers_and_credentials_are_not_forwarded(name: str) -> None:
    for spelling in (name, name.lower(), name.upper()):
        assert passed((spelling.encode(), b"x"), (b"X-Kept", b"1")) == ((b"X-Kept", b"1"),)


HELD_BACK = (
    "X-Forwarded-For X-Forwarded-Host X-Forwarded-Proto X-Forwarded-Prefix X-Forwarded Forwarded X-Real-IP "
    "X-Client-IP True-Client-IP CF-Connecting-IP X-Original-URL X-Original-Host X-Rewrite-URL X-HTTP-Method "
    "X-HTTP-Method-Override X-Method-Override Remote-User X-Remote-User Proxy X-Cluster-Client-IP CF-Connecting-IPv6 "
    "Fastly-Client-IP X-Azure-ClientIP X-Envoy-External-Address X-WebAuth-User X-Forwarded-User X-Auth-Request-Email "
    "X-Amzn-Oidc-Identity X-Amzn-Mtls-Clientcert-Subject X-Goog-Authenticated-User-Email X-Goog-IAP-JWT-Assertion "
    "X-MS-Client-Principal X-MS-Client-Principal-Name Cf-Access-Jwt-Assertion SSL-Client-Verify X-SSL-Client-CN "
    "Client-Cert Client-Cert-Chain X-Client-Cert"
)


@pytest.mark.parametrize("name", HELD_BACK.split())
def test_headers_that_servers_trust_from_proxies_are_forwarded_only_on_request(name: str) -> None:
    spellings = {name, name.lower(), name.upper()}
    for spelling in (*spellings, *[each.replace("-", "_") for each in spellings]):
        assert passed((spelling.encode(), b"x"), (b"X-Kept", b"1")) == ((b"X-Kept", b"1"),)
    wanted = replace(CI, forward_headers=(name,))
    for spelling in spellings:
        header = (spelling.encode(), b"x")
        assert passed(header, (b"X-Kept", b"1"), destination=wanted) == (header, (b"X-Kept", b"1"))
    if "-" in name:
        assert passed((name.replace("-", "_").encode(), b"x"), destination=wanted) == ()


@pytest.mark.parametrize("name", ["content_length", "transfer_encoding", "Proxy_Authorization", "gateway_event_id"])
def test_an_underscore_is_no_other_name(name: str) -> None:
    """CGI and WSGI make one variable of both."""
    assert passed((name.encode(), b"x"), (b"x_kept", b"1")) == ((b"x_kept", b"1"),)
    destination = replace(CI, headers=(("X-Internal-Secret", "ours"),), sign=(b"k" * 32,))
    sent = compose(
        a_delivery((b"x_internal_secret", b"theirs"), (b"webhook_id", b"theirs")), destination, None, now=NOW
    )
    assert b"theirs" not in dict(sent.headers).values()


def test_a_destinations_drop_headers_are_not_forwarded() -> None:
    destination = replace(CI, drop_headers=("Stripe-Signature", "X-Hub-Signature-256"))
    headers = ((b"stripe-signature", b"t=1"), (b"X_HUB_SIGNATURE_256", b"x"), (b"X-Kept", b"1"))
    assert passed(*headers, destination=destination) == ((b"X-Kept", b"1"),)
    # What the rules themselves send is theirs.
    template = RequestTemplate(headers=(("Stripe-Signature", Template("none")),))
    sent = dict(compose(a_delivery(*headers), destination, template, now=NOW).headers)
    assert sent[b"Stripe-Signature"] == b"none"


def test_headers_named_by_connection_are_dropped() -> None:
    headers = ((b"Connection", b"close, X-Hop"), (b"connection", b"x-other"), (b"x-hop", b"1"), (b"X-Other", b"1"))
    assert passed(*headers, (b"X-Kept", b"1")) == ((b"X-Kept", b"1"),)


def test_the_gateways_own_names_cannot_be_forged() -> None:
    forged = ((b"Gateway-Event-Id", b"evt_2"), (b"GATEWAY-ATTEMPT", b"99"), (b"gateway-route", b"x"))
    outbound = compose(a_delivery(*forged), CI, None, now=NOW)
    assert outbound.headers == (USER_AGENT, *OURS)


def test_the_attempt_is_the_number_of_the_one_to_come() -> None:
    attempts = tuple([Attempt(number=n, at=0, seconds=0, result=Result.TIMEOUT) for n in (1, 2, 3)])
    outbound = compose(a_delivery(attempts=attempts), CI, None, now=NOW)
    assert (b"gateway-attempt", b"4") in outbound.headers


VALID = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("value", "is_passed"),
    [
        (VALID, True),
        (b"01" + VALID[2:] + b"-what-the-future-brings", True),
        (VALID + b"-more", False),
        (b"ff" + VALID[2:], False),
        (VALID.upper(), False),
        (b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01", False),
        (b"00-0af7651916cd43dd8448eb211c80319c-" + b"0" * 16 + b"-01", False),
        (b"", False),
    ],
)
def test_a_valid_trace_is_continued(value: bytes, *, is_passed: bool) -> None:
    trace = ((b"Traceparent", value), (b"Tracestate", b"a=1"))
    assert passed(*trace) == (trace if is_passed else ())


def test_two_parents_are_none() -> None:
    assert passed((b"traceparent", VALID), (b"traceparent", VALID), (b"tracestate", b"a=1")) == ()


def test_the_destinations_headers_replace_the_providers() -> None:
    destination = replace(CI, headers=(("X-Token", "s3cret"), ("user-agent", "gateway"), ("X-Name", "é")))
    headers = passed((b"User-Agent", b"GitHub"), (b"X-TOKEN", b"a"), (b"x-token", b"b"), destination=destination)
    assert headers == ((b"X-Token", b"s3cret"), (b"user-agent", b"gateway"), (b"X-Name", "é".encode()))


@pytest.mark.parametrize(
    ("headers", "destination", "agents"),
    [
        pytest.param((), CI, (USER_AGENT,), id="none of the sender's"),
        pytest.param(((b"USER-agent", b"curl"),), CI, ((b"USER-agent", b"curl"),), id="the sender's"),
        pytest.param(
            ((b"user-agent", b"curl"),), replace(CI, drop_headers=("User-Agent",)), (USER_AGENT,), id="it isn't wanted"
        ),
        pytest.param((), replace(CI, headers=(("User-Agent", "x"),)), ((b"User-Agent", b"x"),), id="the destination's"),
    ],
)
def test_each_request_has_a_user_agent(headers: Headers, destination: Destination, agents: Headers) -> None:
    sent = compose(a_delivery((b"X-Kept", b"1"), *headers), destination, None, now=NOW).headers
    assert tuple([pair for pair in sent if pair[0].lower() == b"user-agent"]) == agents
    assert re.fullmatch(rb"webhook-gateway/[0-9]+\.[0-9]+\.[0-9]+", USER_AGENT[1])


def test_a_destination_can_have_an_authorization_of_its_own() -> None:
    destination = replace(CI, headers=(("Authorization", "Bearer ours"),))
    headers = passed((b"Authorization", b"Bearer theirs"), destination=destination)
    assert headers == ((b"Authorization", b"Bearer ours"),)


def test_the_way_to_the_destination_goes_with_the_request() -> None:
    access = DestinationAccess(proxy=Proxy(host="proxy.internal", port=3128))
    assert compose(a_delivery(), replace(CI, access=access), None, now=NOW).access is access
    assert compose(a_delivery(), CI, None, now=NOW).access is None


def test_framing_is_not_for_anyone_to_set() -> None:
    destination = replace(CI, headers=(("Content-Length", "5"), ("Transfer-Encoding", "chunked"), ("Host", "x")))
    assert passed((b"X-Kept", b"1"), destination=destination) == ((b"X-Kept", b"1"),)


def test_a_signature_verifies_with_the_vendors_library_for_each_secret() -> None:
    secrets = (b"a" * 32, b"b" * 32)
    delivery = a_delivery((b"Webhook-Id", b"msg_1"), (b"webhook-signature", b"v1,theirs"), (b"webhook-extra", b"x"))
    outbound = compose(delivery, replace(CI, sign=secrets), None, now=datetime.now(UTC).timestamp())
    headers = {name.decode(): value.decode() for name, value in outbound.headers}
    assert len(headers) == len(outbound.headers)
    assert headers["webhook-id"] == delivery.id
    assert "webhook-extra" not in headers
    for secret in secrets:
        Webhook(base64.b64encode(secret).decode()).verify(outbound.body, headers)


def test_the_signature_is_that_of_the_specification() -> None:
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = dict(sign(b"msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', [secret], now=1614265330.7))
    assert headers[b"webhook-timestamp"] == b"1614265330"
    assert headers[b"webhook-signature"] == b"v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_retry_has_a_new_signature_and_the_same_id() -> None:
    destination = replace(CI, sign=(b"k" * 32,))
    first, second = [dict(compose(a_delivery(), destination, None, now=now).headers) for now in (NOW, NOW + 60)]
    assert first[b"webhook-id"] == second[b"webhook-id"]
    assert int(second[b"webhook-timestamp"]) == int(first[b"webhook-timestamp"]) + 60
    assert first[b"webhook-signature"] != second[b"webhook-signature"]


DESCRIBING = (
    (b"Content-Type", b"application/x-old"),
    (b"Content-Encoding", b"gzip"),
    (b"Content-Digest", b"sha-256=:x:"),
    (b"Digest", b"x"),
    (b"X-Hub-Signature-256", b"sha256=x"),
)


def test_a_templates_body_replaces_the_content_headers() -> None:
    event = replace(EVENT, headers=(DESCRIBING[0], *DESCRIBING[2:]))
    template = RequestTemplate(body=Template({"text": "b is ${{ body.a.b }}", "n": "${{ body.n }}"}))
    outbound = compose(a_delivery(event=event), CI, template, now=NOW)
    assert outbound.body == b'{"text":"b is c\\nd","n":1}'
    assert outbound.headers == (USER_AGENT, (b"content-type", b"application/json"), *OURS)


def test_with_a_body_of_its_own_a_request_carries_nothing_of_the_senders() -> None:
    """Signatures that can't fit, tokens of the provider's, and headers that an internal service trusts."""
    theirs = (
        (b"Stripe-Signature", b"t=1,v1=abc"),
        (b"webhook-signature", b"v1,abc"),
        (b"X-Internal-Secret", b"guessed"),
        (b"X-HTTP-Method-Override", b"DELETE"),
        (b"User-Agent", b"curl"),
        (b"traceparent", VALID),
        (b"X-Anything", b"1"),
    )
    destination = replace(CI, headers=(("X-Team", "a"),), forward_headers=("X-HTTP-Method-Override",))
    template = RequestTemplate(
        body=Template({"n": "${{ body.n }}"}),
        headers=(("X-Copied", Template("${{ headers['x-anything'] }}")), ("User-Agent", Template("ours"))),
    )
    outbound = compose(a_delivery(*theirs), destination, template, now=NOW)
    assert outbound.headers == (
        (b"User-Agent", b"ours"),
        (b"content-type", b"application/json"),
        (b"X-Copied", b"1"),
        (b"X-Team", b"a"),
        *OURS,
    )


def test_a_text_template_is_text_unless_it_says_otherwise() -> None:
    text = Template("b is ${{ body.a.b }}")
    plain = compose(a_delivery(), CI, RequestTemplate(body=text), now=NOW)
    assert plain.body == b"b is c\nd"
    assert dict(plain.headers)[b"content-type"] == b"text/plain; charset=utf-8"
    template = RequestTemplate(body=text, headers=(("Content-Type", Template("text/x-${{ type }}")),))
    marked = compose(a_delivery(), CI, template, now=NOW)
    assert [pair for pair in marked.headers if pair[0].lower() == b"content-type"] == [
        (b"Content-Type", b"text/x-push")
    ]


def test_a_template_of_headers_only_keeps_the_body_and_its_headers() -> None:
    template = RequestTemplate(headers=(("X-N", Template("${{ body.n }}")), ("x-hub-signature-256", Template("none"))))
    body = EVENT.body
    outbound = compose(a_delivery(*DESCRIBING[2:], (b"Content-Type", b"application/json")), CI, template, now=NOW)
    assert outbound.body is body
    kept = (*DESCRIBING[2:4], (b"Content-Type", b"application/json"))
    assert outbound.headers == (*kept, USER_AGENT, (b"X-N", b"1"), (b"x-hub-signature-256", b"none"), *OURS)


def test_a_form_is_encoded_and_has_nothing_of_the_senders() -> None:
    fields = {"e-mail": "${{ body.a.b }}+1@x&y=1", "n": "${{ body.n }}", "fixed": ["a", 1]}
    form = parameters({name: Template(value) for name, value in fields.items()})
    outbound = compose(a_delivery(DESCRIBING[0], DESCRIBING[-1]), CI, RequestTemplate(form=form), now=NOW)
    assert outbound.body == b"e-mail=c%0Ad%2B1%40x%26y%3D1&n=1&fixed=a&fixed=1"
    assert outbound.headers == (USER_AGENT, (b"content-type", b"application/x-www-form-urlencoded"), *OURS)


def test_a_path_and_a_query_are_added_and_the_event_goes_through() -> None:
    template = RequestTemplate(
        method=Method.PUT,
        path=PathTemplate("/items/${{ body.a.b }}"),
        query=parameters({"n": Template("${{ body.n }}")}),
    )
    destination = replace(CI, url="https://ci.internal/api/?key=a%2Fb")
    outbound = compose(a_delivery(DESCRIBING[0], DESCRIBING[-1]), destination, template, now=NOW)
    assert outbound.body is EVENT.body
    assert (outbound.method, outbound.url) == ("PUT", destination.url)
    assert outbound.address == "https://ci.internal/api/items/c%0Ad?key=a%2Fb&n=1"
    assert (b"X-Hub-Signature-256", b"sha256=x") in outbound.headers


@pytest.mark.parametrize("method", [Method.GET, Method.DELETE])
def test_a_request_without_a_body_has_nothing_of_the_senders(method: Method) -> None:
    outbound = compose(a_delivery(*DESCRIBING), CI, RequestTemplate(method=method), now=NOW)
    assert (outbound.method, outbound.body, outbound.headers) == (method, b"", (USER_AGENT, *OURS))


def test_a_delete_may_have_a_body() -> None:
    template = RequestTemplate(method=Method.DELETE, body=Template({"n": "${{ body.n }}"}))
    assert compose(a_delivery(), CI, template, now=NOW).body == b'{"n":1}'


def test_a_target_may_not_be_longer_than_servers_take() -> None:
    event = replace(EVENT, body=b'"' + b"x" * 4000 + b'"')
    template = RequestTemplate(path=PathTemplate("/${{ body }}"), query=parameters({"a": Template("${{ body }}")}))
    with pytest.raises(ExpressionError, match=r"request\.path: expected at most 8000 bytes, with the query, got more"):
        compose(a_delivery(event=event), CI, template, now=NOW)
    alone = replace(template, query=None)
    assert len(compose(a_delivery(event=event), CI, alone, now=NOW).path) == 4001


CONTROLS = [chr(code) for code in (*range(9), *range(10, 32), 127)]
"""All of ASCII but the tab, which a header's value may have."""


@pytest.mark.parametrize("character", CONTROLS)
def test_a_control_character_of_an_event_is_in_no_header(character: str) -> None:
    event = replace(EVENT, body=orjson.dumps({"name": f"a{character}X-Admin: 1"}))
    template = RequestTemplate(headers=(("X-Name", Template("n: ${{ body.name }}")),))
    with pytest.raises(ExpressionError, match=r"^request.headers.X-Name: expected a value without control characters"):
        compose(a_delivery(event=event), CI, template, now=NOW)


def test_an_event_may_have_a_tab_in_a_header() -> None:
    event = replace(EVENT, body=orjson.dumps({"name": "a\tb"}))
    template = RequestTemplate(headers=(("X-Name", Template("${{ body.name }}")),))
    assert (b"X-Name", b"a\tb") in compose(a_delivery(event=event), CI, template, now=NOW).headers


@pytest.mark.parametrize(
    "template",
    [
        None,
        RequestTemplate(),
        RequestTemplate(path=PathTemplate("/a")),
        RequestTemplate(query=parameters({"mine": Template("1")})),
        RequestTemplate(form=parameters({"mine": Template("1")})),
    ],
)
def test_the_senders_query_is_not_passed_on(template: RequestTemplate | None) -> None:
    """It may have a token for the gateway, or a parameter that means something to a destination."""
    assert EVENT.query == "token=x"
    outbound = compose(a_delivery(), replace(CI, url="https://ci.internal/hook?key=1"), template, now=NOW)
    assert "token" not in outbound.address
    assert "key=1" in outbound.address


def test_the_signature_covers_the_templates_body() -> None:
    destination = replace(CI, sign=(b"k" * 32,))
    outbound = compose(a_delivery(), destination, RequestTemplate(body=Template({"new": True})), now=NOW)
    assert sign(outbound.headers[-3][1], b'{"new":true}', destination.sign, now=NOW) == list(outbound.headers[-3:])


@pytest.mark.parametrize(
    ("template", "where"),
    [
        (RequestTemplate(body=Template("${{ body.missing }}")), "request.body: "),
        (RequestTemplate(headers=(("X-A", Template("${{ body.missing }}")),)), "request.headers.X-A: "),
        (RequestTemplate(headers=(("X-A", Template("${{ body.a.b }}")),)), "request.headers.X-A: expected a value"),
        (RequestTemplate(path=PathTemplate("/${{ body.missing }}")), "request.path: "),
        (
            RequestTemplate(path=PathTemplate("/${{ body.a }}")),
            "request.path: expected a string, a number",
        ),
        (RequestTemplate(query=parameters({"x": Template("${{ body.a }}")})), "request.query: x: expected a string"),
        (RequestTemplate(form=parameters({"x": Template("${{ body.missing }}")})), "request.form: "),
    ],
)
def test_a_rendering_failure_is_reported_with_its_place(template: RequestTemplate, where: str) -> None:
    with pytest.raises(ExpressionError, match=f"^{where}"):
        compose(a_delivery(), CI, template, now=NOW)


def test_secrets_are_not_in_the_representation() -> None:
    destination = replace(CI, url="https://x/secret", headers=(("X-Token", "s3cret"),), sign=(b"k" * 32,))
    outbound = compose(a_delivery(), destination, None, now=NOW)
    assert "secret" not in repr(outbound)
    assert "s3cret" not in repr(outbound)
