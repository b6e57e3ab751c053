"""Handshakes are answered as the vendors' documents say, byte for byte, and only handshakes."""

import base64
import gzip
import hashlib
import hmac
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import RefusedError
from gateway.verify.check import MAX_CHALLENGE
from gateway.verify.config_reader import ConfigPath, Path
from gateway.verify.handshakes import HANDSHAKES, MAX_HANDSHAKE_BYTES, HandshakeKeys, HandshakeResponse
from gateway.verify.key_ring import KeyEntry, KeyRing
from gateway.verify.presets import SchemeError, read_preset
from gateway.verify.request import MAX_PARAMETERS, Request
from gateway.verify.verifier import Verifier
from tests.verify.both_ways import build_verifier
from tests.verify.signed_requests import NOW, SECRET, a_request, a_verifier, reason

NO_SNIFFING = (("X-Content-Type-Options", "nosniff"),)


def a_text(body: bytes) -> HandshakeResponse:
    return HandshakeResponse(status=200, content_type="text/plain", body=body, headers=NO_SNIFFING)


def a_document(body: bytes) -> HandshakeResponse:
    return HandshakeResponse(status=200, content_type="application/json", body=body, headers=NO_SNIFFING)


def with_handshake(name: str, **config: Any) -> Verifier:
    tokens = {"verify_tokens": ["meatyhamhock"]} if HANDSHAKES[name].has_token else {}
    return a_verifier("token", header="X-Token", handshake=name, **{**tokens, **config})


def answer(name: str, body: bytes = b"", **headers: str) -> HandshakeResponse | None:
    """Return the response to a request that has been verified."""
    pairs = [(key.replace("_", "-"), value) for key, value in headers.items()]
    return with_handshake(name).handshake(a_request(pairs, body=body), now=NOW)


def unverified(name: str, method: str, query: str = "", **headers: str) -> HandshakeResponse | None:
    """Return the response to a request of which only the head is known."""
    verifier = with_handshake(name)
    assert method in verifier.handshake_methods
    pairs = tuple((key.replace("_", "-").encode(), value.encode()) for key, value in headers.items())
    return verifier.unverified_handshake(
        Request(method=method, path="/in/it", query=query, headers=pairs, body=b""), now=NOW
    )


# ---- After verification ----


def test_slacks_challenge_is_echoed_as_text() -> None:
    body = b'{"token":"t","challenge":"3eZbrw1a\\u00e9","type":"url_verification"}'
    response = a_verifier("slack").handshake(a_request(body=body), now=NOW)
    assert response == a_text("3eZbrw1aé".encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"type":"event_callback","event":{"type":"message","text":"url_verification"},"challenge":"c"}',
        b'{"type":"url_verification"}',
        b'{"type":"url_verification","challenge":1}',
        b'["url_verification"]',
        b'{"type":"url_verification",',
        b'{"type":"url_verification","challenge":"c"' + b" " * MAX_HANDSHAKE_BYTES + b"}",
    ],
)
def test_a_body_without_a_challenge_is_an_event(body: bytes) -> None:
    assert a_verifier("slack").handshake(a_request(body=body), now=NOW) is None


def test_a_scheme_without_a_handshake_answers_nothing() -> None:
    assert (
        a_verifier("github").handshake(a_request(body=b'{"type":"url_verification","challenge":"c"}'), now=NOW) is None
    )
    assert a_verifier("github").handshake_methods == ()
    assert a_verifier("github").unverified_handshake(a_request(), now=NOW) is None


def test_zooms_token_comes_back_with_its_hmac() -> None:
    """https://developers.zoom.us/docs/api/webhooks/#validate-your-webhook-endpoint."""
    token = b'{"plainToken":"qgg8vlvZRS6UYooatFL8Aw"}'
    body = b'{"payload":%b,"event_ts":1654503849680,"event":"endpoint.url_validation"}' % token
    signature = hmac.new(SECRET.encode(), b"qgg8vlvZRS6UYooatFL8Aw", hashlib.sha256).hexdigest()
    expected = b'{"plainToken":"qgg8vlvZRS6UYooatFL8Aw","encryptedToken":"%b"}' % signature.encode()
    assert answer("zoom", body) == a_document(expected)


@pytest.mark.parametrize("token", ["v0:1700000000:{}", "", "a b", "x" * 257, 7, None])
def test_zoom_gets_no_signature_of_what_could_be_an_event(token: object) -> None:
    body = orjson.dumps({"payload": {"plainToken": token}, "event": "endpoint.url_validation"})
    assert answer("zoom", body) is None


def test_discords_pings_are_answered() -> None:
    """https://discord.com/developers/docs/interactions/overview#setting-up-an-endpoint."""
    pong = a_document(b'{"type":1}')
    assert answer("discord", b'{"type":1,"id":"1","application_id":"2"}') == pong
    assert answer("discord", b'{"version":1,"application_id":"2","type":0}') == HandshakeResponse(
        status=204, content_type="application/json"
    )
    assert answer("discord", b'{"type":2,"id":"1"}') is None
    assert answer("discord", b'{"version":1,"type":1,"event":{"type":"APPLICATION_AUTHORIZED"}}') is None


def test_twitchs_challenge_is_echoed_raw() -> None:
    """https://dev.twitch.tv/docs/eventsub/handling-webhook-events/#responding-to-a-challenge-request."""
    body = b'{"challenge":"pogchamp-kappa-360noscope-vohiyo","subscription":{"type":"channel.follow"}}'
    kind = "webhook_callback_verification"
    expected = a_text(b"pogchamp-kappa-360noscope-vohiyo")
    assert answer("twitch", body, Twitch_Eventsub_Message_Type=kind) == expected
    assert answer("twitch", body, Twitch_Eventsub_Message_Type="notification") is None


def test_a_challenge_in_json_comes_back_in_json() -> None:
    """https://developer.monday.com/api-reference/docs/webhooks#url-verification, and Lark."""
    monday = b'{"challenge":"3eZbrw1a"}'
    assert answer("challenge-json", monday) == a_document(monday)
    lark = b'{"challenge":"ajls384k","token":"xxxxxx","type":"url_verification"}'
    assert answer("challenge-json", lark) == a_document(b'{"challenge":"ajls384k"}')
    assert answer("challenge-json", b'{"event":{"challenge":"c"},"challenge":"c"}') is None


def test_the_challenges_of_front_and_smartsheet_are_headers() -> None:
    assert answer("front", b"{}", X_Front_Challenge="abc") == a_text(b"abc")
    assert answer("front", b"{}") is None
    body = b'{"challenge":"d78dd1d3","webhookId":5}'
    expected = a_document(b'{"smartsheetHookResponse":"d78dd1d3"}')
    assert answer("smartsheet", body, Smartsheet_Hook_Challenge="d78dd1d3") == expected
    assert answer("smartsheet", body) is None


def test_event_grids_validation_gets_exactly_200() -> None:
    """https://learn.microsoft.com/en-us/azure/event-grid/end-point-validation-event-grid-events-schema."""
    body = orjson.dumps(
        [
            {
                "id": "2d1781af-3a4c-4d7c-bd0c-e34b19da4e66",
                "topic": "/subscriptions/xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx",
                "subject": "",
                "data": {"validationCode": "512d38b6-c7b8-40c8-89fe-f46f9e9622b6", "validationUrl": "https://x"},
                "eventType": "Microsoft.EventGrid.SubscriptionValidationEvent",
                "eventTime": "2022-10-28T04:23:35.1981776Z",
                "metadataVersion": "1",
                "dataVersion": "1",
            }
        ]
    )
    expected = a_document(b'{"validationResponse":"512d38b6-c7b8-40c8-89fe-f46f9e9622b6"}')
    assert answer("event-grid", body, aeg_event_type="SubscriptionValidation") == expected
    assert answer("event-grid", body, aeg_event_type="Notification") is None
    for other in (b"[]", b"{", b'[{"data":{"validationCode":1}}]', b"[" + b" " * MAX_HANDSHAKE_BYTES + b"]"):
        assert answer("event-grid", other, aeg_event_type="SubscriptionValidation") is None


@pytest.mark.parametrize("name", ["slack", "twitch", "challenge-json", "event-grid", "front", "smartsheet"])
def test_what_is_too_long_to_be_a_challenge_is_an_event(name: str) -> None:
    """None that a vendor sends has a hundred characters, and the gateway is nobody's echo."""

    def answered(challenge: str) -> HandshakeResponse | None:
        headers = {
            "twitch": {"Twitch_Eventsub_Message_Type": "webhook_callback_verification"},
            "event-grid": {"aeg_event_type": "SubscriptionValidation"},
            "front": {"X_Front_Challenge": challenge},
            "smartsheet": {"Smartsheet_Hook_Challenge": challenge},
        }
        body: object = {"type": "url_verification", "challenge": challenge}
        if name == "event-grid":
            body = [{"data": {"validationCode": challenge}}]
        return answer(name, orjson.dumps(body), **headers.get(name, {}))

    longest = answered("x" * MAX_CHALLENGE)
    assert longest is not None
    assert b"x" * MAX_CHALLENGE in longest.body
    assert longest.headers == NO_SNIFFING
    assert answered("x" * (MAX_CHALLENGE + 1)) is None


# ---- By the body alone, while the source is pending ----

TOKEN = b'{"verification_token":"secret_tMrlL1qK5vuQAh1b6cZGhFChZTSYJlce98V0pYn7yBl"}'


def pending(**config: Any) -> Verifier:
    return a_verifier("notion", secrets=None, pending=True, **config)


def test_notions_token_is_shown_while_the_source_is_pending() -> None:
    """https://developers.notion.com/reference/webhooks#step-2-validating-the-subscription."""
    verifier = pending()
    assert verifier.is_pending
    [(path, message)] = verifier.warnings
    assert (path, message.partition(":")[0]) == (("pending",), "accepts a token from anybody")
    verifier.verify(a_request(body=TOKEN), now=NOW)
    response = verifier.handshake(a_request(body=TOKEN), now=NOW)
    assert response == HandshakeResponse(token="secret_tMrlL1qK5vuQAh1b6cZGhFChZTSYJlce98V0pYn7yBl")
    assert "secret_" not in repr(response)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"verification_token":7}',
        b'{"verification_token":"short"}',
        b'{"verification_token":"with spaces in its middle"}',
        b'{"verification_token":"' + b"x" * 257 + b'"}',
        TOKEN[:-1] + b',"type":"page.created"}',
        b'{"type":"page.created"}',
        TOKEN + b" " * MAX_HANDSHAKE_BYTES,
    ],
)
def test_nothing_but_a_token_is_accepted_unsigned(body: bytes) -> None:
    """So that none of it can become an event, pending or not."""
    for verifier in (pending(), a_verifier("notion", secrets=[SECRET], pending=True)):
        assert reason(verifier, a_request(body=body)) == "missing_signature"
        assert verifier.handshake(a_request(body=body), now=NOW) is None


def test_a_token_is_not_decompressed_as_nobody_has_signed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is parsed of a stranger's body is 16 KiB at most, as it came."""
    monkeypatch.setattr("zlib.decompressobj", lambda _: pytest.fail("it was decompressed"))
    verifier = pending()
    for body in (gzip.compress(TOKEN), gzip.compress(TOKEN + b" " * 10_000_000)):
        assert len(body) <= MAX_HANDSHAKE_BYTES
        request = a_request([("Content-Encoding", "gzip")], body=body)
        assert reason(verifier, request) == "missing_signature"
        assert verifier.handshake(request, now=NOW) is None
    assert reason(verifier, a_request(body=TOKEN.ljust(MAX_HANDSHAKE_BYTES))) == "accepted"
    assert reason(verifier, a_request(body=TOKEN.ljust(MAX_HANDSHAKE_BYTES + 1))) == "missing_signature"


def test_what_is_verified_by_pending_alone_is_always_a_handshake() -> None:
    """Else an event would be stored that nobody has signed."""
    verifier = pending()
    for body in (TOKEN, b"{}", b'{"verification_token":"a","type":"page.created"}', b'{"verification_token":1}', b""):
        request = a_request(body=body)
        is_accepted = reason(verifier, request) == "accepted"
        assert is_accepted == (verifier.handshake(request, now=NOW) is not None) == (body == TOKEN), body
    assert reason(verifier, a_request([("X-Notion-Signature", "sha256=x")], body=TOKEN)) == "missing_signature"


def test_a_token_is_refused_once_nobody_waits_for_it() -> None:
    for verifier in (a_verifier("notion", secrets=[SECRET]), a_verifier("notion", secrets=[SECRET], pending=False)):
        assert not verifier.is_pending
        assert reason(verifier, a_request(body=TOKEN)) == "missing_signature"
        assert verifier.handshake(a_request(body=TOKEN), now=NOW) is None


def test_events_are_verified_by_the_secrets_beside_pending() -> None:
    verifier, body = a_verifier("notion", secrets=[SECRET], pending=True), b'{"type":"page.created"}'
    signature = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    for value, expected in ((signature, "accepted"), ("0" * 64, "bad_signature")):
        assert reason(verifier, a_request([("X-Notion-Signature", f"sha256={value}")], body=body)) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "expected the key 'secrets', or 'pending' until its token is known, got neither"),
        ({"pending": False}, "expected the key 'secrets', or 'pending' until its token is known, got neither"),
        ({"pending": "yes"}, "pending: expected true or false, got 'yes'"),
        ({"scheme": "github", "secrets": [SECRET], "pending": True}, "unknown key 'pending'"),
        (
            {"scheme": "token", "header": "X-T", "secrets": [SECRET], "handshake": "notion"},
            "handshake: expected one of",
        ),
    ],
)
def test_what_may_be_pending(config: dict[str, Any], expected: str) -> None:
    given = {"scheme": "notion", "secrets": None, **config}
    with pytest.raises(SchemeError) as caught:
        a_verifier(**given)
    assert expected in str(caught.value)


# ---- By the head alone ----


def test_metas_challenge_comes_back_for_its_token_alone() -> None:
    """https://developers.facebook.com/docs/graph-api/webhooks/getting-started#verification-requests."""
    query = "hub.mode=subscribe&hub.challenge=1158201444&hub.verify_token=meatyhamhock"
    assert unverified("meta", "GET", query) == a_text(b"1158201444")
    assert unverified("meta", "GET", "") is None
    for other in ("hub.mode=subscribe&hub.challenge=1", query + "x", query + "&hub.verify_token=meatyhamhock"):
        with pytest.raises(RefusedError) as caught:
            unverified("meta", "GET", other)
        assert caught.value.status == 403


def test_a_query_of_many_parameters_is_no_handshake() -> None:
    """Thousands of them took a forger's request 60 to 250 ms."""
    challenge = "hub.mode=subscribe&hub.challenge=1158201444&hub.verify_token=meatyhamhock"
    assert unverified("meta", "GET", challenge + "&a" * (MAX_PARAMETERS - 3)) is not None
    assert unverified("meta", "GET", challenge + "&a" * (MAX_PARAMETERS - 2)) is None


@given(query=st.text("a%b=6&2+3;é", max_size=40))
def test_parameters_are_those_of_the_standard_library(query: str) -> None:
    request = Request(method="GET", path="/", query=query, headers=(), body=b"")
    pairs = parse_qsl(query, keep_blank_values=True)
    for name in ("a", "b", "ab", "é", " "):
        assert request.parameters("x", name)[name] == [value for key, value in pairs if key == name]


def test_xs_check_is_signed_with_the_consumer_secret() -> None:
    """https://docs.x.com/x-api/webhooks/introduction#challenge-response-checks."""
    digest = hmac.new(SECRET.encode(), b"challenge_string", hashlib.sha256).digest()
    expected = b'{"response_token":"sha256=%b"}' % base64.b64encode(digest)
    assert unverified("x", "GET", "crc_token=challenge_string&nonce=n") == a_document(expected)
    assert unverified("x", "GET", "nonce=n") is None


@pytest.mark.parametrize("token", ["%7B%22for_user_id%22%3A%221%22%7D", "[]", "", "a%20b", "x" * 257])
def test_x_gets_no_signature_of_what_could_be_an_event(token: str) -> None:
    """Else anybody could have an event signed: its signature is made as the response is."""
    with pytest.raises(RefusedError, match="expected a crc_token"):
        unverified("x", "GET", f"crc_token={token}")


def test_linkedins_challenge_comes_back_with_its_hmac() -> None:
    """https://learn.microsoft.com/en-us/linkedin/shared/api-guide/webhook-validation."""
    code = b"890e4665-4dfe-4ab1-b689-ed553bceeed0"
    digest = hmac.new(SECRET.encode(), code, hashlib.sha256).hexdigest().encode()
    expected = b'{"challengeCode":"%b","challengeResponse":"%b"}' % (code, digest)
    assert unverified("linkedin", "GET", f"challengeCode={code.decode()}&applicationId=1") == a_document(expected)
    assert unverified("linkedin", "GET", "applicationId=1") is None


@pytest.mark.parametrize("code", ["hmacsha256=a", "%7B%7D", "", "890e4665", "890e4665-4dfe-4ab1-b689-ed553bceeed0a"])
def test_linkedin_gets_no_signature_of_what_could_be_an_event(code: str) -> None:
    with pytest.raises(RefusedError, match="expected a challengeCode"):
        unverified("linkedin", "GET", f"challengeCode={code}")


_ASKS: Mapping[str, Callable[[str], Request]] = {
    "x": lambda text: Request(method="GET", path="/in/it", query=urlencode({"crc_token": text}), headers=(), body=b""),
    "linkedin": lambda text: Request(
        method="GET", path="/in/it", query=urlencode({"challengeCode": text}), headers=(), body=b""
    ),
    "braintree": lambda text: Request(
        method="GET", path="/in/it", query=urlencode({"bt_challenge": text}), headers=(), body=b""
    ),
    "zoom": lambda text: a_request(
        body=orjson.dumps({"payload": {"plainToken": text}, "event": "endpoint.url_validation"})
    ),
}
"""How each handshake that signs is asked to sign a text."""
SIGNING = [name for name, handshake in HANDSHAKES.items() if handshake.signed_challenge]


def test_every_handshake_that_uses_the_secrets_says_what_it_signs() -> None:
    texts = ["a" * 20, "890e4665-4dfe-4ab1-b689-ed553bceeed0"]
    asked = [
        *[ask(text) for ask in _ASKS.values() for text in texts],
        *[
            a_request(query=urlencode({name: text}))._replace(method=method)
            for method in ("GET", "POST", "HEAD", "OPTIONS")
            for name in ("challenge", "check", "validationToken", "hub.challenge", "token")
            for text in texts
        ],
    ]
    for name, handshake in HANDSHAKES.items():
        answers = []
        for secret in (b"one", b"other"):
            keys = HandshakeKeys(KeyRing((KeyEntry(secret),)), parameters={"public_key": "k"})
            for request in asked:
                with suppress(RefusedError):
                    answers.append((secret, handshake.respond(request, keys)))
        signs = {each for secret, each in answers if secret == b"one"} != {
            each for secret, each in answers if secret == b"other"
        }
        assert signs == (handshake.signed_challenge is not None), name
    assert SIGNING == ["zoom", "x", "braintree", "linkedin"]


@pytest.mark.parametrize("name", SIGNING)
@given(data=st.data(), encoding=st.sampled_from(["hex", "base64"]), algorithm=st.sampled_from(["sha256", "sha1"]))
def test_what_is_signed_as_a_challenge_is_never_an_event(
    name: str, data: st.DataObject, encoding: str, algorithm: str
) -> None:
    """Whatever else the source expects of its events: anybody may have had their signed string signed."""
    handshake = HANDSHAKES[name]
    assert handshake.signed_challenge is not None
    challenge = data.draw(st.from_regex(handshake.signed_challenge, fullmatch=True).filter(str.isascii))
    keys = HandshakeKeys(KeyRing((KeyEntry(SECRET.encode()),)), parameters={"public_key": "k"})
    assert handshake.respond(_ASKS[name](challenge), keys) is not None
    digest = hmac.digest(SECRET.encode(), challenge.encode(), algorithm)
    signature = digest.hex() if encoding == "hex" else base64.b64encode(digest).decode()
    at = data.draw(st.integers(1, len(challenge) - 1)) if len(challenge) > 1 else 0
    divided = [
        (f"{{header:X-Head:{at}}}{{body}}", challenge[at:], challenge[:at]),
        (f"{{body}}{{header:X-Head:{len(challenge) - at}}}", challenge[:at], challenge[at:]),
    ]
    for signed, body, head in [("{body}", challenge, ""), *(divided if at else [])]:
        config = {"algorithm": algorithm, "encoding": encoding, "signed": signed}
        request = a_request([("X-Signature", signature), ("X-Head", head)], body=body.encode())
        assert reason(a_verifier(**config), request) == "accepted"
        with_it = preset_with(name, {"header": "X-Signature", **config})
        assert reason(with_it, request) == "bad_signature"


def preset_with(handshake: str, method: dict[str, Any]) -> Verifier:
    """Return the verifier of a provider of one's own."""
    asks = {"asks": {"public_key": "a key"}} if HANDSHAKES[handshake].required_keys else {}
    problems: dict[tuple[Path, str], None] = {}
    preset = read_preset({"verify": method, "handshake": handshake, **asks}, ConfigPath((), problems))
    assert preset is not None
    assert not problems
    given = {"public_key": "k"} if asks else {}
    return build_verifier({"scheme": "own", "secrets": [SECRET], **given}, providers={"own": preset})


@pytest.mark.parametrize("name", [name for name in SIGNING if name != "braintree"])
def test_a_token_has_no_handshake_that_signs(name: str) -> None:
    """What is signed of a JSON Web Token may be a challenge."""
    with pytest.raises(SchemeError, match="handshake: expected no handshake that signs"):
        a_verifier("jwt", algorithms=["HS256"], handshake=name)


def test_a_token_in_xs_challenge_is_what_that_prevents() -> None:
    head, claims = (base64.urlsafe_b64encode(each).rstrip(b"=") for each in (b'{"alg":"HS256"}', b'{"sub":"1"}'))
    assert HANDSHAKES["x"].signed_challenge is not None
    assert HANDSHAKES["x"].signed_challenge.fullmatch(f"{head.decode()}.{claims.decode()}")


CONTROLLED = [f"1{control}1" for control in "\0\t\n\r\x1b\x7f\x85"] + ["1\n", "1\r\nX: y"]
"""Texts that would be two lines, or none, in a header."""
ASANAS = "b537207f20cbfa02357cf448134da559e8bd39d61597dcd5631b8012eae53e81"


def test_asanas_secret_comes_back_in_its_header() -> None:
    """https://developers.asana.com/docs/webhooks-guide#the-webhook-handshake: 200 or 204, and the same header."""
    expected = HandshakeResponse(headers=(("X-Hook-Secret", ASANAS),))
    assert unverified("asana", "POST", X_Hook_Secret=ASANAS) == expected
    assert unverified("asana", "POST") is None
    assert unverified("asana", "POST", X_Hook_Secret=ASANAS, X_Hook_Signature="0" * 64) is None
    for other in ("", "x" * 257, "a b", 'a"b', "é", *CONTROLLED):
        assert unverified("asana", "POST", X_Hook_Secret=other) is None


def test_a_secret_that_a_stranger_sends_to_asanas_handshake_verifies_nothing() -> None:
    """It is sent back, and that is all: the rules' secrets are those that count."""
    verifier, body = a_verifier("asana"), b'{"events":[]}'
    assert verifier.unverified_handshake(a_request([("X-Hook-Secret", ASANAS)]), now=NOW) is not None
    for secret, expected in ((ASANAS, "bad_signature"), (SECRET, "accepted")):
        signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
        assert reason(verifier, a_request([("X-Hook-Signature", signature)], body=body)) == expected


def test_oktas_challenge_comes_back_in_json() -> None:
    """https://developer.okta.com/docs/concepts/event-hooks/#one-time-verification-request."""
    expected = a_document(b'{"verification":"my verification challenge"}')
    assert unverified("okta", "GET", x_okta_verification_challenge="my verification challenge") == expected
    assert unverified("okta", "GET") is None


@pytest.mark.parametrize(("name", "method", "parameter"), [
    ("challenge-query", "GET", "challenge"), ("onfleet", "GET", "check"),
    ("microsoft-graph", "POST", "validationToken"),
])  # fmt: skip
def test_a_challenge_in_the_query_comes_back_as_text_that_no_browser_takes_for_a_page(
    name: str, method: str, parameter: str
) -> None:
    """URL-decoded, as each wants it: the addresses of their documents are beside their handshakes."""
    response = unverified(name, method, f"{parameter}=a%3Cb%3E+c%C3%A9")
    assert response == a_text("a<b> cé".encode())
    assert unverified(name, method, "other=1") is None
    with pytest.raises(RefusedError) as caught:
        unverified(name, method, f"{parameter}={'x' * (MAX_CHALLENGE + 1)}")
    assert caught.value.status == 400


def test_a_head_request_finds_the_address() -> None:
    assert unverified("head", "HEAD") == HandshakeResponse()


def test_a_get_request_finds_the_address() -> None:
    """Mailchimp saves no webhook otherwise: https://github.com/mailchimp/mailchimp-client-lib-codegen/issues/11."""
    assert unverified("get", "GET") == HandshakeResponse()
    assert unverified("get", "GET", "secret=wrong") == HandshakeResponse()


@pytest.mark.parametrize(("name", "method"), [("intercom", "HEAD"), ("mailchimp", "GET")])
def test_who_asks_for_the_address_by_a_method_gets_it_without_a_secret(name: str, method: str) -> None:
    verifier = a_verifier(name)
    assert verifier.handshake_methods == (method,)
    response = verifier.unverified_handshake(a_request()._replace(method=method, body=b""), now=NOW)
    assert response == HandshakeResponse()


def test_cloudevents_senders_ask_by_options() -> None:
    """https://github.com/cloudevents/spec/blob/main/cloudevents/http-webhook.md#42-validation-response."""
    response = unverified(
        "cloudevents", "OPTIONS", WebHook_Request_Origin="eventemitter.example.com", WebHook_Request_Rate="120"
    )
    assert response == HandshakeResponse(
        headers=(
            ("Allow", "POST, OPTIONS"),
            ("WebHook-Allowed-Origin", "eventemitter.example.com"),
            ("WebHook-Allowed-Rate", "120"),
        )
    )
    assert unverified("cloudevents", "OPTIONS") is None
    for other in ("", "a b", "é", "x" * (MAX_CHALLENGE + 1), *CONTROLLED):
        assert unverified("cloudevents", "OPTIONS", WebHook_Request_Origin=other) is None
    for rate in ("1.5", "-1", "", *CONTROLLED):
        response = unverified("cloudevents", "OPTIONS", WebHook_Request_Origin="a", WebHook_Request_Rate=rate)
        assert response is not None
        assert dict(response.headers)["WebHook-Allowed-Rate"] == "*"
