"""Forms and XML as their vendors send them, signed as they sign: over the bytes, or the fields, as they came.

The samples are short ones of the shape that the vendor's document has, which each test names.
"""

import json
from typing import Any
from urllib.parse import urlencode

import pytest

from gateway.model import Event
from gateway.rules.event_builder import EventBuilder
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.rules.rules import Source
from gateway.verify.request import Request
from gateway.verify.schemes import build_verifier

NOW = 1_700_000_000.0
FORM = "application/x-www-form-urlencoded"
URL = "https://hooks.example/in/it"


def received(scheme: str, body: bytes, content_type: str, **headers: str) -> Event:
    """Sign a body as a provider does, verify it, and make an event of it."""
    verifier = build_verifier({"scheme": scheme, "secrets": ["It's a Secret"]}, public_url=URL)
    given = {"Content-Type": content_type, **{name.replace("_", "-"): value for name, value in headers.items()}}
    pairs = verifier.sign(body, now=NOW, id="id1", type="push", headers=given, path="/in/it")
    sent = tuple((name.encode(), value.encode()) for name, value in pairs)
    request = Request("POST", "/in/it", "", sent, body)
    verified = verifier.verify(request, now=NOW)
    source = Source(name="it", path="/in/it", verifier=verifier)
    return EventBuilder(source).event(request, received_at=NOW, identity_expression=verified.identity)


def value_of(expression: str, event: Event) -> Any:
    return Expression(expression).evaluate(EventView.of(event))


def test_github_with_the_content_type_of_a_form() -> None:
    """https://docs.github.com/en/webhooks/using-webhooks/creating-webhooks: the JSON is the parameter `payload`."""
    payload = {"ref": "refs/heads/main", "repository": {"full_name": "octo/app"}, "commits": [{"id": "a b+c"}]}
    event = received("github", urlencode({"payload": json.dumps(payload)}).encode(), FORM)
    assert (event.type, value_of("body.payload", event)) == ("push", payload)
    assert value_of("body.payload.commits[0].id", event) == "a b+c"


def test_slacks_interactions_and_commands() -> None:
    """https://docs.slack.dev/interactivity/handling-user-interaction."""
    payload = {"type": "block_actions", "user": {"id": "U1"}, "actions": [{"action_id": "approve", "value": "7"}]}
    event = received("slack", urlencode({"payload": json.dumps(payload)}).encode(), FORM)
    assert event.type == "block_actions"
    assert value_of("body.payload.actions.exists(each, each.action_id == 'approve')", event) is True
    command = {"token": "t", "team_id": "T1", "command": "/weather", "text": '{"not": "parsed"}', "user_id": "U1"}
    event = received("slack", urlencode(command).encode(), FORM)
    assert (event.type, value_of("body", event)) == ("webhook", command)


def test_mandrills_list_of_events() -> None:
    """https://mailchimp.com/developer/transactional/guides/track-respond-activity-webhooks/: signed field by field."""
    events = [{"event": "send", "_id": "1", "msg": {"tags": ["a"]}}, {"event": "open", "_id": "2"}]
    event = received("mandrill", urlencode({"mandrill_events": json.dumps(events)}).encode(), FORM)
    assert value_of("body.mandrill_events", event) == events
    assert value_of("body.mandrill_events.map(each, each.event)", event) == ["send", "open"]


def test_twilios_plain_fields() -> None:
    """https://www.twilio.com/docs/messaging/guides/webhook-request: numbers are texts, and names have capitals."""
    fields = {"MessageSid": "SM1", "From": "+14017122661", "Body": "Ahoy! 👋", "NumMedia": "0"}
    event = received("twilio", urlencode(fields).encode(), FORM, I_Twilio_Idempotency_Token="id1")
    assert value_of("body", event) == fields


MAILGUN = {
    "recipient": "bob@shop.example",
    "subject": "Re: order",
    "attachment-count": "1",
    "message-headers": '[["Received", "by luna"], ["Subject", "Re: order"]]',
}


def test_mailguns_routes_with_and_without_files() -> None:
    """https://documentation.mailgun.com/docs/mailgun/user-manual/receive-forward-store/receive-http."""
    plain = urlencode(MAILGUN).encode()
    part = '--b\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n{}\r\n'
    parts = [part.format(name, "", value) for name, value in MAILGUN.items()]
    file = part.format("attachment-1", '; filename="o.pdf"\r\nContent-Type: application/pdf', "%PDF-1")
    whole = "".join([*parts, file, "--b--\r\n"]).encode()
    read = {**MAILGUN, "message-headers": [["Received", "by luna"], ["Subject", "Re: order"]]}
    for body, content_type, more in (
        (plain, FORM, {}),
        (
            whole,
            "multipart/form-data; boundary=b",
            {"attachment-1": {"filename": "o.pdf", "content_type": "application/pdf", "size": 6}},
        ),
    ):
        view = EventView(source="s", headers=((b"content-type", content_type.encode()),), query="", body=body)
        assert view.body == {**read, **more}


DOCUSIGN = b"""<?xml version="1.0" encoding="utf-8"?>
<DocuSignEnvelopeInformation xmlns:xsd="http://www.w3.org/2001/XMLSchema" xmlns="http://www.docusign.net/API/3.0">
  <EnvelopeStatus>
    <RecipientStatuses>
      <RecipientStatus><Type>Signer</Type><Email>ann@example.com</Email></RecipientStatus>
      <RecipientStatus><Type>CarbonCopy</Type><Email>bob@example.com</Email></RecipientStatus>
    </RecipientStatuses>
    <EnvelopeID>e-1</EnvelopeID>
    <Status>Completed</Status>
  </EnvelopeStatus>
</DocuSignEnvelopeInformation>"""


def test_docusigns_xml() -> None:
    """https://developers.docusign.com/platform/webhooks/connect/legacy-message-formats."""
    event = received("docusign", DOCUSIGN, "text/xml; charset=utf-8")
    status = "body.DocuSignEnvelopeInformation.EnvelopeStatus"
    assert value_of(f"{status}.EnvelopeID", event) == "e-1"
    emails = f"{status}.RecipientStatuses.RecipientStatus.map(each, each.Email)"
    assert value_of(emails, event) == ["ann@example.com", "bob@example.com"]


@pytest.mark.parametrize("scheme", ["github", "slack", "docusign"])
def test_a_signature_is_of_the_bytes_though_another_spelling_reads_the_same(scheme: str) -> None:
    verifier = build_verifier({"scheme": scheme, "secrets": ["It's a Secret"]}, public_url=URL)
    pairs = verifier.sign(b"a=%41", now=NOW, id="id1", type="push", headers={"Content-Type": FORM}, path="/in/it")
    headers = tuple((name.encode(), value.encode()) for name, value in pairs)
    verifier.verify(Request("POST", "/in/it", "", headers, b"a=%41"), now=NOW)
    with pytest.raises(Exception, match="bad_signature"):
        verifier.verify(Request("POST", "/in/it", "", headers, b"a=A"), now=NOW)
