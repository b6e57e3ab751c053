"""What the gateway would do with a request, by the active rules or by others that are posted with it."""

import binascii
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import orjson

from gateway.access.principal import Principal
from gateway.api.backend import Backend, must_be_available
from gateway.api.bare_rules import let_go
from gateway.api.events import find_event
from gateway.api.json_shapes import NAME, Limits
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.shares import whose_turn
from gateway.api.visibility import sees_named, sees_source, sources_seen
from gateway.index.statuses import Status
from gateway.model import Headers, RefusedError, UsageError
from gateway.ops.explain import Explained, ExplainedRoute, Extent, Planned, explain, explain_event
from gateway.ops.output import header_text
from gateway.rules.foreach import Growth, growth
from gateway.rules.load import InvalidRulesError, load_rules
from gateway.rules.rules import Route, Rules
from gateway.rules.yaml_document import Problem, read_document, take_apart, text_of
from gateway.rules.yaml_size import Size, expanded_size
from gateway.turns import TooLongError, give_way

MOST_BODY, MOST_RULES = 1 << 20, 256 << 10
"""Bytes of a body, and characters of rules."""
REQUEST_BYTES = 3 << 20
"""Bytes of what is posted, at most: an event's body, in base64, and rules to go with it."""
MOST_ROUTES, MOST_REQUESTS = 200, 20
"""Routes that are told, and requests of each."""
MOST_MADE = 4 << 20
"""Bytes of requests that are made, to be told."""
MOST_TOLD = 2 << 20
"""Bytes of an answer, as JSON has them: so many of routes, of requests without bodies, and of bodies."""
MOST_PROBLEMS, LONGEST_PROBLEM = 50, 600
"""Problems of posted rules that are told, and characters of each."""
MOST_VALUES, MOST_PATHS = 40_000, 8 << 20
"""Values of posted rules, aliases included, and characters of all their paths: as many as so much text usually has."""
MOST_GROWN, MOST_INSERTED = 120_000, 4 << 20
"""Values that `foreach` writes in posted rules, twelve for each of 10,000 routes, and characters of the texts in which
it inserts an item. Usual routes of so many are read in four seconds and 100 MB. A file may have eight times as many."""
MOST_SECONDS = 5.0
"""Of processor time, for an explanation and the rules that are posted for it."""
FILE = "routes.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenHeader:
    """A header of the request."""

    name: Annotated[str, Limits(longest=256)]
    value: Annotated[str, Limits(longest=8192)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainRequest:
    """A request to a source, whose signature isn't checked, with its body as text or in base64.

    With `rules`, the text of a rule file, those count instead of the active rules: without secrets, and without
    `include`. Routes that don't match are told with `include_unmatched`.
    """

    source: Annotated[str, NAME]
    headers: Annotated[tuple[GivenHeader, ...], Limits(longest=100)] = ()
    query: Annotated[str, Limits(longest=8192)] = ""
    body: Annotated[str | None, Limits(longest=MOST_BODY)] = None
    body_base64: Annotated[str | None, Limits(longest=MOST_BODY * 4 // 3 + 4)] = None
    rules: Annotated[str | None, Limits(longest=MOST_RULES)] = None
    include_unmatched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedHeader:
    """A header that would be sent; secrets are masked."""

    name: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """The first request of a delivery, or why there is none: its `problem`, and the `dead_reason` it ends with.

    `item` is which of the event's items it is for, null if it is for all of it. A body that isn't UTF-8 is in base64;
    `is_event_body`: it is the event's own, as it came. `is_body_left_out`: the bodies before it have 2 MiB already.
    """

    destination: str | None
    item: int | None
    problem: str | None
    dead_reason: str | None
    available_fields: str | None
    method: str | None
    url: str | None
    headers: tuple[PlannedHeader, ...]
    body: str | None
    body_base64: str | None
    is_event_body: bool
    is_body_left_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteExplained:
    """Whether a route takes the event, and why; `wait` is for what its deliveries wait before their first attempt.

    `halts`: a delivery that fails for good halts its key, and becomes no dead letter. Of its requests there are the
    first twenty, fewer where an answer has much already, of `requests_in_all`.
    """

    name: str
    is_matched: bool
    reason: str
    owner: str | None
    runbook: str | None
    halts: bool
    wait: str | None
    requests: tuple[PlannedRequest, ...]
    requests_in_all: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What the gateway would do with a request: the event that it would make of it, and what each route does with that.

    `identified_by` is where the event's identity is read from. `body_warnings` are what rules can't see of the body;
    `body_as_read` is what they see, null where that is what came. `rules` is the version of the rules. Of the routes
    that don't match, and of more than 200, only the number is told: `routes_left_out`; of those that the caller may
    not see, not even that. `is_duplicate`: the index says that an earlier event has the identity and content of this
    one, so that no route delivers it.
    """

    event_id: str
    source: str
    type: str
    key: str | None
    rules: str
    identified_by: str | None
    dedupe_seconds: float | None
    body_warnings: tuple[str, ...]
    body_as_read: Any
    routes: tuple[RouteExplained, ...]
    routes_left_out: int
    is_duplicate: bool


async def explain_request(backend: Backend, principal: Principal, *, given: ExplainRequest) -> Explanation:
    """Tell what the gateway would do with a request, and why."""
    if not sees_source(principal, backend.rules(), given.source):
        raise not_found("a source")
    body, now = _body_of(given), backend.log.now()

    def work() -> Explanation:
        rules = backend.rules() if given.rules is None else _posted(given.rules)
        parts: list[object] = []
        extent = _extent(principal, rules, with_unmatched=given.include_unmatched, is_own=given.rules is not None)
        if given.rules is not None:
            parts = [*rules.routes.values(), *rules.destinations.values(), *rules.sources.values()]
        try:
            found = explain(
                rules,
                source=given.source,
                headers=_headers_of(given),
                query=given.query,
                body=body,
                now=now,
                extent=extent,
            )
        except UsageError as error:
            raise ApiError(Code.INVALID_REQUEST, f"body: {str(error).removeprefix('--')}") from error
        except RefusedError as error:
            detail = f"the ingress would answer {error.status} ({error.reason}): {error.detail}"
            raise ApiError(Code.NOT_ACCEPTED_BY_INGRESS, detail) from error
        finally:
            del rules
            let_go(parts)
        return _explanation(found)

    try:
        return await backend.try_out(whose_turn(principal), work, MOST_SECONDS)
    except TooLongError:
        if given.rules is None:
            raise _too_long() from None
        detail = f"reading and trying the rules took longer than {MOST_SECONDS:g} s"
        raise ApiError(Code.INVALID_RULES, detail) from None


async def explain_stored(
    backend: Backend, principal: Principal, *, event: str, include_unmatched: bool = False
) -> Explanation:
    """Tell what the active rules would do with an event in the log, and why."""
    rules, now = backend.rules(), backend.log.now()
    async with must_be_available():
        found = await find_event(backend, principal, event)
        content = await backend.open_index().content(found)
    if content is None:
        raise ApiError(Code.NOT_FOUND, f"expected the record of {found.id} in the log, got none: it was deleted by age")

    def work() -> Explanation:
        try:
            extent = _extent(principal, rules, with_unmatched=include_unmatched)
            explained = explain_event(rules, content, now=now, extent=extent)
        except UsageError as error:
            raise ApiError(Code.CONFLICT, str(error)) from error
        return _explanation(explained, is_duplicate=found.status is Status.DUPLICATE)

    try:
        return await backend.explain(whose_turn(principal), work, MOST_SECONDS)
    except TooLongError:
        raise _too_long() from None


def _too_long() -> ApiError:
    detail = f"expected an event that is explained within {MOST_SECONDS:g} s, got one with more to compute"
    return ApiError(Code.CONFLICT, detail)


def _posted(text: str) -> Rules:
    """Return the rules of a text: without secrets, and without any other file of this machine. Raises ApiError."""
    with TemporaryDirectory(prefix="gateway-explain-") as folder:
        path = Path(folder) / FILE
        path.write_text(text, encoding="utf-8", errors="replace")
        _must_be_bounded(expanded_size(text_of(path, list[Problem]()) or ""))
        root = read_document(path, list[Problem]())
        has_include = root is not None and root.child("include") is not None
        grown = Growth(0, 0) if root is None else growth(root)
        take_apart(root)
        _must_not_grow(grown)
        if has_include:
            raise ApiError(Code.INVALID_RULES, f"{FILE}: expected rules of one file, got `include`")
        try:
            return load_rules(path, environ={}, resolve=False, reads_secrets=False)
        except InvalidRulesError as error:
            problems = [str(each).replace(f"{folder}/", "") for each in error.problems[:MOST_PROBLEMS]]
            raise ApiError(Code.INVALID_RULES, "\n".join([_cut(each) for each in problems])) from error


def _must_be_bounded(size: Size) -> None:
    if size.values > MOST_VALUES:
        raise ApiError(Code.INVALID_RULES, f"{FILE}: expected at most {MOST_VALUES:,} values, aliases included")
    if size.path_characters > MOST_PATHS:
        detail = f"{FILE}: expected at most {MOST_PATHS:,} characters of the paths of all values"
        raise ApiError(Code.INVALID_RULES, detail)


def _must_not_grow(grown: Growth) -> None:
    for number, most, what in (
        (grown.values, MOST_GROWN, "values"),
        (grown.characters, MOST_INSERTED, "characters with items"),
    ):
        if number > most:
            detail = f"{FILE}: expected at most {most:,} {what} in what `foreach` writes, got {number:,}"
            raise ApiError(Code.INVALID_RULES, detail)


def _cut(problem: str) -> str:
    return problem if len(problem) <= LONGEST_PROBLEM else f"{problem[:LONGEST_PROBLEM]}…"


def _headers_of(given: ExplainRequest) -> Headers:
    return tuple(
        [(each.name.encode("utf-8", "replace"), each.value.encode("utf-8", "replace")) for each in given.headers]
    )


def _body_of(given: ExplainRequest) -> bytes:
    if given.body_base64 is None:
        return (given.body or "").encode("utf-8", "replace")
    if given.body is not None:
        raise ApiError(Code.INVALID_REQUEST, "body: expected one of body and body_base64, got both")
    try:
        return b64decode(given.body_base64, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(Code.INVALID_REQUEST, "body.body_base64: expected base64") from None


def _extent(principal: Principal, rules: Rules, *, with_unmatched: bool, is_own: bool = False) -> Extent:
    """Return which routes somebody sees who sees the event; of rules that they have written themselves, all.

    With the event, they see its deliveries, by whichever route: so they see one that takes it.
    """

    def sees(name: str, is_matched: bool) -> bool:  # noqa: FBT001 - as an extent has it
        return is_own or is_matched or sees_named(principal, rules, "route", name, rules.routes[name].sources)

    def sources(route: Route) -> Sequence[str]:
        return route.sources if is_own else sources_seen(principal, rules, route)

    return Extent(
        sees=sees,
        sources=sources,
        with_unmatched=with_unmatched,
        routes=MOST_ROUTES,
        requests=MOST_REQUESTS,
        size=MOST_MADE,
    )


class _Room:
    """What an answer has room for, in bytes as JSON has them."""

    def __init__(self, size: int) -> None:
        self._left = size

    def takes(self, *texts: str | None) -> bool:
        """Return whether there is room for some texts, which then take it."""
        size = sum([_OVERHEAD + len(orjson.dumps(_utf8(text))) for text in texts if text is not None])
        if size > self._left:
            return False
        self._left -= size
        return True


_OVERHEAD = 40
"""Bytes of a field beside its text: its name, and what is around it."""


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _explanation(found: Explained, *, is_duplicate: bool = False) -> Explanation:
    event = found.event
    outlines, requests, bodies = (_Room(MOST_TOLD) for _ in range(3))
    routes = [
        _route(route, event.body, requests, bodies)
        for route in found.routes
        if outlines.takes(route.name, route.reason, *route.contact, route.wait)
    ]
    return Explanation(
        event_id=event.id,
        source=event.source,
        type=event.type,
        key=event.key,
        rules=found.rules,
        identified_by=found.identified_by or None,
        dedupe_seconds=found.dedupe,
        body_warnings=found.body_warnings,
        body_as_read=orjson.loads(found.body_as_read) if found.body_as_read else None,
        routes=tuple(routes),
        routes_left_out=found.routes_left_out + len(found.routes) - len(routes),
        is_duplicate=is_duplicate,
    )


def _route(route: ExplainedRoute, own: bytes, room: _Room, bodies: _Room) -> RouteExplained:
    requests: list[PlannedRequest] = []
    for each in route.requests:
        give_way()
        request = _request(each)
        headers = [text for header in request.headers for text in (header.name, header.value)]
        if not room.takes(request.destination, request.problem, request.available_fields, request.url, *headers):
            break
        requests.append(request if each.request is None else _with_body(request, each.request.body, own, bodies))
    return RouteExplained(
        name=route.name,
        is_matched=route.is_matched,
        reason=route.reason,
        owner=route.contact.owner or None,
        runbook=route.contact.runbook or None,
        halts=route.halts,
        wait=route.wait or None,
        requests=tuple(requests),
        requests_in_all=route.requests_in_all,
    )


def _request(planned: Planned) -> PlannedRequest:
    """Return a request without its body."""
    request = planned.request
    headers = () if request is None else request.headers
    return PlannedRequest(
        destination=planned.destination or None,
        item=planned.part,
        problem=planned.problem if request is None else None,
        dead_reason=planned.reason if request is None else None,
        available_fields=planned.available_fields or None,
        method=None if request is None else request.method,
        url=None if request is None else request.address,
        headers=tuple([PlannedHeader(name=header_text(name), value=header_text(value)) for name, value in headers]),
        body=None,
        body_base64=None,
        is_event_body=False,
        is_body_left_out=False,
    )


def _with_body(request: PlannedRequest, body: bytes, own: bytes, room: _Room) -> PlannedRequest:
    """Return a request with its body, or without it where there is no more room."""
    is_own = bool(own) and body == own
    try:
        text, packed = body.decode(), None
    except UnicodeDecodeError:
        text, packed = None, b64encode(body).decode()
    if not room.takes(text, packed):
        return replace(request, is_event_body=is_own, is_body_left_out=True)
    return replace(request, body=text, body_base64=packed, is_event_body=is_own)
