"""Mail through the APIs of SendGrid and Postmark. A value from an event can't add a recipient.

Postmark's is documented at https://postmarkapp.com/developer/api/email-api.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.model import ExpressionError
from gateway.rules.request_presets.preset import Field, Kind, RequestPreset, as_message
from gateway.rules.request_templates import Message

_ADDRESS = re.compile(r"[^\s@,;:<>()\[\]\\\"]+@[^\s@,;:<>()\[\]\\\"]+")
_NAME = re.compile(r"[^<>\"\\]*")
_SEPARATORS = re.compile("[,;]+")
MAX_RECIPIENTS = 50
"""Postmark's limit. SendGrid's is 1,000."""


def _parsed(text: str, where: str) -> tuple[str, str]:
    """Return the name and the address of `Name <address>`, or "" and the address."""
    name, bracket, address = text.partition("<")
    if bracket and address.endswith(">"):
        address = address[:-1]
    else:
        name, address = "", text
    if not _ADDRESS.fullmatch(address) or not _NAME.fullmatch(name):
        raise ExpressionError(f"{where}: expected one address, such as jo@acme.example, got something else")
    return name.strip(), address


def _email(values: Mapping[str, Any]) -> Message:
    to = _unique(_parsed(each, "to") for each in values["to"])
    if not 0 < len(to) <= MAX_RECIPIENTS:
        raise ExpressionError(f"to: expected 1 to {MAX_RECIPIENTS} addresses, got {len(to)}")
    if not values["subject"] or not values["text"].strip():
        raise ExpressionError("expected a subject and a text with something in them, got an empty one")
    sender = _parsed(values["from"], "from")
    reply_to = _parsed(values["reply_to"], "reply_to") if "reply_to" in values else None
    if values["service"] == "postmark":
        body = {
            "From": _written(sender),
            "To": ", ".join(map(_written, to)),
            "Subject": values["subject"],
            "TextBody": values["text"],
            **({"ReplyTo": _written(reply_to)} if reply_to else {}),
            **({"MessageStream": values["stream"]} if "stream" in values else {}),
        }
    else:
        body = {
            # SendGrid accepts no , and ; in a recipient's name: once, another address could follow them.
            "personalizations": [{"to": [_as_object((_without_separators(name), mail)) for name, mail in to]}],
            "from": _as_object(sender),
            "subject": values["subject"],
            "content": [{"type": "text/plain", "value": values["text"]}],
            **({"reply_to": _as_object(reply_to)} if reply_to else {}),
        }
    return as_message(body)


def _unique(people: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Remove duplicate addresses, ignoring case, since SendGrid refuses them."""
    unique: dict[str, tuple[str, str]] = {}
    for name, address in people:
        unique.setdefault(address.lower(), (name, address))
    return list(unique.values())


def _without_separators(name: str) -> str:
    *parts, last = _SEPARATORS.split(name)
    return "".join([*[part.rstrip(" ") for part in parts], last])


def _written(who: tuple[str, str]) -> str:
    name, address = who
    return f'"{name}" <{address}>' if name else address


def _as_object(who: tuple[str, str]) -> dict[str, str]:
    name, address = who
    return {"email": address, "name": name} if name else {"email": address}


EMAIL_API = RequestPreset(
    name="email-api",
    about="A mail of plain text by SendGrid or Postmark.",
    url="https://api.sendgrid.com/v3/mail/send with `auth: {bearer: …}`, or https://api.postmarkapp.com/email with "
    "`headers: {X-Postmark-Server-Token: …}`",
    source="https://www.twilio.com/docs/sendgrid/api-reference/mail-send/mail-send",
    fields=(
        Field(
            name="service",
            kind=Kind.CHOICE,
            about="`sendgrid` or `postmark`.",
            is_required=True,
            choices=("sendgrid", "postmark"),
        ),
        Field(name="from", kind=Kind.LINE, about="An address, or `Name <address>`.", is_required=True, is_exact=True),
        Field(
            name="to",
            kind=Kind.LINES,
            about="An address, or a list of at most 50.",
            is_required=True,
            is_exact=True,
        ),
        Field(name="reply_to", kind=Kind.LINE, about="Where answers go.", is_exact=True),
        Field(name="subject", kind=Kind.LINE, about="The subject, in one line.", is_required=True, limit=500),
        Field(name="text", kind=Kind.TEXT, about="The text, without markup.", is_required=True, limit=500_000),
        Field(name="stream", kind=Kind.LINE, about="Postmark's message stream; `outbound` without it."),
    ),
    build=_email,
)
