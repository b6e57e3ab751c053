"""The words of the gateway: events, deliveries, attempts, outcomes, retry policies, and the error tree.

Imports nothing of ours. What crosses a module is frozen; plain floats are seconds, and times are Unix times.
"""

import hashlib
import os
import re
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NewType

EventId = NewType("EventId", str)
DeliveryId = NewType("DeliveryId", str)
Occurrence = tuple[DeliveryId, float, int]
"""A delivery's id, and its event's receipt and the hash of its body."""
Life = tuple[Occurrence, float]
"""Of which occurrence it is, and when its age began, if it was replayed."""

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
"""What sources, routes and destinations may be called."""
SHOWN = 60
"""Characters that a message shows of a value from outside."""

# Header pairs as they came: in order, with repeats, undecoded.
Headers = tuple[tuple[bytes, bytes], ...]


class TraceContext(NamedTuple):
    """Where in a trace something happens, as W3C Trace Context has it: valid values of its two headers."""

    traceparent: str
    tracestate: str = ""

    @property
    def recorded_id(self) -> str | None:
        """The trace's id, if the trace is recorded: else nobody could look it up."""
        return self.traceparent[3:35] if int(self.traceparent[53:55], 16) & 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A verified webhook. There is no unverified Event.

    `body` is what the sender's signature covered, byte for byte. `headers` lack those that carry a credential.
    `query` is the raw query string without the question mark. `trace` is the span that what follows belongs to, where
    the gateway traces.
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
    """What came of one attempt: a closed set, and a metric's label."""

    SUCCESS = "2xx"
    REDIRECT = "3xx"
    CLIENT_ERROR = "4xx"
    UNAUTHORIZED = "unauthorized"
    """401 or 403: most often the destination no longer takes our credential."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One HTTP try of a delivery. `seconds` is how long it took.

    `retry_after` is for how many seconds a 429 or a 503 has asked for silence (RFC 9110 §10.2.3, RFC 6585 §4); None
    for every other answer, whatever its headers say.
    """

    number: int
    at: float
    seconds: float
    result: Result
    status: int | None = None
    detail: str = ""
    retry_after: float | None = None


class DeadReason(StrEnum):
    """Why a delivery ended without success: a closed set, and a metric's label."""

    EXHAUSTED = "exhausted"
    EXPIRED = "expired"
    PERMANENT = "permanent"
    GONE = "gone"
    EXPRESSION_ERROR = "expression_error"
    ROUTE_REMOVED = "route_removed"
    UNDECODABLE = "undecodable"
    TOO_LARGE = "too_large"
    BUG = "bug"


class SpillReason(StrEnum):
    """Why a delivery went to the retry store without an attempt: a closed set, and a metric's label."""

    BREAKER_OPEN = "breaker_open"
    THROTTLED = "throttled"
    LANE_FULL = "lane_full"
    OVERDUE = "overdue"
    WINDOW_FULL = "window_full"
    PAUSED = "paused"
    UNKNOWN_NAME = "unknown_name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An event on its way to one destination by one route.

    `attempts` are those made so far, oldest first. `successor` numbers the records that carry this delivery: 0 is the
    event's own, and each spill, hop or dead letter is the next. `due` is when the next attempt may start. `since` is
    when its age began: 0 for when the event was received, else when it was replayed.
    """

    id: DeliveryId
    event: Event
    route: str
    destination: str
    attempts: tuple[Attempt, ...] = ()
    successor: int = 0
    due: float = 0.0
    since: float = 0.0

    @property
    def occurrence(self) -> Occurrence:
        """What tells it from a delivery of another event with the same identity: that has the same id."""
        return self.id, self.event.received_at, hash(self.event.body)

    @property
    def life(self) -> Life:
        """What tells it also from a replay of the same event, which may wait at the same time."""
        return self.occurrence, self.since

    @property
    def next_number(self) -> int:
        """The number of its next attempt, from 1 on."""
        return self.attempts[-1].number + 1 if self.attempts else 1

    @property
    def age_began_at(self) -> float:
        """When its age began: when its event was received, or when it was replayed."""
        return self.since or self.event.received_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Why the record of a delivery is where it is: it goes with the delivery from record to record."""

    why: str = ""
    """A SpillReason: why it is in the retry store, or parked, without an attempt."""
    by: str = ""
    """What is paused, as "route/…" or "destination/…", of one that is parked."""
    breaks: int = 0
    """How many times it was put off in a row since its destination's breaker was open."""
    unknown_since: float | None = None
    """Since when (Unix time) no rules have its source, route or destination."""
    is_expedited: bool = False
    """Whether a kick has brought it on, so that it doesn't wait for the delay of the shortest tier."""
    replay: str = ""
    """The replay that it is of."""
    reason: str = ""
    """Why it is a dead letter (a DeadReason), or becomes one in its turn; a newer version may have others."""
    detail: str = ""


NO_NOTE = Note()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """The destination answered 2xx."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLettered:
    """The delivery ended without success and is kept in the dead-letter topic."""

    reason: DeadReason
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """The route's policy says that such a result ends the delivery without a dead letter."""

    detail: str = ""


Outcome = Delivered | DeadLettered | Dropped


def result_label(attempt: Attempt) -> str:
    """Return the status that an attempt got, or the kind of its failure."""
    return attempt.result.value if attempt.status is None else str(attempt.status)


class Disposition(StrEnum):
    """What a route does about a result that isn't a success."""

    RETRY = "retry"
    RETRY_SHORT = "retry_short"
    DEAD_LETTER = "dead_letter"
    DROP = "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How a route retries. `engine/delivery/retry_decision.py` decides by it."""

    schedule: tuple[float, ...] = (5, 30, 120, 600, 3600, 10800, 21600, 43200, 86400)
    """Seconds from the end of one attempt to the next; the last step repeats."""
    max_attempts: int = 20
    """Attempts in all, the first one included. At least 1."""
    max_age: float = 3 * 86400.0
    """Seconds after the event was received during which an attempt may still be scheduled."""
    jitter: float = 0.2
    """The share by which a delay varies: 0.2 is plus or minus 20 %."""
    results: tuple[tuple[str, Disposition], ...] = ()
    """Overrides, by status (`404`), class (`5xx`) or kind of failure (`timeout`); a status precedes its class."""


def event_id(source: str, identity: str | None) -> EventId:
    """Make an event's id: the same for the same identity in every process, time-ordered without one.

    It is `evt_` and a UUID of RFC 9562 without hyphens: version 8, a digest, or version 7. So an id tells which it is.
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
    """Return the digest (16 bytes) that an event's id was made from; None where its sender gave it no identity."""
    if event[16:17] != "8" or not event.startswith("evt_"):
        return None
    try:
        digest = bytes.fromhex(event[4:])
    except ValueError:
        return None
    return digest if len(digest) == 16 else None  # noqa: PLR2004 - as many as `event_id` asks for


def delivery_id(event: EventId, route: str, destination: str, place: str = "") -> DeliveryId:
    """Make a delivery's id from its event's: the same after every crash, retry and replay.

    With a `place`, where the event's record is, the ids of events that share an identity differ.
    """
    told = (event, route, destination, *([place] if place else []))
    digest = hashlib.blake2b("\0".join(told).encode(), digest_size=16)
    return DeliveryId("dlv_" + digest.hexdigest())


def shown(value: object) -> str:
    """Tell in a few words what a value from outside is, however large."""
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
    """Something that the gateway can't go on from; each subclass says who is at fault."""


class RulesError(GatewayError):
    """The rule file is at fault. `str()` has one problem a line."""


class UsageError(GatewayError):
    """The command line, the environment or the broker's configuration is at fault."""


class AddressUnavailableError(GatewayError):
    """The machine is at fault: an address to listen at is taken, or not there; a moment later it may be free."""


class RefusedError(GatewayError):
    """The request is at fault. `reason` is from a closed set (a metric's label); `detail` is told to the sender."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(f"{status} {reason}: {detail}")
        self.status = status
        self.reason = reason
        self.detail = detail


class LogUnavailableError(GatewayError):
    """The log can't take or give records at the moment; nothing was acknowledged."""


class LogNearlyFullError(LogUnavailableError):
    """The log refuses records for which it has no room; smaller ones it stores."""


class LogLostError(LogUnavailableError):
    """The log was taken away under its owner, or is damaged: what it would store now, nobody would read again."""


class RecordTooLargeError(GatewayError):
    """The record is larger than the log takes; trying again doesn't help."""


class UnreadableRecordError(GatewayError):
    """A record in the log isn't one that this version can read; each subclass says whether another one can."""


class UndecodableRecordError(UnreadableRecordError):
    """No version of the gateway wrote this. `where` in the record something else was `expected` than what it `got`."""

    def __init__(self, where: str, expected: str, got: object) -> None:
        super().__init__(f"{where}: expected {expected}, got {shown(got)}")


class NewerRecordError(UnreadableRecordError):
    """A newer version of the gateway wrote this: it is to be left for that one."""

    def __init__(self, where: str, version: int, known: int) -> None:
        super().__init__(f"{where}: expected format {known} or older, got {version}, of a newer version of the gateway")


class ExpressionError(GatewayError):
    """An expression failed for another reason than a missing field; the rules or the event are at fault."""


class MissingFieldError(ExpressionError):
    """An expression asked for a field that the event doesn't have."""
