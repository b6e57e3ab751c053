"""What the gateway would do with a request, by the rules in force or by others that are posted with it."""

import binascii
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import orjson

from gateway.access.principal import Principal
from gateway.api.backend import Backend, told
from gateway.api.bare_rules import let_go
from gateway.api.events import find_event
from gateway.api.json_shapes import NAME, Limits
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.sight import sees_source
from gateway.index.statuses import Status
from gateway.model import Headers, RefusedError, UsageError
from gateway.ops.explain import Explained, ExplainedRoute, Planned, explain, explain_event
from gateway.ops.output import header_text
from gateway.rules.load import InvalidRulesError, load_rules
from gateway.rules.rules import Rules
from gateway.rules.yaml_document import Problem, read_document, take_apart

MOST_BODY, MOST_RULES = 1 << 20, 256 << 10
"""Bytes of a body, and characters of rules."""
MOST_ROUTES, MOST_REQUESTS = 200, 20
"""Routes that are told, and requests of each."""
MOST_PROBLEMS = 50
FILE = "routes.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenHeader:
    """A header of the request."""

    name: Annotated[str, Limits(longest=256)]
    value: Annotated[str, Limits(longest=8192)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainRequest:
    """A request to a source, whose signature isn't checked, with its body as text or in base64.

    With `rules`, the text of a rule file, those count instead of the rules in force: without secrets, and without
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
    `is_event_body`: it is the event's own, as it came.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteExplained:
    """Whether a route takes the event, and why; `wait` is for what its deliveries wait before their first attempt.

    `halts`: a delivery that fails for good halts its key, and becomes no dead letter. Of its requests there are the
    first twenty, of `requests_in_all`.
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
    that don't match, and of more than 200, only the number is told: `routes_left_out`. `is_duplicate`: the index says
    that an earlier event has the identity and content of this one, so that no route delivers it.
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
        if given.rules is not None:
            parts = [*rules.routes.values(), *rules.destinations.values(), *rules.sources.values()]
        try:
            found = explain(
                rules, source=given.source, headers=_headers_of(given), query=given.query, body=body, now=now
            )
        except UsageError as error:
            raise ApiError(Code.INVALID_REQUEST, f"body: {str(error).removeprefix('--')}") from error
        except RefusedError as error:
            detail = f"the ingress would answer {error.status} ({error.reason}): {error.detail}"
            raise ApiError(Code.NOT_ACCEPTED_BY_INGRESS, detail) from error
        finally:
            del rules
            let_go(parts)
        return _explanation(found, is_all=given.include_unmatched)

    return await backend.aside(work)


async def explain_stored(
    backend: Backend, principal: Principal, *, event: str, include_unmatched: bool = False
) -> Explanation:
    """Tell what the rules in force would do with an event in the log, and why."""
    rules, now = backend.rules(), backend.log.now()
    async with told():
        found = await find_event(backend, principal, event)
        content = await backend.open_index().content(found)
    if content is None:
        raise ApiError(Code.NOT_FOUND, f"expected the record of {found.id} in the log, got none: it was deleted by age")

    def work() -> Explanation:
        try:
            explained = explain_event(rules, content, now=now)
        except UsageError as error:
            raise ApiError(Code.CONFLICT, str(error)) from error
        return _explanation(explained, is_all=include_unmatched, is_duplicate=found.status is Status.DUPLICATE)

    return await backend.aside(work)


def _posted(text: str) -> Rules:
    """Return the rules of a text: without secrets, and without any other file of this machine. Raises ApiError."""
    with TemporaryDirectory(prefix="gateway-explain-") as folder:
        path = Path(folder) / FILE
        path.write_text(text, encoding="utf-8", errors="replace")
        root = read_document(path, list[Problem]())
        has_include = root is not None and root.child("include") is not None
        take_apart(root)
        if has_include:
            raise ApiError(Code.INVALID_RULES, f"{FILE}: expected rules of one file, got `include`")
        try:
            return load_rules(path, environ={}, resolve=False, reads_secrets=False)
        except InvalidRulesError as error:
            problems = [str(each).replace(f"{folder}/", "") for each in error.problems[:MOST_PROBLEMS]]
            raise ApiError(Code.INVALID_RULES, "\n".join(problems)) from error


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
        raise ApiError(Code.INVALID_REQUEST, "body.body_base64: expected base64, got another text") from None


def _explanation(found: Explained, *, is_all: bool, is_duplicate: bool = False) -> Explanation:
    event = found.event
    routes = [route for route in found.routes if is_all or route.is_matched][:MOST_ROUTES]
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
        routes=tuple([_route(route, event.body) for route in routes]),
        routes_left_out=len(found.routes) - len(routes),
        is_duplicate=is_duplicate,
    )


def _route(route: ExplainedRoute, own: bytes) -> RouteExplained:
    return RouteExplained(
        name=route.name,
        is_matched=route.is_matched,
        reason=route.reason,
        owner=route.contact.owner or None,
        runbook=route.contact.runbook or None,
        halts=route.halts,
        wait=route.wait or None,
        requests=tuple([_request(each, own) for each in route.requests[:MOST_REQUESTS]]),
        requests_in_all=len(route.requests),
    )


def _request(planned: Planned, own: bytes) -> PlannedRequest:
    request = planned.request
    if request is None:
        return PlannedRequest(
            destination=planned.destination or None,
            item=planned.part,
            problem=planned.problem,
            dead_reason=planned.reason,
            available_fields=planned.available_fields or None,
            method=None,
            url=None,
            headers=(),
            body=None,
            body_base64=None,
            is_event_body=False,
        )
    try:
        text, packed = request.body.decode(), None
    except UnicodeDecodeError:
        text, packed = None, b64encode(request.body).decode()
    return PlannedRequest(
        destination=planned.destination,
        item=planned.part,
        problem=None,
        dead_reason=None,
        available_fields=None,
        method=request.method,
        url=request.address,
        headers=tuple(
            [PlannedHeader(name=header_text(name), value=header_text(value)) for name, value in request.headers]
        ),
        body=text,
        body_base64=packed,
        is_event_body=bool(own) and request.body == own,
    )
