"""The providers, against their own SDKs, their documented vectors, and signatures made by OpenSSL."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import stripe
from hypothesis import given
from hypothesis import strategies as st
from slack_sdk.signature import Clock, SignatureVerifier
from standardwebhooks import Webhook
from typing_extensions import override

from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.verify.presets import PRESETS
from gateway.verify.verifier import Verifier
from tests.verify.signed_requests import BODY, NOW, SECRET, WHSEC, a_request, a_verifier, reason

STAMP = str(int(NOW))
WHSEC_PRESETS = {"standard-webhooks", "openai", "svix"}
PUBLIC_URL = "https://hooks.example.com/in/square"

# Made by `openssl dgst -sha256 -hmac hush` and the like over BODY and what the provider signs with it.
HEX = "e43e90769e3ca660caff902dd69345c4fc3b690374433cf07df27b7eca5c818f"
BASE64 = "5D6Qdp48pmDK/5At1pNFxPw7aQN0QzzwffJ7fspcgY8="
SHA1_HEX = "8e80b3f56c50d633ea744a36a7e038a20a00e836"
WITH_DOT = "63b2be4cd9cac4834f6bbf3b1c10fc589599a6ba4fe8a0eb9839cb1351519089"
WITH_COLON = "6d0d81de313ba93151bca9ce08e53251d674ca040962297ff6b6b6d37ca8bf0b"
STANDARD = "v1,e0U7A6z6jqaWHJzc7nM2mPYIoG5+wzlTYtOR4nBDz2k="
STANDARD_HEADERS = {"webhook-id": "msg_1", "webhook-timestamp": STAMP, "webhook-signature": STANDARD}

SIGNED_BY_OPENSSL: dict[str, dict[str, str]] = {
    "github": {"X-Hub-Signature-256": f"sha256={HEX}"},
    "stripe": {"Stripe-Signature": f"t={STAMP},v1={WITH_DOT},v0={HEX}"},
    "slack": {
        "X-Slack-Request-Timestamp": STAMP,
        "X-Slack-Signature": "v0=ff9050355ad2e7c3f07dbc9397e11fb9ee7c093b31762987e5f3278bacffb6dd",
    },
    "shopify": {"X-Shopify-Hmac-SHA256": BASE64},
    "gitlab": {"X-Gitlab-Token": SECRET},
    "standard-webhooks": STANDARD_HEADERS,
    "openai": STANDARD_HEADERS,
    "svix": {name.replace("webhook", "svix"): value for name, value in STANDARD_HEADERS.items()},
    "bitbucket": {"X-Hub-Signature": f"sha256={HEX}"},
    "jira": {"X-Hub-Signature": f"sha256={HEX}"},
    "pagerduty": {"X-PagerDuty-Signature": f"v1={WITH_DOT},v1={HEX}"},
    "typeform": {"Typeform-Signature": f"sha256={BASE64}"},
    "zendesk": {
        "X-Zendesk-Webhook-Signature-Timestamp": "2023-11-14T22:13:20Z",
        "X-Zendesk-Webhook-Signature": "ngBc/LKutvB8VTdfRLmaLylUVdPrMF2jw+TLlTX4YVo=",
    },
    "intercom": {"X-Hub-Signature": f"sha1={SHA1_HEX}"},
    "sentry": {"Sentry-Hook-Signature": HEX},
    "vercel": {"x-vercel-signature": SHA1_HEX},
    "calendly": {"Calendly-Webhook-Signature": f"t={STAMP},v1={WITH_DOT}"},
    "workos": {
        "WorkOS-Signature": "t=1700000000000, v1=58d68f8b954d7c5d5c087222bfb894aad52a64d5f0743c3ad48acbc06f70f865"
    },
    "paddle": {"Paddle-Signature": f"ts={STAMP};h1={WITH_COLON}"},
    "square": {"x-square-hmacsha256-signature": "UXbliOzV/gBOnAdJxv/5ek1WEjhvlPUD+zOJ9R78CLg="},
    "woocommerce": {"X-WC-Webhook-Signature": BASE64},
    "webflow": {
        "x-webflow-timestamp": "1700000000000",
        "x-webflow-signature": "ef228b7153665fccfa3c3ee1718cc572b7ebe550ba435d1b136b13a0914c2371",
    },
    "razorpay": {"X-Razorpay-Signature": HEX},
    "lemon-squeezy": {"X-Signature": HEX},
    "doppler": {"X-Doppler-Signature": f"sha256={HEX}"},
}


def a_preset(name: str, **config: object) -> Verifier:
    secrets = [WHSEC] if name in WHSEC_PRESETS else [SECRET]
    return a_verifier(name, public_url=PUBLIC_URL, **{"secrets": secrets, **config})


def test_every_preset_has_an_independent_signature() -> None:
    assert SIGNED_BY_OPENSSL.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_accepts_openssls_signature(name: str) -> None:
    a_preset(name).verify(a_request(SIGNED_BY_OPENSSL[name].items()), now=NOW)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_refuses_another_body_another_secret_and_an_unsigned_request(name: str) -> None:
    headers = SIGNED_BY_OPENSSL[name].items()
    if name != "gitlab":  # a token vouches for no body
        assert reason(a_preset(name), a_request(headers, body=BODY + b" ")) == "bad_signature"
    other = "whsec_b3RoZXItb3RoZXItb3RoZXItb3RoZXI=" if name in WHSEC_PRESETS else "other"
    assert reason(a_preset(name, secrets=[other]), a_request(headers)).startswith("bad_")
    assert reason(a_preset(name), a_request()).startswith("missing_")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_accepts_its_own_signature_and_finds_identity_and_type(name: str) -> None:
    verifier = a_preset(name)
    pairs = verifier.sign(BODY, now=NOW, id="id-1", type="push", headers={"Content-Type": "application/json"})
    request = a_request(pairs)
    verifier.verify(request, now=NOW)
    view = EventView(source="it", headers=request.headers, query="", body=BODY)
    for expression, sent in ((verifier.id, "id-1"), (verifier.type, "push")):
        if expression is not None and "body" not in expression:
            assert Expression(expression).as_text(view) == sent


@pytest.mark.parametrize("name", PRESETS)
@given(data=st.data())
def test_no_changed_byte_of_body_or_signature_passes(name: str, data: st.DataObject) -> None:
    verifier = a_preset(name)
    body = data.draw(st.binary(min_size=1, max_size=50))
    pairs = [(n, v.encode()) for n, v in verifier.sign(body, now=NOW, id="i", type="t", headers={})]
    verifier.verify(a_request(pairs, body=body), now=NOW)

    change = data.draw(st.integers(1, 255))
    changed = bytearray(body)
    changed[data.draw(st.integers(0, len(body) - 1))] ^= change
    if name != "gitlab":
        assert reason(verifier, a_request(pairs, body=bytes(changed))) == "bad_signature"

    signature_header, value = pairs[-1]
    forged = bytearray(value)
    forged[data.draw(st.integers(0, len(value) - 1))] ^= change
    assert reason(verifier, a_request([*pairs[:-1], (signature_header, bytes(forged))], body=body)) != "accepted"


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.has_timestamp])
def test_a_signed_timestamp_is_good_within_the_tolerance_in_both_directions(name: str) -> None:
    secrets = [WHSEC] if name == "gitlab" else None
    verifier = a_preset(name, tolerance="10s", **({"secrets": secrets} if secrets else {}))
    request = a_request(verifier.sign(BODY, now=NOW, id="i", type="t", headers={}))
    for offset, expected in ((-11, "stale_timestamp"), (-10, "accepted"), (10, "accepted"), (11, "stale_timestamp")):
        assert reason(verifier, request, now=NOW + offset) == expected


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("stripe", 300), ("slack", 300), ("paddle", 5), ("calendly", 180), ("workos", 180), ("zendesk", 300)],
)
def test_the_tolerance_is_the_vendors_unless_a_source_says_otherwise(name: str, tolerance: int) -> None:
    verifier = a_preset(name)
    request = a_request(SIGNED_BY_OPENSSL[name].items())
    assert reason(verifier, request, now=NOW + tolerance) == "accepted"
    assert reason(verifier, request, now=NOW + tolerance + 1) == "stale_timestamp"


def test_githubs_documented_vector_holds() -> None:
    """https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries."""
    verifier = a_preset("github", secrets=["It's a Secret to Everybody"])
    signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    verifier.verify(a_request([("x-hub-signature-256", signature)], body=b"Hello, World!"), now=NOW)


def test_githubs_sha1_signature_alone_is_no_signature() -> None:
    request = a_request([("X-Hub-Signature", f"sha1={SHA1_HEX}")])
    assert reason(a_preset("github"), request) == "missing_signature"
    disguised = a_request([("X-Hub-Signature-256", f"sha1={SHA1_HEX}")])
    assert reason(a_preset("github"), disguised) == "malformed_signature"


def test_standard_webhooks_documented_vector_holds() -> None:
    """https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md."""
    headers = [
        ("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek"),
        ("webhook-timestamp", "1614265330"),
        ("webhook-signature", "v1a,AAAA v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="),
    ]
    verifier = a_preset("standard-webhooks", secrets=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])
    verifier.verify(a_request(headers, body=b'{"test": 2432232314}'), now=1_614_265_330)


@pytest.mark.parametrize("name", ["standard-webhooks", "openai", "svix", "gitlab"])
def test_standard_webhooks_library_and_ours_accept_each_other(name: str) -> None:
    theirs = Webhook(WHSEC)
    now = datetime.now(tz=UTC)
    signed = theirs.sign("msg_1", now, BODY.decode())
    ours = a_preset(name, secrets=[WHSEC])
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(now.timestamp())), "webhook-signature": signed}
    ours.verify(a_request(headers.items()), now=now.timestamp())

    sent = ours.sign(BODY, now=now.timestamp(), id="msg_2", type="t", headers={})
    theirs.verify(BODY, {name.replace("svix", "webhook"): value for name, value in sent})


def test_stripes_library_and_ours_accept_each_other() -> None:
    theirs = stripe.WebhookSignature
    header = theirs.generate_signature_header(BODY.decode(), "whsec_abc", int(NOW))
    ours = a_preset("stripe", secrets=["whsec_abc"])
    ours.verify(a_request([("stripe-signature", header)]), now=NOW)

    ((_, sent),) = ours.sign(BODY, now=NOW, id="", type="", headers={})
    assert theirs.verify_header(BODY.decode(), sent, "whsec_abc", tolerance=None)


def test_slacks_library_and_ours_accept_each_other() -> None:
    class Then(Clock):
        @override
        def now(self) -> float:
            return NOW

    theirs = SignatureVerifier(SECRET, Then())
    signature = theirs.generate_signature(timestamp=STAMP, body=BODY)
    assert signature is not None
    ours = a_preset("slack")
    headers = [("X-Slack-Request-Timestamp", STAMP), ("X-Slack-Signature", signature)]
    ours.verify(a_request(headers), now=NOW)
    assert theirs.is_valid_request(BODY, dict(ours.sign(BODY, now=NOW, id="", type="", headers={})))


def test_gitlab_verifies_by_the_kind_of_each_secret() -> None:
    token = a_request([("X-Gitlab-Token", SECRET)])
    signed = a_request(STANDARD_HEADERS.items())
    assert reason(a_preset("gitlab", secrets=[SECRET]), token) == "accepted"
    assert reason(a_preset("gitlab", secrets=[SECRET]), signed) == "missing_credentials"
    assert reason(a_preset("gitlab", secrets=[WHSEC]), signed) == "accepted"
    assert reason(a_preset("gitlab", secrets=[WHSEC]), token) == "missing_signature"
    assert reason(a_preset("gitlab", secrets=[WHSEC]), a_request([("X-Gitlab-Token", WHSEC)])) == "missing_signature"
    both = a_preset("gitlab", secrets=[SECRET, WHSEC])
    assert (reason(both, token), reason(both, signed)) == ("accepted", "accepted")
    assert reason(both, a_request([("X-Gitlab-Token", "guess")])) == "bad_credentials"


@pytest.mark.parametrize(
    ("secrets", "signed", "unsigned"),
    [([WHSEC], "msg_1", None), ([SECRET], "k1", "k1"), ([WHSEC, SECRET], "msg_1", "k1")],
)
def test_gitlabs_identity_is_signed_where_it_can_be(secrets: list[str], signed: str, unsigned: str | None) -> None:
    expression = a_preset("gitlab", secrets=secrets).id
    assert expression is not None
    key = [("Idempotency-Key", "k1")]
    for headers, expected in (([*key, *STANDARD_HEADERS.items()], signed), (key, unsigned)):
        view = EventView(source="it", headers=a_request(headers).headers, query="", body=b"")
        assert Expression(expression).as_text(view) == expected


@pytest.mark.parametrize("secrets", [[SECRET], [WHSEC]])
def test_gitlabs_token_never_goes_further(secrets: list[str]) -> None:
    """GitLab sends it beside a signature too."""
    assert b"x-gitlab-token" in a_preset("gitlab", secrets=secrets).credential_headers


def test_svix_may_leave_its_brand_out() -> None:
    a_preset("svix").verify(a_request(STANDARD_HEADERS.items()), now=NOW)


def test_square_signs_the_address_that_it_was_given() -> None:
    headers = SIGNED_BY_OPENSSL["square"].items()
    base = a_verifier("square", public_url="https://hooks.example.com")
    base.verify(a_request(headers, path="/in/square"), now=NOW)
    assert reason(base, a_request(headers, path="/in/other")) == "bad_signature"
    assert reason(base, a_request(headers, path="/in/square", query="a=1")) == "bad_signature"


def check(name: str, body: bytes, expected: tuple[str | None, str | None], **headers: str) -> None:
    verifier = a_preset(name)
    pairs = tuple((key.replace("_", "-").encode(), value.encode()) for key, value in headers.items())
    view = EventView(source="it", headers=pairs, query="", body=body)
    found = [None if text is None else Expression(text).as_text(view) for text in (verifier.id, verifier.type)]
    assert tuple(found) == expected


def test_identity_and_type_are_where_the_vendor_documents_them() -> None:
    check("github", b"", ("d1", "push"), X_GitHub_Delivery="d1", X_GitHub_Event="push")
    check("stripe", b'{"id":"evt_1","type":"charge.failed"}', ("evt_1", "charge.failed"))
    check("slack", b'{"event_id":"Ev1","type":"event_callback","event":{"type":"message"}}', ("Ev1", "message"))
    check("slack", b'{"type":"app_rate_limited"}', (None, "app_rate_limited"))
    check("shopify", b"", ("w1", "orders/paid"), X_Shopify_Webhook_Id="w1", X_Shopify_Topic="orders/paid")
    check("gitlab", b'{"object_kind":"push","event_name":"push"}', ("k1", "push"), Idempotency_Key="k1")
    check("gitlab", b'{"event_name":"user_add_to_group"}', (None, "user_add_to_group"), X_Gitlab_Event="Member Hook")
    check("gitlab", b"{}", (None, None), X_Gitlab_Event_UUID="shared", X_Gitlab_Event="Push Hook")
    check("lemon-squeezy", b'{"meta":{"event_name":"order_created"}}', (None, "order_created"), X_Event_Name="forged")
    check("standard-webhooks", b'{"type":"user.created"}', ("m1", "user.created"), webhook_id="m1")
    check("svix", b'{"type":"user.created"}', ("m1", "user.created"), webhook_id="m1")
    check("svix", b'{"type":"user.created"}', ("m2", "user.created"), svix_id="m2", webhook_id="m1")
    check("pagerduty", b'{"event":{"id":"01","event_type":"incident.triggered"}}', ("01", "incident.triggered"))
    check("calendly", b'{"event":"invitee.created"}', (None, "invitee.created"))


def test_an_unsigned_type_is_read_only_where_the_vendor_has_no_signed_one() -> None:
    """THREAT_MODEL.md names them, and what a route does about it."""
    unsigned = {name for name, preset in PRESETS.items() if "headers" in (preset.type or "")}
    assert unsigned == {"bitbucket", "github", "sentry", "shopify", "woocommerce"}
    told = (Path(__file__).parent.parent.parent / "THREAT_MODEL.md").read_text()
    [row] = [line for line in told.splitlines() if "an event's type" in line]
    assert all(f"`{name}`" in row for name in unsigned)


@pytest.mark.parametrize("name", PRESETS)
def test_the_expressions_of_a_preset_are_header_names_and_paths_that_compile(name: str) -> None:
    for text in (PRESETS[name].id, PRESETS[name].type):
        if text is not None:
            Expression(text)
            assert re.search(r"body\.|headers\['[a-z0-9-]+'\]", text)


def test_a_repeated_event_is_a_duplicate_where_the_provider_retries() -> None:
    asked_for = {"github", "gitlab", "sentry"}  # an identity that comes again was sent again by somebody, on purpose
    with_identity = {name for name, preset in PRESETS.items() if preset.id is not None}
    assert {name for name, preset in PRESETS.items() if preset.dedupe == 3600} == with_identity - asked_for
    assert {preset.dedupe for preset in PRESETS.values()} == {None, 3600.0}
    assert a_preset("stripe").dedupe == 3600
    assert a_preset("github").dedupe is None
