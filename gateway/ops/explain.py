"""`gateway explain`: what the gateway would do with an event, computed by the code that does it."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from urllib.parse import quote, urlunsplit

import orjson

from gateway.bodies.media_types import Kind, kind_of
from gateway.bodies.redaction import HIDDEN
from gateway.client.request import Outbound, compose
from gateway.engine.deliveries_of_event import Planned as PlannedDelivery
from gateway.engine.deliveries_of_event import plan_as_attempted
from gateway.model import (
    DeadReason,
    Event,
    ExpressionError,
    Headers,
    RefusedError,
    UsageError,
    event_id,
    identity_of,
    shown,
)
from gateway.ops.output import count
from gateway.ops.redaction import Redactions
from gateway.rules.absent_fields import AbsentFieldError
from gateway.rules.addresses import url_parts
from gateway.rules.conditions import Seen
from gateway.rules.destination_choice import UndeclaredDestinationError
from gateway.rules.event_builder import EventBuilder
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.route_table import Explanation, of_other_sources
from gateway.rules.rules import NOBODY, Contact, Destination, Route, Rules
from gateway.rules.value_kinds import shown_duration
from gateway.text import MASK, did_you_mean
from gateway.turns import give_way
from gateway.verify.request import Request

MIN_SECRET = 4
"""Length of the shortest secret that is masked; shorter ones may occur anywhere by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much is explained, to whom: of an event of 100 KB, all that many routes do with it may be gigabytes.

    `sees` is whether somebody sees a route, by its name and whether it takes the event: the others aren't even counted;
    `sources` are those of one that they see. Of the routes that they see, so many `routes`, `with_unmatched` also such
    as don't take the event; and of each so many `requests`, until all of them have `size` bytes, those of the event's
    own body aside.
    """

    sees: Callable[[str, bool], bool]
    sources: Callable[[Route], Sequence[str]]
    with_unmatched: bool
    routes: int
    requests: int
    size: int


class BatchError(UsageError):
    """The ingress splits a request into its events, so that it isn't one itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The first request of one delivery, or the `problem` that dead-letters it instead, for a `reason`.

    The destination is "" if the event names none that is declared. If a field is missing, `available_fields` lists the
    existing ones.
    """

    destination: str
    request: Outbound | None
    part: int | None = None
    """Which item of the event it is for, from 0; None if it is for all of it."""
    problem: str = ""
    reason: DeadReason = DeadReason.EXPRESSION_ERROR
    available_fields: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedRoute:
    """Whether a route matches, why, and what it would send: the first of `requests_in_all` requests."""

    name: str
    is_matched: bool
    reason: str
    requests: tuple[Planned, ...] = ()
    requests_in_all: int = 0
    contact: Contact = NOBODY
    halts: bool = False
    """Whether a delivery that fails for good halts its key (`on_exhausted: halt`), and becomes no dead letter."""
    wait: str = ""
    """For what the deliveries wait before their first attempt; "" if for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """An event and what each route would do with it, in file order.

    `rules` is the version of the rules. `identified_by` is where its identity is read from, "" without one; `dedupe` is
    the source's window in seconds; `body_warnings` lists what rules can't see of its body. `body_as_read` is what they
    see, as JSON, where that isn't what came: of a form, XML, a compressed body; else "". `routes_left_out` is how many
    there are beside `routes`, of those that may be seen.
    """

    event: Event
    rules: str
    identified_by: str
    dedupe: float | None
    body_warnings: tuple[str, ...]
    body_as_read: str
    routes: tuple[ExplainedRoute, ...]
    routes_left_out: int = 0


def explain(
    rules: Rules,
    *,
    source: str,
    headers: Headers,
    query: str,
    body: bytes,
    now: float,
    is_secret_shown: bool = False,
    identity: str | None = None,
    is_event: bool = False,
    extent: Extent | None = None,
) -> Explained:
    """Return what would happen to a request to this source, all of it without an `extent`. Signatures aren't checked.

    Its event has an id of the `identity` if the sender gives it none; without one, that is another one each time. With
    `is_event`, it is what the ingress has made of a request.

    Raises UsageError for a source that isn't in the rules, BatchError for a body that its source splits, RefusedError
    if the ingress couldn't split it, or derive the event's id, type or key. Without `is_secret_shown` these are masked:
    values of references in the rules (of 4 characters or more), wherever they occur; headers of destinations;
    signatures; in URLs everything after the first part of the path; and what the source's `redact` hides of its events.
    A token that an attempt would fetch is never shown.
    """
    sender = rules.sources.get(source)
    if sender is None:
        raise UsageError(f"--source: unknown source {source!r}{did_you_mean(source, rules.sources)}")
    request = Request(method="POST", path=sender.path, query=query, headers=headers, body=body)
    if not is_event and (bodies := sender.split_body(request)) is not None:
        raise BatchError(
            f"the ingress makes {count(len(bodies), 'event')} of this body (split): pass one of its items as the event"
        )
    event = EventBuilder(sender).event(request, received_at=now)
    if identity is not None and identity_of(event.id) is None:
        event = replace(event, id=event_id(source, identity))
    return explain_event(rules, event, now=now, is_secret_shown=is_secret_shown, extent=extent)


def explain_event(
    rules: Rules, event: Event, *, now: float, is_secret_shown: bool = False, extent: Extent | None = None
) -> Explained:
    """Return the same for an event in the log, with the id, type and key that it got when it was received.

    Raises UsageError if its source isn't in the rules.
    """
    sender = rules.sources.get(event.source)
    if sender is None:
        raise UsageError(f"{event.id}: expected an event of a source in the rules, got one of {event.source!r}")
    request = Request(method="POST", path=sender.path, query=event.query, headers=event.headers, body=event.body)
    view = EventView.of(event)
    matched = rules.table.match(view)
    redactions = Redactions(None if is_secret_shown else rules)
    mask = None if is_secret_shown else _Mask(rules.secret_values, redactions, event)
    seen = str if mask is None else mask.seen
    every = rules.table.explain(EventView.of(event), matched, cache(seen))  # many routes may name one text
    reasons = {found.name: found.reason for found in every}
    failed = {route.name: reasons[route.name] for route, error in matched if error is not None}
    seen_routes = every if extent is None else [found for found in every if extent.sees(found.name, found.matched)]
    told = seen_routes if extent is None else _told(seen_routes, extent)
    planned: dict[str, list[Planned]] = {found.name: [] for found in told}
    counts: Counter[str] = Counter()
    bursts: dict[str, str | None] = {}
    size = 0
    for each in plan_as_attempted(event, view, matched):
        give_way()
        if (name := each.delivery.route) not in planned:
            continue
        counts[name] += 1
        bursts[name] = each.delivery.burst
        if extent is None or (counts[name] <= extent.requests and size < extent.size):
            planned[name].append(_plan(rules, each, now, failed, seen))
            size += _size(planned[name][-1], event)
    routes = []
    for found in told:
        give_way()
        name = found.name
        explained = ExplainedRoute(
            name=name,
            is_matched=found.matched,
            reason=found.reason if extent is None else _reason(found, rules.routes[name], event.source, extent),
            requests=tuple(planned[name]),
            requests_in_all=counts[name],
            contact=rules.contacts.get(("route", name), NOBODY),
            halts=rules.routes[name].on_exhausted == "halt",
            wait=_wait(rules.routes[name], bursts.get(name), seen) if found.matched and name not in failed else "",
        )
        routes.append(explained if mask is None else mask.route(explained, rules))
    try:
        identified_by = EventBuilder(sender).identified_by(request)
    except RefusedError:
        identified_by = ""  # received under other rules
    shown_event = redactions.event(event)
    return Explained(
        event=shown_event,
        rules=rules.version,
        identified_by=identified_by,
        dedupe=sender.dedupe,
        body_warnings=tuple(_body_warnings(view)) if event.body else (),
        body_as_read=_body_as_read(view, shown_event, is_redacted=shown_event.body != event.body),
        routes=tuple(routes),
        routes_left_out=len(seen_routes) - len(routes),
    )


def _reason(found: Explanation, route: Route, source: str, extent: Extent) -> str:
    """Return why a route takes an event or not, without its sources that aren't seen."""
    if found.matched or source in route.sources:
        return found.reason
    return of_other_sources(extent.sources(route), source)


def _told(seen: Sequence[Explanation], extent: Extent) -> Sequence[Explanation]:
    return [found for found in seen if found.matched or extent.with_unmatched][: extent.routes]


def _size(planned: Planned, event: Event) -> int:
    """Return how many bytes a request takes, or what is said instead of one."""
    request = planned.request
    if request is None:
        return len(planned.problem) + len(planned.available_fields)
    own = 0 if request.body is event.body else len(request.body)
    return own + len(request.path) + len(request.query) + sum([len(name) + len(each) for name, each in request.headers])


def _wait(route: Route, key: str | None, seen: Seen) -> str:
    if route.delay:
        return f"delivered {shown_duration(route.delay)} after its receipt"
    if route.debounce is None or key is None:
        return ""
    quiet = shown_duration(route.debounce.quiet)
    if not key:
        return f"delivered after {quiet}: it has no key by which another could supersede it"
    return f"delivered once {shown(seen(key))} was quiet for {quiet}, or superseded by its next event until then"


def _body_warnings(view: EventView) -> Iterator[str]:
    """Yield why rules can't read a body that there is."""
    if (unreadable := view.unreadable) is not None:
        yield f"rules can't read the body: {unreadable.detail}"


def _body_as_read(view: EventView, seen: Event, *, is_redacted: bool) -> str:
    is_as_it_came = (
        kind_of(view.headers.get("content-type", "")) is Kind.JSON and "content-encoding" not in view.headers
    )
    if is_as_it_came or not view.has_body:
        return ""
    if is_redacted:
        return "" if seen.body == HIDDEN.encode() else seen.body.decode()
    try:
        return orjson.dumps(view.body).decode()
    except TypeError:  # orjson reads what is nested more deeply than it writes
        return ""


class _Mask:
    """Masks possible secrets, by their origin, not by their form; and what the event's source hides."""

    def __init__(self, secrets: Collection[str], redactions: Redactions, event: Event) -> None:
        # The longest first, as one may contain another. Not a regular expression: that takes seconds for a CA bundle.
        known = {form for secret in secrets if len(secret) >= MIN_SECRET for form in _forms(secret)}
        self._secrets = [word.encode("utf-8", "surrogateescape") for word in sorted(known, key=len, reverse=True)]
        self._echoes = redactions.echoes(event)
        self._raw_body, self._seen_body = event.body, redactions.event(event).body

    def route(self, explained: ExplainedRoute, rules: Rules) -> ExplainedRoute:
        template = rules.routes[explained.name].request
        requests = [
            self._planned(self._computed(planned, template), rules.destinations.get(planned.destination))
            for planned in explained.requests
        ]
        reason, wait = self.seen(explained.reason), self.seen(explained.wait)
        return replace(explained, reason=reason, wait=wait, requests=tuple(requests))

    def _computed(self, planned: Planned, template: RequestTemplate | None) -> Planned:
        """Mask each part of a request with an expression that has a secret in it: what is computed may tell it."""
        request = planned.request
        if request is None or template is None:
            return planned
        secret = {name.lower().encode() for name, value in template.headers if self._is_in(value.expressions)}
        headers = [(name, MASK.encode() if name.lower() in secret else value) for name, value in request.headers]
        request = replace(request, headers=tuple(headers))
        if template.path is not None and self._is_in(template.path.expressions):
            request = replace(request, path=f"/{MASK}")
        if template.query is not None and self._is_in(template.query.expressions):
            request = replace(request, query=MASK)
        own = template.body or template.form or template.message
        if own is not None and self._is_in(own.expressions):
            request = replace(request, body=MASK.encode())
            if template.message is not None and request.path:
                request = replace(request, path=f"/{MASK}")
        return replace(planned, request=request)

    def _is_in(self, expressions: Iterable[Expression]) -> bool:
        return any(self._text(each.text) != each.text for each in expressions)

    def url(self, url: str) -> str:
        """Return scheme, host and the first part of the path; that is masked too if any of the URL is a reference."""
        parts = url_parts(url)
        if not parts.scheme:
            return self._text(url)  # an unresolved reference
        first, *others = parts.path.removeprefix("/").split("/")
        if first and self._text(url) != url:
            first = MASK
        path = "/".join([first, *([MASK] if any(others) else others)])
        masked = urlunsplit((parts.scheme, parts.netloc, f"/{path}", MASK if parts.query else "", ""))
        return self._text(masked)

    def _planned(self, planned: Planned, destination: Destination | None) -> Planned:
        request = planned.request
        if request is not None and destination is not None:
            secret = {name.lower().encode() for name, _ in destination.headers} | {b"webhook-signature"}
            headers = [
                (name, MASK.encode() if name.lower() in secret else self._echoes.bytes(self._bytes(value)))
                for name, value in request.headers
            ]
            request = replace(
                request,
                url=self.url(request.url),
                path=self.seen(request.path),
                query=self.seen(request.query),
                headers=tuple(headers),
                body=self._body(request.body),
            )
        return replace(
            planned,
            request=request,
            problem=self.seen(planned.problem),
            available_fields=self.seen(planned.available_fields),
        )

    def _body(self, body: bytes) -> bytes:
        return self._masked_body if body == self._raw_body else self._echoes.bytes(self._bytes(body))

    @cached_property
    def _masked_body(self) -> bytes:
        """The event's own body, which many requests have."""
        return self._bytes(self._seen_body)

    def seen(self, text: str) -> str:
        """Return a text without them; a whole one, since of a part it doesn't know what it is of."""
        return self._echoes.text(self._text(text))

    def _bytes(self, content: bytes) -> bytes:
        for secret in self._secrets:
            content = content.replace(secret, MASK.encode())
        return content

    def _text(self, text: str) -> str:
        return self._bytes(text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _forms(secret: str) -> Iterator[str]:
    yield secret
    for is_ascii in (False, True):
        yield json.dumps(secret, ensure_ascii=is_ascii)[1:-1]
    yield repr(secret)[1:-1]  # as quoted in a condition
    yield quote(secret, safe="", errors="replace")  # in a path, a query, a form


def _undeclared(event: Event, route: Route, seen: Seen) -> str:
    """Return which name an event gives that isn't declared; "" if it gives another, or none."""
    try:
        if route.choice is not None:
            route.choice.of(EventView.of(event))
    except UndeclaredDestinationError as error:
        return f"{error} name, {shown(seen(error.name))}" if error.name else ""
    except ExpressionError:
        pass
    return ""


def _plan(rules: Rules, planned: PlannedDelivery, now: float, failed: Mapping[str, str], seen: Seen) -> Planned:
    """Return the request of a delivery; `failed` has the routes whose condition did, and how."""
    delivery, end, *_ = planned
    route, name = rules.routes[delivery.route], delivery.destination
    if end is not None:
        problem = failed.get(route.name) or _undeclared(delivery.event, route, seen) or end.detail
        return Planned(destination=name, request=None, problem=problem, reason=end.reason)
    destination = rules.destinations[name]
    part = None if delivery.part is None else delivery.part.number
    try:
        request = compose(delivery, destination, route.request, now=now, split=route.split)
    except ExpressionError as error:
        absent = error.__cause__
        available_fields = absent.available_fields(seen) if isinstance(absent, AbsentFieldError) else ""
        return Planned(destination=name, request=None, part=part, problem=str(error), available_fields=available_fields)
    if destination.access is not None and destination.access.oauth2 is not None:
        # The attempt itself fetches the token: there is none to show yet.
        request = replace(request, headers=(*request.headers, (b"authorization", f"Bearer {MASK}".encode())))
    return Planned(destination=name, request=request, part=part)
