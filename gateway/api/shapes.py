"""What the API answers about events, deliveries and names: shapes, of which the OpenAPI document is made.

Fields are never left out: what isn't known, or isn't for the eyes of who asks, is null.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.access.principal import AccessRole
from gateway.api.json_shapes import Time
from gateway.api.traffic_shapes import Traffic
from gateway.index.statuses import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Me:
    """Who asks: the name that acts are recorded under, the role, and what that is limited to (null: to nothing)."""

    name: str
    role: AccessRole
    owners: tuple[str, ...] | None
    sources: tuple[str, ...] | None
    via: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Currency:
    """How current the index is that an answer comes from.

    All events that were stored before `complete_to` are in it, except from a partition whose leader has a clock that is
    behind and hasn't shown it yet; statuses are at least those of `statuses_as_of`. Null: not known yet.
    `unread_records` of the log aren't in it yet; `problem` is what holds it up at the moment.
    """

    complete_to: Time | None
    statuses_as_of: Time | None
    unread_records: int
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexState:
    """The index of the process that answers: how much it has, null for who has limits, and how current it is."""

    events: int | None
    bytes: int | None
    oldest_event: Time | None
    currency: Currency


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryStatus:
    """How far an event's deliveries by one route to one destination are: `count` of them have this status."""

    route: str
    destination: str
    status: Status
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSummary:
    """An event. `size` is that of its body, in bytes; `status` is the worst of its deliveries.

    `position` is where its record is in the log (TOPIC/PARTITION@OFFSET), null if only a delivery tells of it. Of many
    deliveries, the worst are told, and `deliveries_left_out` is how many more there are.
    """

    id: str
    source: str
    type: str
    key: str | None
    size: int
    received_at: Time
    stored_at: Time
    position: str | None
    status: Status
    deliveries: tuple[DeliveryStatus, ...]
    deliveries_left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EventPage:
    """Events, newest first. `next_cursor` is null if there are no more.

    All that were stored since `searched_to` were looked at; null: all. `is_cut_short`: looking took too long, and the
    next page goes on from there, so that a page may even be empty.
    """

    items: tuple[EventSummary, ...]
    next_cursor: str | None
    searched_to: Time | None
    is_cut_short: bool
    index: Currency


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header of the sender. `value` is null for a viewer; bytes that aren't UTF-8 are escaped."""

    name: str
    value: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventDetail:
    """An event with its headers, as far as the log has its record.

    `is_stored`: its record, and so its body, is still there. `headers` (without those that carry a credential) are null
    without it; `query` is null for a viewer, too.
    """

    event: EventSummary
    is_stored: bool
    headers: tuple[Header, ...] | None
    query: str | None
    index: Currency


@dataclass(frozen=True, slots=True, kw_only=True)
class RawHeader:
    """A header as it came: its name's and value's bytes, in base64."""

    name_base64: str
    value_base64: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RawEvent:
    """An event as it is stored, byte for byte: the headers in their order, and the body, in base64.

    `size` is that of the body as it came, in bytes: what its source hides isn't in the one that is here.
    If some of it is hidden, the body is written anew as JSON, and the headers are those of that body, without a coding.
    """

    id: str
    position: str
    source: str
    type: str
    key: str | None
    received_at: Time
    size: int
    query: str
    headers: tuple[RawHeader, ...]
    body_base64: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt of a delivery: when it began, how long it took, and its result: a status, or a kind of failure.

    `decision` is what followed, null if that isn't recorded. `position` is where its own record is, which has the
    response: null if it wasn't recorded.
    """

    number: int
    at: Time
    seconds: float
    result: str
    status: int | None
    decision: str | None
    detail: str | None
    position: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A delivery of an event: `item` is which of the event's items it is for, null if it is for all of it.

    `reason` is why it waits, is paused (by which name) or is a dead letter. `due` is when its next attempt may start.
    `replayed_at` is when its attempts and its age began again: by a replay, as one event that was delivered again, or
    by a kick of its halted key. Of its attempts there are the last hundred. `response` is the beginning of what was
    responded to the last one: null if that isn't recorded, or wasn't asked for (`include_responses`, for the role
    reader).
    """

    id: str
    route: str
    destination: str
    item: int | None
    status: Status
    replayed_at: Time | None
    due: Time | None
    reason: str | None
    detail: str | None
    attempts: tuple[Attempt, ...]
    response: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryPage:
    """Deliveries of an event, by route, destination and item."""

    items: tuple[Delivery, ...]
    next_cursor: str | None
    index: Currency


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """An attempt's own record: how the request was made, and the beginning of a response that was no success.

    Credentials that were sent are masked in it. `response_headers` and `response_body` are null without such a
    response.
    """

    event_id: str
    delivery_id: str
    source: str
    route: str
    destination: str
    number: int
    at: Time
    seconds: float
    result: str
    status: int | None
    decision: str | None
    detail: str | None
    retry_after_seconds: float | None
    method: str
    host: str
    rules: str | None
    response_headers: tuple[Header, ...] | None
    response_body: str | None
    is_response_cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """A pause that is in force, or (`resuming`) just being lifted: since when, and by whom, null if unknown."""

    state: str
    since: Time
    by: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Why this process sends nothing to a destination for now, and until when, null if that is up to a probe."""

    why: str
    since: Time
    until: Time | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSecret:
    """One of a source's secrets, or public keys: until when it verifies, null if for ever.

    `is_last`: none of its list verifies for longer, so that all requests are refused once it has expired.
    """

    name: str
    until: Time | None
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A sender of the active rules. `path` is where it posts, without secrets.

    `routes` is how many are from it, null for who has limits. `url` is that path at the address where senders reach
    the ingress, null if that isn't known (`--public-url`). `scheme` is how it is verified. `topic` is that of its
    events. `dedupe_seconds` is for how long an identity is remembered, null if duplicates are delivered. `secrets`
    are its secrets and public keys, as the rules list them. `traffic` is that of the last day, null if it isn't
    asked for.
    """

    name: str
    owner: str | None
    runbook: str | None
    path: str
    url: str | None
    scheme: str
    topic: str
    dedupe_seconds: float | None
    is_quarantined: bool
    routes: int | None
    traffic: Traffic | None
    secrets: tuple[SourceSecret, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePage:
    """Sources, by name."""

    items: tuple[Source, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A destination of the active rules. `host` is that of its URL, null if that is a secret, or isn't known here.

    `rate` is requests a second, over all processes. `routes` is how many deliver to it, null for who has limits.
    `pause` is its own: a paused route doesn't show here. `hold` is null if this process has none, or doesn't deliver.
    `traffic` is that of the last day, null if it isn't asked for.
    """

    name: str
    owner: str | None
    runbook: str | None
    host: str | None
    timeout_seconds: float
    concurrency: int
    rate: float | None
    routes: int | None
    pause: Pause | None
    hold: Hold | None
    traffic: Traffic | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationPage:
    """Destinations, by name."""

    items: tuple[Destination, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How a route retries: the waits between attempts (the last one repeats), and what bounds them."""

    schedule_seconds: tuple[float, ...]
    max_attempts: int
    max_age_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A route of the active rules. `condition` has its `match`, `when` and choice of destinations.

    `condition` is null if a secret is in it. `pause` is the route's own: a paused destination doesn't show here.
    `traffic` is that of the last day, null if it isn't asked for.
    """

    name: str
    owner: str | None
    runbook: str | None
    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    condition: dict[str, Any] | None
    order: str | None
    on_exhausted: str
    stop: bool
    catch_all: bool
    is_split: bool
    delay_seconds: float
    debounce_seconds: float | None
    retry: Retry
    pause: Pause | None
    traffic: Traffic | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePage:
    """Routes, by name."""

    items: tuple[Route, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Rules that are in the files, but not in force: since when, and why, a line for each problem."""

    since: Time
    file: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesInForce:
    """The rules that the process that answers goes by. Others may have read other files, or not yet these.

    `version` is a digest of the files. `changed` is what the last reload has changed. `refusal` is null if the files'
    rules are in force. For who has limits all is of what they see; of other changes, and of problems, there is a
    number.
    """

    version: str
    file: str
    loaded_at: Time
    sources: int
    destinations: int
    routes: int
    changed: tuple[str, ...]
    refusal: Refusal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A dead letter: a delivery that ended without success; open until a command replays or drops it.

    `position` is PARTITION@OFFSET, which names even one that can't be read: of that, the other fields are null. `topic`
    is the one that it is in, `resolved_at` when a command has replayed or dropped it.
    """

    position: str
    topic: str
    at: Time
    status: str
    reason: str
    detail: str | None
    delivery_id: str | None
    event_id: str | None
    source: str | None
    type: str | None
    route: str | None
    destination: str | None
    item: int | None
    attempts: int
    last_result: str | None
    owner: str | None
    resolved_at: Time | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterPage:
    """Dead letters, newest first. `is_cut_short`: looking took too long, and the next page goes on from there.

    `unread_partitions` are those of the topic that can't be read now.
    """

    items: tuple[DeadLetter, ...]
    next_cursor: str | None
    is_cut_short: bool
    unread_partitions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterDetail:
    """A dead letter with its attempts, of which it has the last ones, and what its record says of it (`metadata`).

    `event` is the event as the dead letter has it, which may be in the log no more: null for who may not read it, and
    of a dead letter that can't be read.
    """

    letter: DeadLetter
    attempts: tuple[Attempt, ...]
    metadata: Mapping[str, str]
    event: RawEvent | None
