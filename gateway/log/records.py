"""How events and deliveries are written into records: CloudEvents 1.0, Kafka binding, binary mode.

The value is the body, byte for byte. `ce_*` and `content-type` are CloudEvents' (`ce_traceparent` and `ce_tracestate`,
its extension for distributed tracing, only where the gateway traces); `gw_*` are ours beside them:

    gw_v         format version, "1"
    gw_at        when the event was received, Unix seconds
    gw_headers   the header pairs as they came: `name: value`, joined by CRLF
    gw_query     the raw query string
    gw_key       the order key, where the source has one
    gw_delivery  JSON, on retry, parked and dead records: which delivery, its attempts, when it is due, why it is here

A record of `gateway.dedupe` is no event. Its key is "topic/partition", its value rows of 40 bytes, and its headers
are `gw_v`, `gw_source` and `gw_origin`: the time (microseconds) before which that partition had no event, 0 if unknown.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md
"""

import hashlib
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from gateway.log.base import Partition, Record
from gateway.model import (
    Attempt,
    Delivery,
    DeliveryId,
    Event,
    EventId,
    Headers,
    Result,
    TraceContext,
    UndecodableRecordError,
)

FORMAT = b"1"
SIGHTING = struct.Struct(">16s8sQQ")
"""Of an event: the digest of its identity, its fingerprint, its offset, and when it was appended (microseconds)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filed:
    """A delivery as found in a retry, parked or dead record.

    `note` says why it is there, in names and texts. `at` is when it was written, by the writer's idea of the time.
    """

    delivery: Delivery
    note: Mapping[str, str]
    at: float


class Sighted(NamedTuple):
    """What a record of `gateway.dedupe` tells of one source in one partition: rows of `SIGHTING`, one after another."""

    source: str
    origin: int
    rows: bytes


def event_key(event: Event) -> bytes:
    """Return the record key: the order key if there is one, else the event's id."""
    return (event.key or event.id).encode("utf-8", "surrogateescape")


def encode_event(event: Event) -> list[tuple[str, bytes]]:
    """Return the record headers of an event; its value is `event.body`."""
    headers = [
        ("ce_specversion", b"1.0"),
        ("ce_id", event.id.encode()),
        ("ce_source", event.source.encode()),
        ("ce_type", event.type.encode("utf-8", "surrogateescape")),
        ("ce_time", _rfc3339(event.received_at)),
        ("gw_v", FORMAT),
        ("gw_at", b"%.6f" % event.received_at),
        ("gw_headers", b"\r\n".join([b": ".join(pair) for pair in event.headers])),
    ]
    for name, value in event.headers:
        if len(name) == len(b"content-type") and name.lower() == b"content-type":
            headers.append(("content-type", value))
            break
    if event.query:
        headers.append(("gw_query", event.query.encode("utf-8", "surrogateescape")))
    if event.key is not None:
        headers.append(("gw_key", event.key.encode("utf-8", "surrogateescape")))
    if event.trace is not None:
        headers.append(("ce_traceparent", event.trace.traceparent.encode("ascii")))
        if event.trace.tracestate:
            headers.append(("ce_tracestate", event.trace.tracestate.encode("ascii")))
    return headers


def encode_delivery(delivery: Delivery, note: Mapping[str, str], *, at: float) -> list[tuple[str, bytes]]:
    """Return the record headers of a delivery that goes to a retry, parked or dead-letter topic, at a time."""
    state: dict[str, Any] = {
        "id": delivery.id,
        "route": delivery.route,
        "destination": delivery.destination,
        "successor": delivery.successor,
        "due": delivery.due,
        "since": delivery.since,
        "attempts": [_encode_attempt(attempt) for attempt in delivery.attempts],
        "note": dict(note),
        "at": at,
    }
    return [*encode_event(delivery.event), ("gw_delivery", orjson.dumps(state))]


def decode_event(record: Record) -> Event:
    """Read an event. Raises UndecodableRecordError, saying what is missing or unknown."""
    return _event(dict(record.headers), record.value)


def decode_delivery(record: Record) -> Filed:
    """Read a delivery with its event. Raises UndecodableRecordError, saying what is missing or unknown."""
    fields = dict(record.headers)
    event = _event(fields, record.value)
    try:
        state = orjson.loads(fields["gw_delivery"])
        delivery = Delivery(
            id=DeliveryId(_text(state["id"])),
            event=event,
            route=_text(state["route"]),
            destination=_text(state["destination"]),
            attempts=tuple([_decode_attempt(attempt) for attempt in state["attempts"]]),
            successor=int(state["successor"]),
            due=_time(state["due"]),
            since=_time(state["since"]),
        )
        note = {name: _text(text) for name, text in state["note"].items()}
        return Filed(delivery=delivery, note=note, at=_time(state["at"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UndecodableRecordError(f"gw_delivery: expected a delivery's state, got {error!r}") from error


def note_of(record: Record) -> Mapping[str, str]:
    """Return why a delivery's record is where it is, without reading all of it; empty if that can't be told."""
    try:
        note = orjson.loads(dict(record.headers)["gw_delivery"])["note"]
        return {name: _text(text) for name, text in note.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def fingerprint(event: Event) -> bytes:
    """Return 8 bytes that differ where two events of one identity differ: in type, query or body."""
    what = f"{len(event.type)} {event.type} {len(event.query)} {event.query} "
    digest = hashlib.blake2b(what.encode("utf-8", "surrogateescape"), digest_size=8)
    digest.update(event.body)
    return digest.digest()


def sightings_key(partition: Partition) -> bytes:
    """Return the key of all records that tell of what was seen in a partition of an events' topic."""
    return f"{partition.topic}/{partition.number}".encode()


def encode_sightings(source: str, origin: int) -> list[tuple[str, bytes]]:
    """Return the record headers of rows of `SIGHTING`, which are the record's value."""
    return [("gw_v", FORMAT), ("gw_source", source.encode()), ("gw_origin", b"%d" % origin)]


def decode_sightings(record: Record) -> Sighted:
    """Read a record of `gateway.dedupe`. Raises UndecodableRecordError, saying what is missing or unknown."""
    fields = dict(record.headers)
    if fields.get("gw_v") != FORMAT:
        raise UndecodableRecordError(f"gw_v: expected 1, got {fields.get('gw_v')!r}")
    if len(record.value) % SIGHTING.size:
        raise UndecodableRecordError(f"value: expected rows of {SIGHTING.size} bytes, got {len(record.value)} bytes")
    try:
        return Sighted(fields["gw_source"].decode(), int(fields["gw_origin"]), record.value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UndecodableRecordError(f"record headers: expected gw_source and gw_origin, got {error!r}") from error


def split_headers(raw: bytes) -> Headers:
    """Read `gw_headers` back into pairs."""
    if not raw:
        return ()
    return tuple([(name, value) for name, _, value in [line.partition(b": ") for line in raw.split(b"\r\n")]])


def _event(fields: Mapping[str, bytes], value: bytes) -> Event:
    try:
        if fields["gw_v"] != FORMAT:
            raise UndecodableRecordError(f"gw_v: expected 1, got {fields['gw_v'].decode(errors='replace')}")
        key = fields.get("gw_key")
        return Event(
            id=EventId(fields["ce_id"].decode()),
            source=fields["ce_source"].decode(),
            type=fields["ce_type"].decode("utf-8", "surrogateescape"),
            key=None if key is None else key.decode("utf-8", "surrogateescape"),
            received_at=_time(fields["gw_at"]),
            headers=split_headers(fields["gw_headers"]),
            query=fields.get("gw_query", b"").decode("utf-8", "surrogateescape"),
            body=value,
            trace=_trace(fields) if "ce_traceparent" in fields else None,
        )
    except KeyError as error:
        raise UndecodableRecordError(f"{error.args[0]}: expected this record header, got none") from error
    except (TypeError, ValueError, AttributeError) as error:  # another client may have written a header without a value
        raise UndecodableRecordError(f"record headers: expected those of an event, got {error}") from error


def _trace(fields: Mapping[str, bytes]) -> TraceContext | None:
    """Return the context, or none where it isn't one: the event matters more."""
    if not _TRACEPARENT.fullmatch(fields["ce_traceparent"]):
        return None
    state = fields.get("ce_tracestate", b"")
    return TraceContext(fields["ce_traceparent"].decode("ascii"), state.decode("ascii") if state.isascii() else "")


_TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _time(value: float | bytes) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"expected a time, got {seconds}")
    return seconds


def _rfc3339(at: float) -> bytes:
    second = int(at)
    return b"%b.%03dZ" % (_to_the_second(second), (at - second) * 1000)


@lru_cache(maxsize=4)
def _to_the_second(second: int) -> bytes:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S").encode()


def _encode_attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "n": attempt.number,
        "at": round(attempt.at, 3),
        "s": round(attempt.seconds, 3),
        "result": attempt.result,
        "status": attempt.status,
        "detail": attempt.detail,
    }


def _decode_attempt(state: Mapping[str, Any]) -> Attempt:
    return Attempt(
        number=int(state["n"]),
        at=_time(state["at"]),
        seconds=_time(state["s"]),
        result=Result(state["result"]),
        status=None if state["status"] is None else int(state["status"]),
        detail=_text(state["detail"]),
    )
