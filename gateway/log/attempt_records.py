"""Encodes attempts as records of `gateway.attempts`, for whatever shows what was tried and what was answered.

A record's key is the event's id, and its value the beginning of the body of a response that was no success, masked
(`gateway/client/masking.py`). It is empty for a success, and where no response came. In its headers:

    gw_v         format version, "1"
    gw_type      the event's type
    gw_attempt   JSON: whose attempt it was, how it was made, its result, and what followed
    gw_headers   the response's header pairs, masked: `name: value`, joined by CRLF; only with a response

No delivery depends on a record: attempts are recorded as far as there is room (`engine/delivery/attempt_log.py`).
"""

from enum import StrEnum
from typing import Any

import orjson

from gateway.log.base import NewRecord, Record
from gateway.log.json_fields import ID, JsonFields, check_format
from gateway.log.records import parse_pairs
from gateway.model import (
    BODY_EXCERPT,
    NAME_PATTERN,
    NO_PHASES,
    AttemptPhases,
    DeliveryId,
    EventId,
    ResponseExcerpt,
    Result,
    UndecodableRecordError,
    immutable,
)

FORMAT = 1


class Decision(StrEnum):
    """What follows an attempt, as its process has decided it: a closed set."""

    DELIVERED = "delivered"
    RETRY = "retry"
    DEAD_LETTER = "dead_letter"
    DROPPED = "dropped"
    HALTED = "halted"
    """Of an ordered route with `on_exhausted: halt`: its key waits for a kick."""


@immutable
class AttemptRecord:
    """One attempt of a delivery.

    `received_at` (of the event) and `replayed_at` (0 if it wasn't) tell occurrences of one delivery apart; `item` is
    which item of its event it is for, None if that is all of it. `at` is when it began, by the log's clock; `seconds`
    is how long it took, with the fetch of a token. `decision` is None if the gateway has failed to decide. `detail` and
    `retry_after` (seconds) are as in an `Attempt`. `host` is the destination's, even behind a proxy; nothing else of
    the URL is here. `rules` is the version of the rules by which the request was made, "" if it has none.
    `response` is None for a success, and where there was none.
    """

    event_id: EventId
    delivery_id: DeliveryId
    source: str
    type: str
    route: str
    destination: str
    received_at: float
    replayed_at: float = 0.0
    item: int | None = None
    number: int
    at: float
    seconds: float
    result: Result
    decision: Decision | None = None
    status: int | None = None
    detail: str = ""
    retry_after: float | None = None
    phases: AttemptPhases = NO_PHASES
    method: str
    host: str
    rules: str = ""
    response: ResponseExcerpt | None = None


def encode_attempt_record(attempt: AttemptRecord) -> NewRecord:
    """Return the record of an attempt."""
    dns, connect, tls, first_byte = attempt.phases
    fields: dict[str, Any] = {
        "delivery": attempt.delivery_id,
        "source": attempt.source,
        "route": attempt.route,
        "destination": attempt.destination,
        "received_at": attempt.received_at,
        "replayed_at": attempt.replayed_at,
        "item": attempt.item,
        "n": attempt.number,
        "at": attempt.at,
        "s": attempt.seconds,
        "result": attempt.result,
        "decision": attempt.decision,
        "status": attempt.status,
        "detail": attempt.detail,
        "retry_after": attempt.retry_after,
        "phases": {"dns": dns, "connect": connect, "tls": tls, "first_byte": first_byte},
        "method": attempt.method,
        "host": attempt.host,
        "rules": attempt.rules,
    }
    headers = [("gw_v", b"%d" % FORMAT), ("gw_type", attempt.type.encode("utf-8", "surrogateescape"))]
    response = attempt.response
    body = b""
    if response is not None:
        body = response.body
        fields["response"] = {"body_cut": int(response.is_body_cut), "headers_cut": int(response.are_headers_cut)}
        headers.append(("gw_headers", b"\r\n".join(map(b": ".join, response.headers))))
    headers.append(("gw_attempt", orjson.dumps(fields)))
    return NewRecord(key=attempt.event_id.encode(), value=body, headers=headers)


def decode_attempt_record(record: Record) -> AttemptRecord:
    """Read a record of `gateway.attempts`. Raises UndecodableRecordError or NewerRecordError."""
    headers = dict(record.headers)
    check_format("gw_v", headers.get("gw_v"), FORMAT)
    if "gw_type" not in headers:
        raise UndecodableRecordError("gw_type", "this record header", None)
    fields = JsonFields.parse("gw_attempt", headers.get("gw_attempt"))
    return AttemptRecord(
        event_id=_event_id(record.key),
        delivery_id=DeliveryId(fields.text("delivery", like=ID, expected="an id")),
        source=_name(fields, "source"),
        type=headers["gw_type"].decode("utf-8", "surrogateescape"),
        route=_name(fields, "route"),
        destination=_name(fields, "destination"),
        received_at=fields.number("received_at"),
        replayed_at=fields.number("replayed_at"),
        item=fields.integer("item") if fields.has("item") else None,
        number=fields.integer("n", minimum=1),
        at=fields.number("at"),
        seconds=fields.number("s"),
        result=Result(_member(fields, "result", _RESULTS, "a result")),
        decision=Decision(_member(fields, "decision", _DECISIONS, "what followed")) if fields.has("decision") else None,
        status=fields.integer("status", maximum=999) if fields.has("status") else None,
        detail=fields.text("detail"),
        retry_after=fields.number("retry_after") if fields.has("retry_after") else None,
        phases=_phases(fields.inside("phases")),
        method=fields.text("method"),
        host=fields.text("host"),
        rules=fields.text("rules"),
        response=_response(fields.inside("response"), headers, record.value) if fields.has("response") else None,
    )


def _event_id(key: bytes) -> EventId:
    text = key.decode("utf-8", "replace")
    if not ID.fullmatch(text):
        raise UndecodableRecordError("key", "an event's id", key)
    return EventId(text)


def _name(fields: JsonFields, name: str) -> str:
    return fields.text(name, like=NAME_PATTERN, expected="a name")


def _member(fields: JsonFields, name: str, members: frozenset[str], expected: str) -> str:
    value = fields.text(name)
    if value not in members:
        raise fields.error(name, expected)
    return value


def _phases(fields: JsonFields) -> AttemptPhases:
    return AttemptPhases(**{name: fields.number(name) for name in AttemptPhases._fields if fields.has(name)})


def _response(fields: JsonFields, headers: dict[str, bytes], body: bytes) -> ResponseExcerpt:
    if "gw_headers" not in headers:
        raise UndecodableRecordError("gw_headers", "this record header", None)
    if len(body) > BODY_EXCERPT:
        raise UndecodableRecordError("value", f"at most {BODY_EXCERPT} bytes of a body", body)
    return ResponseExcerpt(
        headers=parse_pairs(headers["gw_headers"]),
        are_headers_cut=fields.integer("headers_cut", maximum=1) == 1,
        body=body,
        is_body_cut=fields.integer("body_cut", maximum=1) == 1,
    )


_RESULTS = frozenset(Result)
_DECISIONS = frozenset(Decision)
