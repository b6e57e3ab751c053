"""The domain model: events, deliveries, attempts, outcomes, and the exception hierarchy.

Imports none of our modules. Values that modules exchange are immutable; plain floats are seconds, and times are Unix
times.
"""

import hashlib
import os
import re
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, NewType, TypeVar

from typing_extensions import dataclass_transform

EventId = NewType("EventId", str)
DeliveryId = NewType("DeliveryId", str)
Occurrence = tuple[DeliveryId, float, int]
"""A delivery's id, when its event was received, and the hash of its body: events of one identity have the same ids."""
UniqueKey = tuple[Occurrence, float]
"""An occurrence, and when it was replayed, else 0: so it also tells replays apart."""

DISTRIBUTION = "durable-webhook-gateway"
"""The distribution's name for PyPI, where `webhook-gateway` is taken."""
STORED_STATUSES = (200, 201, 202, 204)
"""The statuses by which a sender may learn that its event is stored."""
SUCCESSOR_HEADROOM = 64 * 1024
"""Bytes by which an event is smaller than the log's records may be: a successor (a retry or dead-letter record) carries
more headers, and has to fit as well."""
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
"""The names that sources, routes and destinations may have, in rules and in records; `value_kinds.py` describes it."""
BODY_EXCERPT, HEADERS_EXCERPT = 2048, 4096
"""Bytes of the body, and of the headers, of a response that are kept with an attempt that was no success."""
SHOWN = 60
"""Maximum characters of an external value in a message."""

# Header pairs as received: in order, with repeats, undecoded.
Headers = tuple[tuple[bytes, bytes], ...]


T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def immutable(cls: type[T]) -> type[T]:
    """Make a dataclass that is frozen for mypy alone, for values that are created for each event.

    `frozen=True` sets each field by `object.__setattr__`, so that creating an Event takes three times as long.
    """
    return dataclass(slots=True, kw_only=True, unsafe_hash=True)(cls)


class TraceContext(NamedTuple):
    """A position in a trace: valid values of the two headers of W3C Trace Context."""

    traceparent: str
    tracestate: str = ""

    @property
    def recorded_id(self) -> str | None:
        """The trace's id, if the trace is sampled; otherwise it couldn't be looked up."""
        return self.traceparent[3:35] if int(self.traceparent[53:55], 16) & 1 else None


@immutable
class Event:
    """A verified webhook. There is no unverified Event.

    `key` is its source's ordering key, if that has one; its record's key is that, or else its id.
    `body` is what the sender's signature covered, byte for byte. `headers` lack those that carry a credential.
    `query` is the raw query string without the question mark. `trace` is the parent of later spans, if the gateway
    traces.
    """

    id: EventId
    source: str
    type: str
    key: str | None = None
    received_at: float
    headers: Headers
    query: str = ""
    body: bytes
    trace: TraceContext | None = None


class Result(StrEnum):
    """The result of an attempt: a closed set, and a metric's label."""

    SUCCESS = "2xx"
    REDIRECT = "3xx"
    CLIENT_ERROR = "4xx"
    UNAUTHORIZED = "unauthorized"
    """401 or 403: most often the destination no longer accepts our credential."""
    THROTTLED = "429"
    SERVER_ERROR = "5xx"
    TIMEOUT = "timeout"
    CONNECT = "connect"
    DNS = "dns"
    TLS = "tls"
    TRANSPORT = "transport"
    AUTH = "auth"
    """Not sent: the destination's token endpoint gave no token."""
    EGRESS_REFUSED = "egress_refused"


@immutable
class Attempt:
    """One HTTP request of a delivery. It began `at`, and took `seconds`.

    `retry_after` is the delay in seconds, from its end, that a 429 or a 503 asked for (RFC 9110 §10.2.3, RFC 6585 §4);
    None for every other response, whatever its headers say.
    """

    number: int
    at: float
    seconds: float
    result: Result
    status: int | None = None
    detail: str = ""
    retry_after: float | None = None


class AttemptPhases(NamedTuple):
    """How many seconds parts of an attempt took; None for what didn't happen, or didn't end.

    `first_byte` is from the request to the first byte of the response. On a connection that was used before, the
    others are None. If an attempt makes several requests (a stale connection, a new token), they are the last one's.
    """

    dns: float | None = None
    connect: float | None = None
    tls: float | None = None
    first_byte: float | None = None


NO_PHASES = AttemptPhases()


@immutable
class ResponseExcerpt:
    """The beginning of a response that is no success, as it may be kept: without any credential that we have sent.

    At most `HEADERS_EXCERPT` bytes of header pairs, whose values have neither CR, LF nor NUL, and `BODY_EXCERPT` of the
    body.
    """

    headers: Headers = ()
    are_headers_cut: bool = False
    body: bytes = field(default=b"", repr=False)
    is_body_cut: bool = False


class DeadReason(StrEnum):
    """Why a delivery ended as a dead letter: a closed set, and a metric's label."""

    EXHAUSTED = "exhausted"
    EXPIRED = "expired"
    PERMANENT = "permanent"
    GONE = "gone"
    EXPRESSION_ERROR = "expression_error"
    UNKNOWN_DESTINATION = "unknown_destination"
    ROUTE_REMOVED = "route_removed"
    UNDECODABLE = "undecodable"
    TOO_LARGE = "too_large"
    BUG = "bug"


class SpillReason(StrEnum):
    """Why a delivery went to a retry topic, or was parked, without an attempt: a closed set, and a metric label."""

    BREAKER_OPEN = "breaker_open"
    THROTTLED = "throttled"
    """Its destination is held by a `Retry-After`, of a 429 or a 503."""
    LANE_FULL = "lane_full"
    OVERDUE = "overdue"
    """It would wait in its lane for too long, at the pace of its destination."""
    WINDOW_FULL = "window_full"
    PAUSED = "paused"
    UNKNOWN_NAME = "unknown_name"
    DELAYED = "delayed"


class Part(NamedTuple):
    """An item of an event that a route splits: where it is in the list, from 0, and a digest of it.

    `repeat` counts the equal items before it.
    """

    number: int
    digest: str
    repeat: int = 0


@immutable
class Delivery:
    """An event on its way to one destination by one route.

    `attempts` are those made so far, oldest first. `successor` numbers the records that carry this delivery: 0 is the
    event's own, and each spill, hop or dead letter is the next. `due` is when the next attempt may start.
    `replayed_at` is when it was replayed, or a kick reset its attempts, and 0 otherwise; `delayed_until` is the end of
    its route's `delay` or `debounce`, else 0. Its age counts from the later of the two, else from the event's receipt.
    """

    id: DeliveryId
    event: Event
    route: str
    destination: str
    attempts: tuple[Attempt, ...] = ()
    successor: int = 0
    due: float = 0.0
    replayed_at: float = 0.0
    delayed_until: float = 0.0
    part: Part | None = None
    """Of a route that splits its events: which item it is for; None if it is for the whole event."""
    burst: str | None = None
    """Its key, if its route is debounced; "" if the event has none, so that nothing supersedes it."""

    @property
    def occurrence(self) -> Occurrence:
        """Distinguishes it from deliveries of other events with the same identity, which have the same id."""
        return self.id, self.event.received_at, hash(self.event.body)

    @property
    def unique_key(self) -> UniqueKey:
        """Also distinguishes it from a replay of the same event, which may be pending at the same time."""
        return self.occurrence, self.replayed_at

    @property
    def next_number(self) -> int:
        """The number of its next attempt, starting at 1."""
        return self.attempts[-1].number + 1 if self.attempts else 1

    @property
    def age_began_at(self) -> float:
        """When it was replayed, or its route's delay was over or ended by a kick; else when its event was received."""
        return max(self.replayed_at, self.delayed_until) or self.event.received_at

    @property
    def is_delayed(self) -> bool:
        """Whether it waits for nothing but the end of its route's `delay` or `debounce`."""
        return self.delayed_until > 0 and self.due == self.delayed_until and not self.attempts

    @property
    def kick_target(self) -> tuple[str, str]:
        """The route and the destination whose kick expedites its record.

        The destination is "" while its route delays it: only a kick of the route ends that. This is of the delivery as
        its record has it, not as it is in memory since.
        """
        return self.route, "" if self.is_delayed else self.destination


@immutable
class RecordMetadata:
    """Why a delivery's record is in its topic; copied from record to record."""

    spill_reason: str = ""
    """A SpillReason: why it is in a retry topic, or parked, without an attempt."""
    paused_name: str = ""
    """If it is parked: the paused name, as "route/…" or "destination/…"."""
    breaker_deferrals: int = 0
    """How many times in a row it was postponed because its destination's breaker was open."""
    unknown_since: float | None = None
    """Since when (Unix time) the rules haven't had its source, route or destination."""
    is_expedited: bool = False
    """Whether a kick has expedited it, so that it doesn't wait for the delay of the shortest tier."""
    replay: str = ""
    """The replay that injected it."""
    dead_reason: str = ""
    """Why it is a dead letter, or will become one (a DeadReason; a newer version may have others)."""
    detail: str = ""
    rules: str = ""
    """The version of the rules by which it became a dead letter."""
    owner: str = ""
    """The owner of its route, or else of its destination, at that time."""
    runbook: str = ""


NO_METADATA = RecordMetadata()


@immutable
class Delivered:
    """The destination responded with a 2xx."""


@immutable
class DeadLettered:
    """The delivery ended without success and is kept in the dead-letter topic."""

    reason: DeadReason
    detail: str = ""


@immutable
class Dropped:
    """The delivery ends without a dead letter: the policy says so of a result, or its route no longer matches it."""

    detail: str = ""


@immutable
class Superseded:
    """A newer event of the same key is delivered instead, by a route that is debounced."""

    by: EventId


Outcome = Delivered | DeadLettered | Dropped | Superseded


def result_label(attempt: Attempt) -> str:
    """Return an attempt's HTTP status, or the kind of its failure."""
    return attempt.result.value if attempt.status is None else str(attempt.status)


class Disposition(StrEnum):
    """How a route handles a result that isn't a success."""

    RETRY = "retry"
    RETRY_SHORT = "retry_short"
    DEAD_LETTER = "dead_letter"
    DROP = "drop"


EVENT_ID = re.compile("evt_[0-9a-f]{32}")


def event_id(source: str, identity: str | None) -> EventId:
    """Make an event's id: the same for the same identity in every process; without one, ordered by time.

    It is `evt_` and a UUID (RFC 9562) without hyphens: of version 8, a digest of the identity, or of version 7, ordered
    by time. The digit of the version tells which.
    """
    if identity:
        digest = hashlib.blake2b(f"{source}\0{identity}".encode("utf-8", "surrogateescape"), digest_size=16)
        uuid8 = bytearray(digest.digest())
        uuid8[6] = 0x80 | uuid8[6] & 0x0F
        uuid8[8] = 0x80 | uuid8[8] & 0x3F
        return EventId("evt_" + uuid8.hex())
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    uuid7 = (milliseconds << 80) | (0x7 << 76) | ((random >> 68) << 64) | (0b10 << 62) | (random & (1 << 62) - 1)
    return EventId(f"evt_{uuid7:032x}")


def identity_of(event: EventId) -> bytes | None:
    """Return the digest (16 bytes) from which an event's id was made; None if its sender gave it no identity."""
    if event[16:17] != "8" or not event.startswith("evt_"):
        return None
    try:
        digest = bytes.fromhex(event[4:])
    except ValueError:
        return None
    return digest if len(digest) == 16 else None  # noqa: PLR2004 - as many as `event_id` asks for


def delivery_id(event: EventId, route: str, destination: str, position: str = "") -> DeliveryId:
    """Make a delivery's id from its event's: the same after every crash, retry and replay.

    With a `position`, that of the event's record, deliveries of events that share an identity have different ids.
    """
    parts = (event, route, destination, *([position] if position else []))
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=16)
    return DeliveryId("dlv_" + digest.hexdigest())


def part_id(whole: DeliveryId, part: Part) -> DeliveryId:
    """Make the id of a delivery for one item of an event from that for the whole event, whatever the item's index."""
    digest = hashlib.blake2b(f"{whole}\0{part.digest}\0{part.repeat}".encode(), digest_size=16)
    return DeliveryId("dlv_" + digest.hexdigest())


def shown(value: object) -> str:
    """Describe an external value briefly, however large it is."""
    match value:
        case None:
            return "none"
        case bool() | int() | float():
            text = repr(value)
        case str() | bytes():
            text = repr(value[: SHOWN + 1])
        case _:
            return "a list" if isinstance(value, list) else "an object"
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


class GatewayError(Exception):
    """Base of all our errors; each subclass names who is at fault."""


class RulesError(GatewayError):
    """The rule file is at fault. `str()` has one problem per line."""


class UsageError(GatewayError):
    """The command line, the environment or the broker's configuration is at fault."""


class AddressUnavailableError(GatewayError):
    """The machine is at fault: an address to listen on is in use or doesn't exist; it may be free a moment later."""


class RefusedError(GatewayError):
    """The request is at fault. `reason` is from a closed set (a metric's label); `detail` is sent to the sender.

    `retry_after` is in seconds; None if it isn't known, or if waiting wouldn't help.
    """

    def __init__(self, status: int, reason: str, detail: str, *, retry_after: int | None = None) -> None:
        super().__init__(f"{status} {reason}: {detail}")
        self.status = status
        self.reason = reason
        self.detail = detail
        self.retry_after = retry_after


class UnreadableBodyError(RefusedError):
    """What a body contains can't be read. Its request is refused only if the ingress itself has to read it.

    `detail` contains no part of the body.
    """


class UnfetchedError(GatewayError):
    """A document couldn't be fetched: DNS, the network or the server is at fault.

    `is_gone`: the server has responded that it has none there.
    """

    def __init__(self, detail: str, *, is_gone: bool = False) -> None:
        super().__init__(detail)
        self.is_gone = is_gone


@immutable
class DestinationResponse:
    """What a destination has responded, for a sender that waits for it."""

    status: int
    content_type: bytes | None = None
    content_encoding: bytes | None = None
    body: bytes = field(default=b"", repr=False)


class LogUnavailableError(GatewayError):
    """The log can't store or return records at the moment; nothing was acknowledged."""


class ForbiddenError(LogUnavailableError):
    """The log forbids it: a permission is missing, or a name or a setting is invalid, until somebody changes that.

    It ends a command, or a process that is starting; one that runs waits, as for a log that is unavailable.
    """


class LogNearlyFullError(LogUnavailableError):
    """The log refuses records for which it has no space, but stores smaller ones."""


class LogLostError(LogUnavailableError):
    """The log was moved or replaced while it was open, or is damaged: what is stored now would never be read."""


class RecordTooLargeError(GatewayError):
    """The record is larger than the log allows; retrying doesn't help."""


class UnreadableRecordError(GatewayError):
    """A record in the log can't be read by this version; each subclass says whether another version can."""


class UndecodableRecordError(UnreadableRecordError):
    """No version of the gateway wrote this record: the field `where` has `got` instead of what was `expected`."""

    def __init__(self, where: str, expected: str, got: object) -> None:
        super().__init__(f"{where}: expected {expected}, got {shown(got)}")


class NewerRecordError(UnreadableRecordError):
    """A newer version of the gateway wrote this record: it must be left to that version."""

    def __init__(self, where: str, version: int, known: int) -> None:
        super().__init__(f"{where}: expected format {known} or older, got {version}, of a newer version of the gateway")


class ExpressionError(GatewayError):
    """An expression failed; the rules or the event are at fault. For a missing field there is a subclass."""


class ItemMissingError(ExpressionError):
    """An event no longer has the item that a delivery is for, by these rules; perhaps by others that are rolled out."""


class MissingFieldError(ExpressionError):
    """An expression asked for a field that the event doesn't have."""
