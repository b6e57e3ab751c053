"""An event that its provider sends again is the one that it was; another event is another one, also in one request."""

import json
from typing import Any, NamedTuple

import pytest

from gateway.log.records import fingerprint
from gateway.model import Event, EventId, identity_of
from gateway.rules import event_builder
from gateway.rules.event_builder import EventBuilder
from gateway.rules.rules import Source
from gateway.verify.presets import PRESETS
from tests.verify.signed_requests import a_request
from tests.verify.vectors import Vector, vectors

VECTORS: dict[str, Vector] = {vector.scheme: vector for vector in vectors()}
OBJECT = "5f9e2a-one-object-of-several-events"


class Sample(NamedTuple):
    """Where a provider's documents have the identity: in a header or a body, of which ID stands for it.

    `items` is the list of which the body is one item, if the provider sends several events in a request: the members
    to the list in the body.
    """

    body: Any = "{}"
    header: str | None = None
    items: tuple[str, ...] | None = None


ID = "the identity"
SAMPLES = {
    "azure-devops": Sample({"subscriptionId": "s1", "notificationId": 1, "id": ID, "resource": {"id": OBJECT}}),
    "contentful": Sample({"sys": {"type": "Entry", "id": OBJECT}}, header="X-Contentful-Idempotency-Key"),
    "easypost": Sample({"id": ID, "object": "Event", "result": {"id": OBJECT}}),
    "front": Sample({"type": "inbound", "payload": {"id": f"evt_{ID}", "conversation": {"id": OBJECT}}}),
    "front-rules": Sample({"id": ID, "type": "inbound", "conversation": {"id": OBJECT}}),
    "gocardless": Sample({"id": ID, "resource_type": "payments", "links": {"payment": OBJECT}}, items=("events",)),
    "harbor": Sample({"specversion": "1.0", "id": ID, "requestid": OBJECT, "type": "harbor.artifact.pushed"}),
    "heroku": Sample({"data": {"id": OBJECT}, "webhook_metadata": {"event": {"id": ID}, "webhook": {"id": OBJECT}}}),
    "klaviyo": Sample({"external_id": ID, "topic": "event:klaviyo.sent_sms", "payload": {}}, items=("data",)),
    "launchdarkly": Sample({"_id": ID, "kind": "flag", "target": {"_id": OBJECT}}),
    "line": Sample({"webhookEventId": ID, "type": "message", "message": {"id": OBJECT}}, items=("events",)),
    "linkedin": Sample({"notificationId": ID, "action": "LIKE", "sourcePost": OBJECT}, items=("notifications",)),
    "microsoft-graph": Sample({"id": ID, "subscriptionId": OBJECT, "resource": OBJECT}, items=("value",)),
    "modern-treasury": Sample({"event": "created", "data": {"id": OBJECT}}, header="X-Webhook-ID"),
    "mollie": Sample({"resource": "event", "id": ID, "type": "payment-link.paid", "entityId": OBJECT}),
    "nylas": Sample({"id": ID, "type": "message.created", "data": {"object": {"id": OBJECT}}}),
    "okta": Sample({"uuid": ID, "eventType": "user.session.start", "actor": {"id": OBJECT}}, items=("data", "events")),
    "pandadoc": Sample([{"event": "document_updated", "data": {"id": OBJECT}}], header="X-PandaDoc-Webhook-Event-Id"),
    "pipedrive": Sample(
        {"meta": {"action": "create", "entity": "deal", "entity_id": OBJECT, "id": ID, "webhook_id": "w1"}},
    ),
    "qonto": Sample({"id": ID, "subscription_id": OBJECT, "type": "v1/transactions", "data": {"id": OBJECT}}),
    "qonto-onboarding": Sample({"id": ID, "event_type": "registrations.pending", "resource_id": OBJECT}),
    "quickbooks": Sample({"id": ID, "type": "qbo.class.created.v1", "intuitentityid": OBJECT}, items=()),
    "sanity": Sample({"_id": OBJECT}, header="idempotency-key"),
    "segment": Sample({"messageId": ID, "type": "track", "userId": OBJECT}),
    "sinch-numbers": Sample({"eventId": ID, "resourceId": OBJECT}),
    "surveymonkey": Sample({"event_id": ID, "event_type": "response_completed", "object_id": OBJECT}),
    "tally": Sample({"eventId": ID, "eventType": "FORM_RESPONSE", "data": {"responseId": OBJECT}}),
    "webflow": Sample({"triggerType": "form_submission", "payload": {"id": ID, "siteId": OBJECT, "formId": OBJECT}}),
    "x": Sample({"data": {"event_uuid": ID, "event_type": "post.create", "payload": {"id": OBJECT}}}),
}
REPEATED_DIFFERENTLY: dict[str, tuple[Any, Any]] = {
    "line": (
        {"webhookEventId": "w1", "type": "message", "deliveryContext": {"isRedelivery": False}},
        {"webhookEventId": "w1", "type": "message", "deliveryContext": {"isRedelivery": True}},
    ),
    "heroku": (
        {"webhook_metadata": {"event": {"id": "w1"}, "attempt": {"id": "a1"}}},
        {"webhook_metadata": {"event": {"id": "w1"}, "attempt": {"id": "a2"}}},
    ),
    "pipedrive": (
        {"meta": {"action": "create", "entity_id": "2", "id": "e1", "webhook_id": "w1", "attempt": 1}},
        {"meta": {"action": "create", "entity_id": "2", "id": "e1", "webhook_id": "w1", "attempt": 2}},
    ),
}
"""First and second attempt of events in whose bodies the provider tells which one it is."""


def events_of(name: str, body: object, **headers: str | bytes) -> list[Event]:
    """Return the events of a request to a source with the provider's preset, as the ingress makes them."""
    verifier = VECTORS[name].verifier()
    source = Source(name="it", path="/in/it", verifier=verifier, split=verifier.split, batch_type=verifier.batch_type)
    request = a_request([*headers.items()], body=json.dumps(body).encode())
    bodies = source.split_body(request)
    builder = EventBuilder(source)
    if bodies is None:
        return [builder.event(request, received_at=0.0)]
    return builder.events(request, bodies, received_at=0.0)


def sent(name: str, *identities: str) -> list[EventId]:
    """Return the ids of the events of one request, an event for each identity."""
    sample = SAMPLES[name]
    bodies = [json.loads(json.dumps(sample.body).replace(ID, identity)) for identity in identities]
    if sample.items is None:
        assert len(bodies) == 1
        body = bodies[0]
    else:
        body = bodies
        for member in reversed(sample.items):
            body = {member: body}
    headers = {} if sample.header is None else {sample.header: identities[0]}
    return [event.id for event in events_of(name, body, **headers)]


@pytest.mark.parametrize("name", SAMPLES)
def test_an_event_that_is_sent_again_has_its_id_and_another_one_has_another(name: str) -> None:
    first, again, other = sent(name, "e1"), sent(name, "e1"), sent(name, "e2")
    assert first == again
    assert len(first) == len(other) == 1
    assert first != other
    assert identity_of(first[0]) is not None


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if sample.items is not None])
def test_an_event_has_its_id_whatever_is_in_the_request_beside_it(name: str) -> None:
    both = sent(name, "e1", "e2")
    assert both == [*sent(name, "e1"), *sent(name, "e2")]
    assert sent(name, "e2", "e3", "e1")[::2] == both[::-1]
    assert not sent(name), "a list without events is none"


@pytest.mark.parametrize("name", PRESETS)
def test_why_there_is_no_identity_is_said_only_where_there_is_none(name: str) -> None:
    preset = PRESETS[name]
    assert preset.id is None or "no_id" not in preset.about
    assert preset.split is None or preset.id is not None or "no_id" in preset.about


@pytest.mark.parametrize("name", REPEATED_DIFFERENTLY)
def test_an_attempt_that_says_which_it_is_has_the_events_id_but_other_content(name: str) -> None:
    """`dedupe` delivers it, and counts a conflict, so that it is off where the source doesn't say otherwise."""
    sample = SAMPLES[name]
    attempts = []
    for body in REPEATED_DIFFERENTLY[name]:
        for member in reversed(sample.items or ()):
            body = {member: [body]}  # noqa: PLW2901 - wrapped
        attempts += events_of(name, body)
    first, second = attempts
    assert first.id == second.id
    assert fingerprint(first) != fingerprint(second)
    assert PRESETS[name].dedupe is None


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("front", {"type": "inbound", "payload": {"id": "msg_1"}}),
        ("harbor", {"type": "PUSH_ARTIFACT", "occur_at": 1, "event_data": {"repository": {"name": "r"}}}),
        ("linkedin", {"type": "LEAD_ACTION", "leadGenFormResponse": "urn:li:leadGenFormResponse:1"}),
        ("microsoft-graph", {"value": [{"subscriptionId": "s", "resource": "Users/1"}]}),
        ("nylas", {"deltas": [{"id": "1"}]}),
        ("pipedrive", {"v": 1, "meta": {"v": 1, "action": "added", "object": "person", "id": 10, "webhook_id": 1}}),
        ("quickbooks", {"eventNotifications": [{"realmId": "1"}]}),
        ("webflow", {"triggerType": "collection_item_changed", "payload": {"id": "1", "siteId": "1"}}),
        ("webflow", {"triggerType": "site_publish", "payload": {"siteId": "1"}}),
        ("x", {"for_user_id": "1", "tweet_create_events": [{"id_str": "1"}]}),
    ],
)
def test_an_event_of_another_form_has_no_identity(name: str, body: object) -> None:
    (event,) = events_of(name, body)
    assert identity_of(event.id) is None


def test_one_event_in_pipedrive_is_another_one_for_each_webhook_action_and_object() -> None:
    """Of a merge there are two: https://pipedrive.readme.io/docs/webhooks-v2-migration-guide."""
    meta = {"action": "change", "entity": "deal", "entity_id": "8", "id": "e1", "webhook_id": "4710827"}
    others = [{}, {"action": "delete"}, {"entity_id": "9"}, {"webhook_id": "4710828"}]
    sent = [event.id for other in others for event in events_of("pipedrive", {"meta": meta | other})]
    assert len({*sent}) == len(others)


# CloudEvents: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md


def in_binary_mode(source: str, identity: str, kind: str = "paid") -> Event:
    sent = {"ce-source": source, "ce-id": identity, "ce-type": kind}
    headers = {name: value.encode("utf-8", "surrogateescape") for name, value in sent.items()}
    [event] = events_of("cloudevents", {}, **headers)
    return event


def in_structured_mode(source: str, identity: str, kind: str = "paid") -> Event:
    body = {"specversion": "1.0", "source": source, "id": identity, "type": kind}
    [event] = events_of("cloudevents", body, **{"Content-Type": "application/cloudevents+json"})
    return event


@pytest.mark.parametrize(
    ("header", "attribute"),
    [
        ("A234-1234-1234", "A234-1234-1234"),
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),
        ("%2e%2F", "./"),
        ("100%25", "100%"),
        ("a%2520b", "a%20b"),
        (r'"a \"b\" \\ c"', r'a "b" \ c'),
        ("%22a%22", '"a"'),
    ],
)
def test_a_cloudevent_has_the_same_identity_and_type_in_both_modes(header: str, attribute: str) -> None:
    for binary, structured in (
        (in_binary_mode("/shop", header), in_structured_mode("/shop", attribute)),
        (in_binary_mode(header, "7"), in_structured_mode(attribute, "7")),
        (in_binary_mode("/shop", "7", header), in_structured_mode("/shop", "7", attribute)),
    ):
        assert (binary.id, binary.type) == (structured.id, structured.type)
        assert identity_of(binary.id) is not None


def test_no_two_cloudevents_have_one_identity() -> None:
    sent = [
        ("a b", "c"),
        ("a", "b c"),
        ("a%20b", "c"),
        ("a", "b%20c"),
        ("", "a b c"),
        ("a b c", ""),
        ('a","b', "c"),
        ("a", 'b","c'),
    ]
    events = [in_structured_mode(source, identity) for source, identity in sent]
    assert len({event.id for event in events}) == len(sent)


@pytest.mark.parametrize("header", ["%", "%C0%A0", "%ED%A0%80", "50%", '"a', "\udcff"])
def test_what_is_no_attribute_of_a_cloudevent_identifies_none(header: str) -> None:
    """Else two of them would be one, or the one whose identity is what is written there."""
    for source, identity in (("/shop", header), (header, "7")):
        first, again = in_binary_mode(source, identity), in_binary_mode(source, identity)
        assert first.id != again.id
        assert identity_of(first.id) is None
    assert in_binary_mode("/shop", "7", header).type == "webhook"


def test_the_defaults_of_presets_are_compiled_once_and_long_ones_of_other_providers_are_not_kept() -> None:
    """Rules that are posted to be explained have providers of their own, whose expressions nobody else uses."""
    defaults = {text for preset in PRESETS.values() for text in (preset.id, preset.type) if text is not None}
    assert max(map(len, defaults)) <= event_builder.MAX_CACHED
    assert all(event_builder._compiled(text) is event_builder._compiled(text) for text in defaults)
    kept = event_builder._cached.cache_info().currsize
    event_builder._compiled(f"'{'x' * event_builder.MAX_CACHED}'")
    assert event_builder._cached.cache_info().currsize == kept
