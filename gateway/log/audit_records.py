"""Encodes what somebody has done as records of `gateway.audit`: who, what, from where, why, and what came of it.

An act has a record before it is done, and another one with the same id for each thing that came of it. A record's key
is the act's id, and it has no value. In its headers:

    gw_v       format version, "1"
    gw_audit   JSON: who, how that is known, from where, what, on what, why, when, and what came of it

Without the first record nothing is done (`gateway/ops/audit.py`).
"""

import re
from enum import StrEnum
from typing import Any

import orjson

from gateway.log.base import NewRecord, Record
from gateway.log.json_fields import JsonFields, check_format
from gateway.model import UndecodableRecordError, immutable

FORMAT = 1
MAX_TEXT = 1000
"""Characters of each text that are kept."""
_ID = re.compile(r"act_[0-9a-f]{32}")


class ActOutcome(StrEnum):
    """What came of an act: a closed set."""

    BEGUN = "begun"
    """Nothing is known yet: the record says that it is about to be done."""
    ACCEPTED = "accepted"
    """The command is stored, and a running gateway carries it out."""
    DONE = "done"
    NOTHING = "nothing"
    """There was nothing to do."""
    CANCELLED = "cancelled"
    """A later command has replaced it, or somebody has cancelled it."""
    FAILED = "failed"
    """It isn't done, or not all of it, as far as is known."""


@immutable
class AuditRecord:
    """An act, or what came of it. `at` is when, by the log's clock (Unix seconds).

    `who` is a name, and `via` how it is known: `is_proven` if whoever it is had to prove it. `origin` is from where: a
    host, or an address. `what` is the act in words of the command line, `on` the name or the selection that it is
    about, `why` what was given as the reason.
    """

    id: str
    at: float
    who: str
    via: str
    is_proven: bool
    origin: str
    what: str
    on: str
    why: str = ""
    outcome: ActOutcome = ActOutcome.BEGUN
    detail: str = ""


def encode_audit_record(record: AuditRecord) -> NewRecord:
    """Return the record of the log; long texts are cut."""
    fields: dict[str, Any] = {
        "at": record.at,
        "who": _cut(record.who),
        "via": record.via,
        "proven": int(record.is_proven),
        "origin": _cut(record.origin),
        "what": _cut(record.what),
        "on": _cut(record.on),
        "why": _cut(record.why),
        "outcome": record.outcome,
        "detail": _cut(record.detail),
    }
    headers = [("gw_v", b"%d" % FORMAT), ("gw_audit", orjson.dumps(fields))]
    return NewRecord(key=record.id.encode(), value=b"", headers=headers)


def decode_audit_record(record: Record) -> AuditRecord:
    """Read a record of `gateway.audit`. Raises UndecodableRecordError or NewerRecordError."""
    headers = dict(record.headers)
    check_format("gw_v", headers.get("gw_v"), FORMAT)
    fields = JsonFields.parse("gw_audit", headers.get("gw_audit"))
    name = record.key.decode("utf-8", "replace")
    if not _ID.fullmatch(name):
        raise UndecodableRecordError("key", "an act's id", record.key)
    outcome = fields.text("outcome")
    if outcome not in _OUTCOMES:
        raise fields.error("outcome", "what came of an act")
    return AuditRecord(
        id=name,
        at=fields.number("at"),
        who=fields.text("who"),
        via=fields.text("via"),
        is_proven=fields.integer("proven", maximum=1) == 1,
        origin=fields.text("origin"),
        what=fields.text("what"),
        on=fields.text("on"),
        why=fields.text("why"),
        outcome=ActOutcome(outcome),
        detail=fields.text("detail"),
    )


_OUTCOMES = frozenset(ActOutcome)


def _cut(text: str) -> str:
    """Return a text as it can be stored: valid UTF-8, and not longer than MAX_TEXT."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
