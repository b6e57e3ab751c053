"""Encodes events and deliveries as records: CloudEvents 1.0, Kafka binding, binary mode.

The value is the body, byte for byte. `ce_*` and `content-type` are CloudEvents' (`ce_traceparent` and `ce_tracestate`,
its extension for distributed tracing, only where the gateway traces); `gw_*` are ours beside them:

    gw_v         format version, "1"
    gw_at        when the event was received, Unix seconds
    gw_headers   the header pairs as received: `name: value`, joined by CRLF
    gw_query     the raw query string
    gw_key       the order key, if the source has one
    gw_delivery  JSON, on ordered, retry, parked and dead-letter records: the delivery, its attempts, when it is due,
                 and why it is in this topic
    gw_from      on ordered records: the event's own record, as topic/partition, offset and append time

A record of `gateway.dedupe` is no event. Its key is "topic/partition", its value consists of rows of 40 bytes, and its
headers are `gw_v`, `gw_source` and `gw_origin`: the time (microseconds) before which that partition had no event, 0 if
unknown.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md
"""

import hashlib
import math
import re
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from gateway.log.base import Partition, Record
from gateway.log.json_fields import ID, LATEST, JsonFields, check_format
from gateway.model import (
    NAME_PATTERN,
    Attempt,
    Delivery,
    DeliveryId,
    DestinationResponse,
    Event,
    EventId,
    Headers,
    NewerRecordError,
    Part,
    RecordMetadata,
    Result,
    TraceContext,
    UndecodableRecordError,
    immutable,
)

FORMAT = 1
_CONTENT_TYPE = b"content-type"
_CONTENT_TYPE_LENGTH = len(_CONTENT_TYPE)
_FROM = "gw_from"
DEDUPE_ENTRY = struct.Struct(">16s8sQQ")
"""A row: the digest of an event's identity, its fingerprint, its offset, and when it was appended (microseconds)."""

ORIGIN_TOLERANCE = 120.0
"""Seconds by which an event may be dated later than the delivery derived from it: the clocks of two brokers dated them.
"""


@immutable
class StoredDelivery:
    """A delivery as stored in a retry, parked or dead-letter record, written `at` a time by the writer's clock."""

    delivery: Delivery
    metadata: RecordMetadata
    at: float


class Origin(NamedTuple):
    """The event's record from which an ordered record was derived."""

    partition: Partition
    offset: int
    appended_at: float
    debounce_key: str = ""
    """By which key its route is debounced, as a digest: by another, it may go to another partition."""


class DedupeEntries(NamedTuple):
    """The content of a record of `gateway.dedupe`, of one source and partition: concatenated rows of `DEDUPE_ENTRY`."""

    source: str
    origin: int
    rows: bytes


class ResponseTo(NamedTuple):
    """To what a destination responded: an event, which its content tells from others with its id."""

    event: EventId
    content: bytes
    """Its `fingerprint`; empty in records of versions that didn't have it."""
    destination: str


class _Headers(dict[str, bytes]):
    """The headers of a record; a missing one makes it undecodable."""

    def __missing__(self, name: str) -> bytes:
        raise UndecodableRecordError(name, "this record header", None)


def event_key(event: Event) -> bytes:
    """Return the record key: the order key if there is one, else the event's id."""
    return (event.key or event.id).encode("utf-8", "surrogateescape")


def footprint(record: Record) -> int:
    """Return about how many bytes of memory a record takes, with the event or delivery decoded from it."""
    size = _RECORD + len(record.value)
    for name, value in record.headers:
        size += len(value)
        if name == "gw_headers":
            size += _PAIR * (value.count(b"\r\n") + 1)
        elif name == "gw_delivery":
            size += 2 * len(value)  # objects take more than their JSON
    return size


def encode_event(event: Event) -> list[tuple[str, bytes]]:
    """Return the record headers of an event; its value is `event.body`."""
    headers = [
        ("ce_specversion", b"1.0"),
        ("ce_id", event.id.encode()),
        ("ce_source", event.source.encode()),
        ("ce_type", event.type.encode("utf-8", "surrogateescape")),
        ("ce_time", _rfc3339(event.received_at)),
        ("gw_v", b"%d" % FORMAT),
        ("gw_at", b"%.6f" % event.received_at),
        ("gw_headers", b"\r\n".join(map(b": ".join, event.headers))),
    ]
    for name, value in event.headers:
        if len(name) == _CONTENT_TYPE_LENGTH and name.lower() == _CONTENT_TYPE:
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


def encode_delivery(delivery: Delivery, metadata: RecordMetadata, *, at: float) -> list[tuple[str, bytes]]:
    """Return the record headers of a delivery that is written to a retry, parked or dead-letter topic at a time."""
    state: dict[str, Any] = {
        "id": delivery.id,
        "route": delivery.route,
        "destination": delivery.destination,
        "successor": delivery.successor,
        "due": delivery.due,
        "replayed_at": delivery.replayed_at,
        "attempts": [_encode_attempt(attempt) for attempt in delivery.attempts],
        "metadata": encode_record_metadata(metadata),
        "at": at,
    }
    if delivery.burst is not None:
        state["burst"] = delivery.burst
    if delivery.delayed_until:
        state["delayed"] = delivery.delayed_until
    if delivery.part is not None:
        state["part"] = {"n": delivery.part.number, "digest": delivery.part.digest, "repeat": delivery.part.repeat}
    encoded = memoryview(orjson.dumps(state)).tobytes()  # orjson's own keeps a buffer of several times its size
    return [*encode_event(delivery.event), ("gw_delivery", encoded)]


def decode_event(record: Record) -> Event:
    """Read an event. Raises UndecodableRecordError or NewerRecordError."""
    return _event(_Headers(record.headers), record.value)


def decode_delivery(record: Record) -> StoredDelivery:
    """Read a delivery with its event. Raises UndecodableRecordError or NewerRecordError."""
    headers = _Headers(record.headers)
    event = _event(headers, record.value)
    state = JsonFields.parse("gw_delivery", headers.get("gw_delivery"))
    metadata = decode_record_metadata(state.inside("metadata"))
    delivery = Delivery(
        id=DeliveryId(state.text("id", like=ID, expected="an id")),
        event=event,
        route=_name(state, "route"),
        destination=_name(state, "destination"),
        attempts=tuple([_attempt(attempt) for attempt in state.each("attempts")]),
        successor=state.integer("successor"),
        due=state.number("due"),
        replayed_at=state.number("replayed_at"),
        delayed_until=state.number("delayed") if state.has("delayed") else 0.0,
        burst=state.text("burst") if state.has("burst") else None,
        part=_part(state) if state.has("part") else None,
    )
    return StoredDelivery(delivery=delivery, metadata=metadata, at=state.number("at"))


def is_newer(record: Record) -> bool:
    """Return whether a newer version of the gateway wrote a record."""
    try:
        check_format("gw_v", dict(record.headers).get("gw_v"), FORMAT)
    except NewerRecordError:
        return True
    except UndecodableRecordError:
        return False
    return False


def encode_origin(origin: Origin) -> tuple[str, bytes]:
    """Return the record header that identifies the event's record from which a delivery was derived."""
    (topic, number), offset, at, by = origin
    return _FROM, f"{topic}/{number} {offset} {at:.6f}{' ' if by else ''}{by}".encode()


def origin_of(record: Record) -> Origin | None:
    """Return the event's record from which a delivery was derived; None if the header is missing or malformed.

    It is malformed, too, if it dates the event later than the delivery: until then, all events would be duplicates.
    """
    found = _PLACE.fullmatch(dict(record.headers).get(_FROM) or b"")
    if found is None:
        return None  # order isn't guaranteed for records of another client
    topic, number, offset, at, by = found.groups(b"")
    if float(at) > record.appended_at + ORIGIN_TOLERANCE:
        return None
    return Origin(Partition(topic.decode("ascii"), int(number)), int(offset), float(at), by.decode("ascii"))


def without_origin(record: Record) -> Record:
    """Return the record without the header that identifies its origin."""
    return record._replace(headers=tuple([header for header in record.headers if header[0] != _FROM]))


def decoded_delivery(record: Record) -> StoredDelivery | UndecodableRecordError | NewerRecordError:
    """Decode a delivery's record, or return why that can't be done."""
    try:
        return decode_delivery(record)
    except (UndecodableRecordError, NewerRecordError) as error:
        return error


def order_key(event: Event) -> str:
    """Return the key within which events are ordered: source and order key, or the event's own id if it has no key."""
    return f"{event.source}\0{event.key}" if event.key is not None else event.id


def order_key_of(delivery: Delivery) -> str:
    """Return the key within which an ordered delivery waits for others: its burst's, or else its event's."""
    event, burst = delivery.event, delivery.burst
    if burst is None:
        return order_key(event)
    return f"{event.source}\0{burst}" if burst else event.id


def record_metadata_of(record: Record) -> RecordMetadata:
    """Return the metadata of a delivery's record without decoding the rest; empty if it is missing or malformed."""
    try:
        return decode_record_metadata(
            JsonFields.parse("gw_delivery", dict(record.headers).get("gw_delivery")).inside("metadata")
        )
    except UndecodableRecordError:
        return RecordMetadata()


def encode_record_metadata(metadata: RecordMetadata) -> dict[str, str]:
    """Return the non-empty fields of record metadata, as in `gw_delivery`."""
    texts = {name: getattr(metadata, name) for name in _METADATA_TEXTS}
    encoded = {name: text for name, text in texts.items() if text}
    if metadata.breaker_deferrals:
        encoded["breaks"] = str(metadata.breaker_deferrals)
    if metadata.unknown_since is not None:
        encoded["unknown_since"] = f"{metadata.unknown_since:.3f}"
    if metadata.is_expedited:
        encoded["is_expedited"] = "1"
    return encoded


def decode_record_metadata(fields: JsonFields) -> RecordMetadata:
    """Read record metadata, ignoring fields of a newer version. Raises UndecodableRecordError."""
    texts = {name: fields.text(name) for name in _METADATA_TEXTS if fields.has(name)}
    since = fields.text("unknown_since", like=_TIME, expected="a time") if fields.has("unknown_since") else None
    return RecordMetadata(
        **texts,
        breaker_deferrals=int(fields.text("breaks", like=_COUNT, expected="a number")) if fields.has("breaks") else 0,
        unknown_since=None if since is None else float(since),
        is_expedited=fields.has("is_expedited"),
    )


def encode_response(to: ResponseTo, response: DestinationResponse | None) -> list[tuple[str, bytes]]:
    """Return the headers of a response's record, whose key is the event's id and whose value is the body.

    None says that the destination has no response for a sender.
    """
    headers = [
        ("gw_v", b"%d" % FORMAT),
        ("gw_destination", to.destination.encode()),
        ("gw_content", to.content.hex().encode()),
        ("gw_status", b"%d" % (0 if response is None else response.status)),
    ]
    if response is not None:
        fields = (("content-type", response.content_type), ("content-encoding", response.content_encoding))
        headers += [(name, value) for name, value in fields if value is not None]
    return headers


def decode_response(record: Record) -> tuple[ResponseTo, DestinationResponse | None]:
    """Read a record of `gateway.responses`. Raises UndecodableRecordError or NewerRecordError."""
    headers = _Headers(record.headers)
    check_format("gw_v", headers.get("gw_v"), FORMAT)
    destination = headers["gw_destination"].decode("utf-8", "replace")
    content = headers.get("gw_content", b"")
    if not _CONTENT.fullmatch(content):
        raise UndecodableRecordError("gw_content", "a fingerprint", content)
    status = headers["gw_status"]
    if not _STATUS.fullmatch(status):
        raise UndecodableRecordError("gw_status", "0 or a status", status)
    response = None
    if status != b"0":
        response = DestinationResponse(
            status=int(status),
            content_type=headers.get("content-type"),
            content_encoding=headers.get("content-encoding"),
            body=record.value,
        )
    event = EventId(record.key.decode("utf-8", "replace"))
    return ResponseTo(event, bytes.fromhex(content.decode()), destination), response


def fingerprint(event: Event) -> bytes:
    """Return an 8-byte digest of an event's content: its type, query and body."""
    head = f"{len(event.type)} {event.type} {len(event.query)} {event.query} "
    digest = hashlib.blake2b(head.encode("utf-8", "surrogateescape"), digest_size=8)
    digest.update(event.body)
    return digest.digest()


def dedupe_entries_key(partition: Partition) -> bytes:
    """Return the key of all dedupe records about one partition of an event topic."""
    return f"{partition.topic}/{partition.number}".encode()


def encode_dedupe_entries(source: str, origin: int) -> list[tuple[str, bytes]]:
    """Return the headers of a dedupe record, whose value consists of rows of `DEDUPE_ENTRY`."""
    return [("gw_v", b"%d" % FORMAT), ("gw_source", source.encode()), ("gw_origin", b"%d" % origin)]


def decode_dedupe_entries(record: Record) -> DedupeEntries:
    """Read a record of `gateway.dedupe`. Raises UndecodableRecordError or NewerRecordError."""
    headers = _Headers(record.headers)
    check_format("gw_v", headers.get("gw_v"), FORMAT)
    origin = headers["gw_origin"]
    # An origin in the future would have all known identities forgotten until then.
    if not _ORIGIN.fullmatch(origin) or int(origin) > (record.appended_at + 86400) * 1e6:
        raise UndecodableRecordError("gw_origin", "a time in microseconds", origin)
    if len(record.value) % DEDUPE_ENTRY.size:
        raise UndecodableRecordError("value", f"rows of {DEDUPE_ENTRY.size} bytes", record.value)
    return DedupeEntries(_source(headers, "gw_source"), int(origin), record.value)


def _event(headers: _Headers, value: bytes) -> Event:
    if headers.get("gw_v") != b"1":
        check_format("gw_v", headers["gw_v"], FORMAT)
    key = headers.get("gw_key")
    return Event(
        id=_event_id(headers),
        source=_source(headers, "ce_source"),
        type=headers["ce_type"].decode("utf-8", "surrogateescape"),
        key=None if key is None else key.decode("utf-8", "surrogateescape"),
        received_at=_received_at(headers),
        headers=parse_pairs(headers["gw_headers"]),
        query=headers.get("gw_query", b"").decode("utf-8", "surrogateescape"),
        body=value,
        trace=_trace(headers) if "ce_traceparent" in headers else None,
    )


def _event_id(headers: _Headers) -> EventId:
    raw = headers["ce_id"]
    if not _ID.fullmatch(raw):
        raise UndecodableRecordError("ce_id", "an id", raw)
    return EventId(raw.decode("ascii"))


def _source(headers: _Headers, header: str) -> str:
    return _source_name(headers[header], header)


@lru_cache(maxsize=1024)
def _source_name(raw: bytes, header: str) -> str:
    if not _NAME.fullmatch(raw):
        raise UndecodableRecordError(header, "a source's name", raw)
    return raw.decode("ascii")


def _received_at(headers: _Headers) -> float:
    raw = headers["gw_at"]
    try:
        seconds = float(raw)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < LATEST:
        raise UndecodableRecordError("gw_at", "a time", raw)
    return seconds


def parse_pairs(raw: bytes) -> Headers:
    """Return header pairs, if they are valid in a request (RFC 9110, 5.1 and 5.5)."""
    if not raw:
        return ()
    pairs = tuple(_LINE.findall(raw))
    if not pairs[-1][0] or raw.endswith(b"\r\n"):
        raise UndecodableRecordError("gw_headers", "header pairs", raw)
    return pairs


def _trace(fields: Mapping[str, bytes]) -> TraceContext | None:
    """Return the trace context, or None if it is malformed: the event matters more."""
    if not _TRACEPARENT.fullmatch(fields["ce_traceparent"]):
        return None
    state = fields.get("ce_tracestate", b"")
    return TraceContext(fields["ce_traceparent"].decode("ascii"), state.decode("ascii") if state.isascii() else "")


_TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


_RECORD, _PAIR = 1024, 128
"""Approximate bytes of CPython's objects: of a record with its event, and of one of the sender's headers."""


def _name(state: JsonFields, name: str) -> str:
    """Return a route's or a destination's name; empty if the source was unknown."""
    return state.text(name, like=_NAME_OR_NONE, expected="a name")


def _part(state: JsonFields) -> Part:
    part = state.inside("part")
    return Part(part.integer("n"), part.text("digest"), part.integer("repeat"))


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


def _attempt(state: JsonFields) -> Attempt:
    result = state.text("result")
    if result not in _RESULTS:
        raise state.error("result", "a result")
    return Attempt(
        number=state.integer("n", minimum=1),
        at=state.number("at"),
        seconds=state.number("s"),
        result=Result(result),
        status=state.integer("status", maximum=999) if state.has("status") else None,
        detail=state.text("detail"),
    )


_ID = re.compile(ID.pattern.encode())
_NAME = re.compile(NAME_PATTERN.pattern.encode())
_NAME_OR_NONE = re.compile(f"(?:{NAME_PATTERN.pattern})?")
_STATUS = re.compile(rb"0|[1-9][0-9]{2}")
_CONTENT = re.compile(rb"(?:[0-9a-f]{16})?")
_ORIGIN = re.compile(rb"[0-9]{1,17}")
_PLACE = re.compile(rb"([a-zA-Z0-9._-]{1,249})/([0-9]{1,9}) ([0-9]{1,14}) ([0-9]{1,10}\.[0-9]{6})(?: ([0-9a-f]{8}))?")
_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]++): ([^\r\n\0]*+)(?:\r\n|\Z)|(?s:.+)")
"""A header pair with its line end; or, where the text is malformed, all the rest, without a name."""
_RESULTS = frozenset(Result)
_METADATA_TEXTS = ("spill_reason", "paused_name", "replay", "dead_reason", "detail", "rules", "owner", "runbook")
_TIME, _COUNT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,6})?"), re.compile(r"[0-9]{1,9}")
