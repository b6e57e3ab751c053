"""An event as a test of the rules: the file that `gateway events export` writes of it, and what comes of it now.

So `gateway test` passes with it for as long as the rules do with the event what they do now: which routes take it, and
by which method and with which body each asks its destinations. What a snapshot has beside that, URLs and headers, isn't
in it: there the rules may have a secret literally, and whoever saves a test sees no rules.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from gateway.log.records import decode_event
from gateway.model import RefusedError, UsageError
from gateway.ops.event_export import TESTS, exported, file_name, file_test, line_of, withhold, written_tests
from gateway.ops.explain import Explained, Extent, explain
from gateway.ops.log_search import Found
from gateway.ops.rule_tests import body_of, refusal, run_test, stable_identity
from gateway.rules.rule_tests import ExpectedRequest, GivenEvent, RuleTest, captured_event
from gateway.rules.rules import Rules

MOST_REQUESTS, MOST_BODY = 50, 16 << 10
"""Requests that are expected, and bytes of a body: of what is beyond, only the routes and the methods are."""
MOST_MADE = 4 << 20
"""Bytes of requests beyond which no more are made: all of an event of 1 MB may be gigabytes."""
Requests = Sequence[Mapping[str, Any]]


class SavedTest(NamedTuple):
    """The files, by their names, the routes that take the event, and where something of it was withheld."""

    files: dict[str, bytes]
    routes: tuple[str, ...]
    withheld: tuple[str, ...]


def saved_test(rules: Rules, found: Found, *, now: float) -> SavedTest:
    """Return an event as a test, by rules without secrets, as `gateway test` has them. `now` is in Unix seconds.

    Raises UsageError for an event that can't be one, and UnreadableRecordError.
    """
    safe = withhold(rules, decode_event(found.record))
    if safe is None:
        raise UsageError(
            "expected an event that can be shown, got one with a credential that is too short to be masked"
        )
    named = (safe.event.source, safe.event.type, safe.event.id)
    content, name = line_of(exported(found, safe)), file_name(named, found.position)
    event = captured_event(orjson.loads(content))
    extent = Extent(
        sees=lambda _, __: True,
        sources=lambda route: route.sources,
        with_unmatched=False,
        routes=len(rules.routes),
        requests=MOST_REQUESTS,
        size=MOST_MADE,
    )
    try:
        explained = explain(
            rules,
            source=event.source,
            headers=event.headers,
            query=event.query,
            body=event.body,
            now=now,
            is_secret_shown=True,
            identity=stable_identity(event),
            is_event=True,
            extent=extent,
        )
    except RefusedError as error:
        raise UsageError(refusal(error)) from error
    routes = tuple([route.name for route in explained.routes if route.is_matched])
    requests = _requests(explained, event.body)
    if not _passes(rules, event, routes, requests, extent, now=now):  # a body that no test can say
        requests = [{key: value for key, value in each.items() if key != "body"} for each in requests]
    expect = {"routes": routes, **({"requests": requests} if requests else {})}
    files = {name: content, TESTS: written_tests([file_test(name) | {"expect": expect}])}
    return SavedTest(files, routes, safe.names)


def _requests(explained: Explained, body: bytes) -> Requests:
    found: list[dict[str, Any]] = []
    for route in explained.routes:
        for planned in route.requests:
            request = planned.request
            expected: dict[str, Any] = {"route": route.name}
            expected |= {"to": planned.destination} if planned.destination else {}
            expected |= {} if planned.part is None else {"item": planned.part}
            if request is None:
                expected["error"] = planned.problem
            else:
                expected["method"] = str(request.method)
                if request.body != body and len(request.body) <= MOST_BODY:
                    expected["body"] = body_of(request)
            found.append(expected)
    return found[:MOST_REQUESTS]


def _passes(
    rules: Rules, event: GivenEvent, routes: tuple[str, ...], requests: Requests, extent: Extent, *, now: float
) -> bool:
    test = RuleTest(
        name="",
        where=TESTS,
        file=Path(TESTS),
        event=event,
        routes=routes,
        requests=tuple(
            [
                ExpectedRequest(
                    route=each["route"],
                    to=each.get("to"),
                    item=each.get("item", 0),
                    fields={key: each[key] for key in ("method", "body", "error") if key in each},
                )
                for each in requests
            ]
        ),
        has_snapshot=False,
    )
    return not run_test(rules, test, {}, now=now, extent=extent).differences
