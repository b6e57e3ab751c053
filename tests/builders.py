"""Values with defaults, so that a test states only what it is about."""

from collections.abc import Mapping
from typing import Any

import orjson

from gateway.model import Attempt, Delivery, DeliveryId, Event, EventId, Result, delivery_id, event_id
from gateway.rules.conditions import parse_condition
from gateway.rules.expressions import Expression
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.retry_policy import RetryPolicy
from gateway.rules.rules import Destination, Route

NOW = 1_700_000_000.0


def an_event(
    *,
    source: str = "github",
    type: str = "push",  # noqa: A002 - the field's name
    id: str | None = None,  # noqa: A002 - the field's name
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    query: str = "",
    body: object = b'{"ref":"refs/heads/main"}',
    received_at: float = NOW,
) -> Event:
    """Make an event; a body that isn't bytes is written as JSON."""
    pairs = {"Content-Type": "application/json"} if headers is None else headers
    return Event(
        id=event_id(source, "1") if id is None else EventId(id),
        source=source,
        type=type,
        key=key,
        received_at=received_at,
        headers=tuple((name.encode(), value.encode()) for name, value in pairs.items()),
        query=query,
        body=body if isinstance(body, bytes) else orjson.dumps(body),
    )


def a_delivery(
    *,
    event: Event | None = None,
    route: str = "build",
    destination: str = "ci",
    id: str | None = None,  # noqa: A002 - the field's name
    attempts: tuple[Attempt, ...] = (),
    successor: int = 0,
    due: float = 0.0,
) -> Delivery:
    event = an_event() if event is None else event
    return Delivery(
        id=delivery_id(event.id, route, destination) if id is None else DeliveryId(id),
        event=event,
        route=route,
        destination=destination,
        attempts=attempts,
        successor=successor,
        due=due,
    )


def an_attempt(number: int = 1, *, result: Result = Result.SERVER_ERROR, **fields: Any) -> Attempt:
    values: dict[str, Any] = {"at": NOW, "seconds": 0.1} | fields
    return Attempt(number=number, result=result, **values)


def a_policy(**fields: Any) -> RetryPolicy:
    """Make a policy of short, exact delays."""
    values: dict[str, Any] = {"schedule": (1.0, 2.0, 4.0), "max_attempts": 4, "max_age": 60.0, "jitter": 0.0} | fields
    return RetryPolicy(**values)


def a_destination(name: str = "ci", *, url: str = "http://127.0.0.1:1/", **fields: Any) -> Destination:
    return Destination(name=name, url=url, **fields)


def a_route(
    name: str = "build",
    *,
    sources: tuple[str, ...] = ("github",),
    match: Mapping[str, object] | None = None,
    when: str | None = None,
    to: tuple[str, ...] = ("ci",),
    request: RequestTemplate | None = None,
    retry: RetryPolicy | None = None,
    is_ordered: bool = False,
    halts: bool = False,
) -> Route:
    """Make a route from what a rule file would say."""
    return Route(
        name=name,
        sources=sources,
        match=None if match is None else parse_condition(match),
        when=None if when is None else Expression(when),
        destinations=to,
        request=request,
        retry=a_policy() if retry is None else retry,
        order="key" if is_ordered else None,
        on_exhausted="halt" if halts else "dead_letter",
    )
