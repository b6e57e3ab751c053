"""How events and deliveries are written into records: CloudEvents 1.0, Kafka binding, binary mode.

The value is the body, byte for byte. `ce_*` and `content-type` are CloudEvents'; `gw_*` are ours beside them:

    gw_v         format version, "1"
    gw_at        when the event was received, Unix seconds
    gw_headers   the header pairs as they came: `name: value`, joined by CRLF
    gw_query     the raw query string
    gw_key       the order key, where the source has one
    gw_delivery  JSON, on retry, parked and dead records: which delivery, its attempts, when it is due, why it is here

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson

from gateway.log.base import Record
from gateway.model import Attempt, Delivery, DeliveryId, Event, EventId, Headers, Result, UndecodableRecordError

FORMAT = b"1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filed:
    """A delivery as found in a retry, parked or dead record.

    `note` says why it is there, in names and texts. `at` is when it was written, by the writer's idea of the time.
    """

    delivery: Delivery
    note: Mapping[str, str]
    at: float


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
        )
    except KeyError as error:
        raise UndecodableRecordError(f"{error.args[0]}: expected this record header, got none") from error
    except (TypeError, ValueError, AttributeError) as error:  # another client may have written a header without a value
        raise UndecodableRecordError(f"record headers: expected those of an event, got {error}") from error


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
