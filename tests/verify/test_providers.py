"""The presets: what each verifies, where its identity and type are, and when an event is a duplicate.

Whether they verify as the vendors sign is a matter of test_vectors.py and of tests/oracles.
"""

import re
from pathlib import Path

import pytest

from gateway.model import ExpressionError, UsageError
from gateway.rules.batches import split
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.verify.presets import PRESETS, SchemeError
from gateway.verify.verifier import Verifier
from tests.verify.signed_requests import NOW, SECRET, WHSEC, a_request, a_verifier, reason
from tests.verify.vectors import Vector, vectors

VECTORS: dict[str, Vector] = {vector.scheme: vector for vector in vectors()}
STAMP = str(int(NOW))
STANDARD = "v1,e0U7A6z6jqaWHJzc7nM2mPYIoG5+wzlTYtOR4nBDz2k="
STANDARD_HEADERS = {"webhook-id": "msg_1", "webhook-timestamp": STAMP, "webhook-signature": STANDARD}
"""Of BODY with WHSEC, made by `openssl dgst -sha256 -hmac`."""


def a_preset(name: str, **config: object) -> Verifier:
    """Build a preset's verifier with the secrets of its vector, or others."""
    vector = VECTORS[name]
    return a_verifier(name, public_url=vector.public_url, **{"secrets": [SECRET], **vector.config, **config})


def test_every_preset_has_a_request_that_somebody_else_has_signed() -> None:
    assert VECTORS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_people_need_to_know(name: str) -> None:
    about = PRESETS[name].about
    assert {"title", "docs", "secret", "setup", "evidence"} <= about.keys()
    evidence = about["evidence"]
    is_credential = all(method.scheme in {"token", "basic", "bearer"} for method in PRESETS[name].methods)
    if is_credential and evidence != "unconfirmed" and evidence.keys() == {"documents"}:
        return  # there is no signature to compare
    assert evidence == "unconfirmed" or evidence.keys() <= {"sdk", "vector"}
    made_by = [vector.made_by for vector in vectors() if vector.scheme == name]
    is_of_vendor = any(not maker.startswith(("openssl", "PyJWT")) or "accepted by" in maker for maker in made_by)
    assert is_of_vendor == (evidence != "unconfirmed"), "its evidence isn't what its vectors are"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_accepts_its_own_signature(name: str) -> None:
    vector = VECTORS[name]
    verifier = vector.verifier()
    beside = {header.decode(): value.decode() for header, value in vector.request.headers}
    signed = {each for spec in verifier.signing_specs for each in (spec.header, spec.timestamp_header) if each}
    bare = {
        header: value for header, value in beside.items() if header.lower() not in {each.lower() for each in signed}
    }
    try:
        pairs = verifier.sign(
            vector.request.body, now=vector.now, id="id-1", type="push", headers=bare,
            path=vector.request.path, query=vector.request.query,
        )  # fmt: skip
    except UsageError as error:
        assert str(error).startswith("a test event for this source: expected")  # noqa: PT017 - not always raised
        return
    query = verifier.signed_query(now=vector.now) or vector.request.query
    verifier.verify(a_request(pairs, body=vector.request.body, path=vector.request.path, query=query), now=vector.now)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("stripe", 300), ("slack", 300), ("paddle", 5), ("calendly", 180), ("workos", 180), ("zendesk", 300)],
)
def test_the_tolerance_is_the_vendors_unless_a_source_says_otherwise(name: str, tolerance: int) -> None:
    vector = VECTORS[name]
    assert [spec.tolerance for spec in vector.verifier().signing_specs] == [tolerance]
    assert reason(vector.verifier(), vector.request, now=vector.now + tolerance + 1) == "stale_timestamp"
    assert reason(vector.verifier(tolerance="1d"), vector.request, now=vector.now + tolerance + 1) == "accepted"


def test_githubs_sha1_signature_alone_is_no_signature() -> None:
    sha1 = "sha1=8e80b3f56c50d633ea744a36a7e038a20a00e836"
    assert reason(a_preset("github"), a_request([("X-Hub-Signature", sha1)])) == "missing_signature"
    assert reason(a_preset("github"), a_request([("X-Hub-Signature-256", sha1)])) == "malformed_signature"


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
    a_preset("svix", secrets=[WHSEC]).verify(a_request(STANDARD_HEADERS.items()), now=NOW)


def test_square_signs_the_address_that_it_was_given() -> None:
    vector = VECTORS["square"]
    url, _, path = (vector.public_url or "").partition("/in/")
    assert path
    base = a_verifier("square", public_url=url, **vector.config)
    sent = vector.request._replace(path=f"/in/{path}")
    base.verify(sent, now=vector.now)
    assert reason(base, sent._replace(path="/in/other"), now=vector.now) == "bad_signature"
    assert reason(base, sent._replace(query="a=1"), now=vector.now) == "bad_signature"


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
    check("gocardless", b'{"id":"EV1","resource_type":"payments","action":"failed"}', ("EV1", "payments.failed"))
    check("linkedin", b'{"notificationId":1234567890123,"action":"LIKE"}', ("1234567890123", "LIKE"))
    check("linkedin", b'{"type":"LEAD_ACTION","leadType":"SPONSORED"}', (None, "LEAD_ACTION"))
    check("okta", b'{"uuid":"u1","eventType":"user.session.start"}', ("u1", "user.session.start"))
    check("webflow", b'{"triggerType":"form_submission","payload":{"id":"63"}}', ("63", "form_submission"))
    check("x", b'{"data":{"event_uuid":"-27","event_type":"post.create"}}', ("-27", "post.create"))


@pytest.mark.parametrize(
    ("name", "identity", "kind"),
    [
        ("pipedrive", "4710827 bbba59e9-1d1f-4794-9472-72540d421386 create 2", "create.activity"),
        ("qonto-onboarding", "75341dcb-0376-474d-97d7-d2c03ff3973c", "registrations.pending"),
    ],
)
def test_a_body_that_the_vendor_has_published_has_identity_and_type(name: str, identity: str, kind: str) -> None:
    assert VECTORS[name].made_by.startswith("http")
    check(name, VECTORS[name].request.body, (identity, kind))


OWN = [each for each in vectors() if not each.made_by.startswith("http")]
"""Requests whose bodies have the documented shape; what was published is as it is."""


WITHOUT = {"quickbooks": b'{"eventNotifications":', "x": b'{"for_user_id":'}
"""How the bodies begin of a form that has neither: of a former format, and of the Account Activity API."""


@pytest.mark.parametrize("vector", OWN, ids=str)
def test_a_signed_request_has_the_identity_and_type_of_its_preset(vector: Vector) -> None:
    """What the preset reads must be there, but for the vectors of a form that has neither."""
    verifier = vector.verifier()
    bodies = [vector.request.body] if verifier.split is None else split(vector.request.body, verifier.split)
    body = vector.request.body if bodies is None else bodies[0]
    view = EventView(source="it", headers=vector.request.headers, query=vector.request.query, body=body)
    has_both = vector.scheme not in WITHOUT or not body.startswith(WITHOUT[vector.scheme])
    for text in (verifier.id, verifier.type):
        if text is not None:
            assert bool(_value(text, view)) is has_both, text


def _value(text: str, view: EventView) -> str | None:
    try:
        return Expression(text).as_text(view)
    except ExpressionError:
        return None


def test_an_unsigned_type_is_read_only_where_the_vendor_has_no_signed_one() -> None:
    """THREAT_MODEL.md names them, and what a route does about it."""
    unsigned = {name for name, preset in PRESETS.items() if "headers" in (preset.type or "")}
    told = (Path(__file__).parent.parent.parent / "THREAT_MODEL.md").read_text()
    [row] = [line for line in told.splitlines() if "an event's type" in line]
    assert unsigned == {name for name in PRESETS if f"`{name}`" in row}


@pytest.mark.parametrize("name", PRESETS)
def test_the_expressions_of_a_preset_are_header_names_and_paths_that_compile(name: str) -> None:
    preset = PRESETS[name]
    for text in (preset.id, preset.type, *[method.id for method in preset.methods]):
        if text is not None:
            Expression(text)
            assert re.search(r"body\b|headers\['[a-z0-9-]+'\]", text)


def test_a_repeated_event_is_a_duplicate_where_the_provider_retries() -> None:
    for name, preset in PRESETS.items():
        assert preset.dedupe in {None, 3600.0}, name
        assert preset.id is not None or preset.dedupe is None, f"{name}: without an identity nothing is a duplicate"
    for asked_for in ("github", "gitlab", "sentry"):  # what comes again was sent again by somebody, on purpose
        assert PRESETS[asked_for].dedupe is None
    assert a_preset("stripe").dedupe == 3600


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_no_key_that_it_has_itself(name: str) -> None:
    with pytest.raises(SchemeError, match="unknown key 'signed'"):
        a_preset(name, signed="{body}")
