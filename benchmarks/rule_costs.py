"""What rules cost in this process: to match an event, to evaluate an expression, to make a request, to load a file."""

import gc
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import orjson

from benchmarks.figures import Figure
from gateway.client.request import compose
from gateway.engine.deliveries_of_event import plan
from gateway.model import Event, EventId
from gateway.rules.conditions import parse_condition
from gateway.rules.event_view import EventView
from gateway.rules.load import load_rules
from gateway.rules.retry_policy import RetryPolicy
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Route

COUNTS = (10, 1_000, 10_000, 100_000)
"""Numbers of routes."""
EVENTS = 2_000
"""Events of one measurement."""
BODY = {
    "action": "opened",
    "number": 4711,
    "repository": {"full_name": "acme/service-5", "html_url": "https://github.com/acme/service-5"},
    "sender": {"login": "jo", "email": "Jo@Acme.example"},
    "commits": [{"id": f"{number:040x}", "message": f"Change {number}\n\nat last"} for number in range(5)],
}
ROUTES = {
    "a route without a request": "",
    "a condition in CEL": "when: body.action == 'opened' && size(body.commits) > 3",
    "a template of JSON": "request: {body: {by: '${{ body.sender.login }}', url: '${{ body.repository.html_url }}'}}",
    "a template with functions": "request: {body: {who: '${{ sha256(body.sender.email.lower()) }}'}}",
    "a template with a loop": "request: {body: {x: {for: body.commits, as: c, do: '${{ c.id.substring(0, 7) }}'}}}",
    "a message of Slack": "request: {preset: slack, title: 'By ${{ body.sender.login }}', text: '${{ body.action }}'}",
}
"""What is measured beside a plain route, as YAML."""


class Loaded(NamedTuple):
    """What loading a file takes: seconds of processor time, and bytes that stay."""

    seconds: float
    memory: int


def match_figures(rounds: int) -> list[Figure]:
    """Measure the matching of an event, its body's parsing included, at several numbers of routes."""
    tables = [RouteTable([_route(number) for number in range(count)]) for count in COUNTS]
    events = [_event(number) for number in range(EVENTS)]

    def matching(table: RouteTable[Route]) -> Callable[[], None]:
        def match() -> None:
            for event in events:
                table.match(EventView.of(event))

        return match

    few, *more = _medians([matching(table) for table in tables], rounds)
    return [
        Figure(
            section="rules",
            name=f"match at {count:,} routes beside {COUNTS[0]}",
            value=1e6 * seconds / EVENTS,
            reference=1e6 * few / EVENTS,
            unit="µs",
            at_most=1.2,
        )
        for count, seconds in zip(COUNTS[1:], more, strict=True)
    ]


def request_figures(folder: Path, rounds: int) -> list[Figure]:
    """Measure the making of a request by several kinds of routes, from the event on."""
    events = [_event(number) for number in range(EVENTS // 4)]

    def making(keys: str) -> Callable[[], None]:
        (file := folder / "kind.yaml").write_text(
            "version: 1\nsources: {github: {verify: {scheme: none}}}\n"
            "destinations: {ci: {url: 'http://127.0.0.1:1/'}}\n"
            f"routes:\n  - name: r\n    from: github\n    to: ci\n    {keys}\n"
        )
        rules = load_rules(file)
        [route], [destination] = rules.routes.values(), rules.destinations.values()

        def make() -> None:
            for event in events:
                view = EventView.of(event)
                for planned in plan(event, view, rules.table.match(view)):
                    compose(planned.delivery, destination, route.request, now=0.0)

        return make

    plain, *others = [1e6 * each / len(events) for each in _medians([making(keys) for keys in ROUTES.values()], rounds)]
    return [
        Figure(section="rules", name=f"{name}: beside a plain route", value=value, reference=plain, unit="µs")
        for name, value in zip(list(ROUTES)[1:], others, strict=True)
    ]


def load_figures(file: Path, count: int) -> list[Figure]:
    """Measure the loading of a file with this many routes."""
    loaded = _loaded(file)
    return [
        Figure(
            section="rules", name=f"load {count:,} routes: processor time", value=loaded.seconds, unit="s", at_most=2.0
        ),
        Figure(
            section="rules",
            name=f"load {count:,} routes: memory that stays",
            value=loaded.memory / (1 << 20),
            unit="MiB",
        ),
    ]


def _loaded(file: Path) -> Loaded:
    began = time.process_time()
    load_rules(file)
    seconds = time.process_time() - began
    gc.collect()
    tracemalloc.start()
    rules = load_rules(file)
    gc.collect()
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del rules
    return Loaded(seconds, memory)


def _medians(contestants: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Run them in turns; return the median seconds of processor time of each."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for contestant, of_one in zip(contestants, seconds, strict=True):
            began = time.process_time()
            contestant()
            of_one.append(time.process_time() - began)
    return [median(of_one) for of_one in seconds]


def _route(number: int) -> Route:
    match: Mapping[str, object] = {"type": "push", "body.repository.full_name": f"acme/service-{number}"}
    return Route(
        name=f"build-{number}",
        sources=("github",),
        match=parse_condition(match),
        when=None,
        destinations=(f"team-{number // 10}",),
        request=None,
        retry=RetryPolicy(),
    )


def _event(number: int) -> Event:
    return Event(
        id=EventId(f"evt_{number}"),
        source="github",
        type="push",
        received_at=0.0,
        headers=((b"Content-Type", b"application/json"), (b"X-GitHub-Event", b"push")),
        body=orjson.dumps(BODY | {"number": number}),
    )
