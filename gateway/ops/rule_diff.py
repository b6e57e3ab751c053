"""`gateway diff`: what other rules would do with the same events, a route at a time."""

import io
import json
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gateway.client.request import Outbound, compose
from gateway.engine.deliveries_of_event import plan
from gateway.model import Delivery, Event, EventId, ExpressionError, RefusedError, UsageError
from gateway.ops.output import header_text
from gateway.ops.rule_tests import CHANGING_HEADERS, body_of, differences
from gateway.rules.event_builder import EventBuilder
from gateway.rules.event_view import EventView
from gateway.rules.rule_tests import captured_event
from gateway.rules.rules import Route, Rules
from gateway.verify.request import Request

MAX_SAMPLES = 3
MAX_LINE = 64 << 20  # bytes of an event in a file
GIT_TIMEOUT = 60.0

Matched = tuple[Route, Delivery, str]
"""A route that takes an event, its delivery, and why that ends without an attempt, "" if it doesn't."""
Deliveries = dict[tuple[str, str, int | None], Matched]
"""Those of an event, by route and destination, and of a split the item."""


@dataclass(slots=True)
class RouteDiff:
    """What becomes of a route's deliveries. `samples` are, by kind of change, some events' ids and what differs."""

    before: int = 0
    after: int = 0
    gained: int = 0
    lost: int = 0
    changed: int = 0
    samples: dict[str, list[tuple[str, tuple[str, ...]]]] = field(default_factory=dict)

    @property
    def is_changed(self) -> bool:
        return bool(self.gained or self.lost or self.changed)

    def add(self, kind: str, event: Event, what: tuple[str, ...]) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        samples = self.samples.setdefault(kind, [])
        if len(samples) < MAX_SAMPLES:
            samples.append((event.id, what))


class RuleDiff:
    """Compares two versions of the rules, event by event."""

    def __init__(self, old: Rules, new: Rules, *, now: float) -> None:
        self.events = 0
        self.unrouted: Counter[str] = Counter()
        """How many events no route takes, `before` and `after`."""
        self.routes: dict[str, RouteDiff] = {}
        """By route: of both versions, those of the new one first."""
        for name in (*new.routes, *old.routes):
            self.routes.setdefault(name, RouteDiff())
        self._old, self._new, self._now = old, new, now
        self._builders = [
            {name: EventBuilder(source) for name, source in rules.sources.items()} for rules in (old, new)
        ]
        self._same_source = {
            name
            for name in old.sources.keys() & new.sources.keys()
            if self._builders[0][name].expression_texts() == self._builders[1][name].expression_texts()
        }

    def add(self, event: Event) -> None:
        """Compare what both versions would do with an event."""
        self.events += 1
        is_read_alike = event.source in self._same_source
        events = (event, event) if is_read_alike else (self._read(0, event), self._read(1, event))
        # Each with a view of its own, since the expressions over one view have a common limit.
        before, after = self._deliveries(self._old, events[0]), self._deliveries(self._new, events[1])
        self.unrouted["before"] += not before
        self.unrouted["after"] += not after
        for key in before | after:
            route, destination, part = key
            shown = (destination or "no destination") + ("" if part is None else f", item {part}")
            counted = self.routes[route]
            counted.before += key in before
            counted.after += key in after
            if key not in before:
                counted.add("gained", event, (f"to {shown}",))
            elif key not in after:
                counted.add("lost", event, (f"to {shown}",))
            elif found := self._request_differences(destination, before[key], after[key], events):
                counted.add("changed", event, (f"to {shown}", *found))

    def _deliveries(self, rules: Rules, event: Event) -> Deliveries:
        if event.source not in rules.sources:
            return {}
        view = EventView.of(event)
        matches = rules.table.match(view)
        errors = {route.name: f"when: {error}" for route, error in matches if error is not None}
        return {
            (delivery.route, delivery.destination, delivery.part and delivery.part.number): (
                rules.routes[delivery.route],
                delivery,
                "" if end is None else errors.get(delivery.route, end.detail),
            )
            for delivery, end, _ in plan(event, view, matches)
        }

    def _read(self, side: int, event: Event) -> Event:
        """Return the event as these rules identify and classify it, if they can."""
        builder = self._builders[side].get(event.source)
        rules = (self._old, self._new)[side]
        if builder is None:
            return event
        path = rules.sources[event.source].path
        request = Request(method="POST", path=path, query=event.query, headers=event.headers, body=event.body)
        try:
            return builder.event(request, received_at=event.received_at)
        except RefusedError:
            return event

    def _request_differences(
        self, destination: str, before: Matched, after: Matched, events: tuple[Event, Event]
    ) -> list[str]:
        """Return where the requests of one delivery differ."""
        has_own = any(route.request or delivery.part is not None or why for route, delivery, why in (before, after))
        is_event = not has_own and events[0] is events[1]
        if is_event and self._old.destinations[destination] == self._new.destinations[destination]:
            return []
        old, new = self._composed(self._old, before), self._composed(self._new, after)
        return list(differences("request", old, new, words=("was", "is")))

    def _composed(self, rules: Rules, matched: Matched) -> dict[str, object]:
        route, delivery, problem = matched
        if problem:
            return {"error": problem}
        try:
            to = rules.destinations[delivery.destination]
            request = compose(delivery, to, route.request, now=self._now, split=route.split)
        except ExpressionError as error:
            return {"error": str(error)}
        return _shown_request(request)


def _shown_request(request: Outbound) -> dict[str, object]:
    headers = {
        header_text(name).lower(): header_text(value)
        for name, value in request.headers
        if header_text(name).lower() not in CHANGING_HEADERS
    }
    return {
        "method": str(request.method),
        "url": request.address,
        "headers": headers,
        "body": body_of(request),
    }


def events_in(path: Path) -> Iterator[Event]:
    """Yield the events in a file: lines of JSON as `gateway events show --json` prints them. Raises UsageError."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            if not line.strip():
                continue
            try:
                yield _event_of(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError):
                expected = "expected an event as `gateway events show --json` prints it"
                raise UsageError(f"{path}:{number}: {expected}, got something else") from None


def _event_of(fields: Mapping[str, Any]) -> Event:
    given = captured_event(fields)
    return Event(
        id=EventId(str(fields["id"])),
        source=given.source,
        type=str(fields["type"]),
        key=None if fields.get("key") is None else str(fields["key"]),
        received_at=datetime.fromisoformat(str(fields["at"])).timestamp() if fields.get("at") else 0.0,
        headers=given.headers,
        query=given.query,
        body=given.body,
    )


@contextmanager
def rule_file_of(name: str) -> Iterator[Path]:
    """Give a rule file: a path, or `REVISION:PATH` of Git, whose folder is written to a temporary one meanwhile.

    Raises UsageError.
    """
    path = Path(name)
    revision, colon, inside = name.partition(":")
    if path.exists() or not colon or not revision:
        yield path
        return
    root = _git("rev-parse", "--show-toplevel").decode().strip()
    folder = str(Path(inside).parent)
    try:
        commit = _git("-C", root, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    except UsageError:
        raise UsageError(f"{name}: expected a revision of Git before the colon, got {revision!r}") from None
    archive = _git(
        "-C", root, "archive", "--format=tar", commit.decode().strip(), "--", *([] if folder == "." else [folder])
    )
    with TemporaryDirectory(prefix="gateway-diff-") as target:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(target, filter="data")
        found = Path(target) / inside
        if not found.exists():
            raise UsageError(f"{name}: expected a rule file in that revision, got none")
        yield found


def _git(*arguments: str) -> bytes:
    try:
        done = subprocess.run(  # noqa: S603 - of the user's own arguments, none of which is an option
            ["git", *arguments],  # noqa: S607 - the user's
            capture_output=True,
            check=False,
            timeout=GIT_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"git {' '.join(arguments)}: {error}") from error
    if done.returncode:
        raise UsageError(f"git {' '.join(arguments)}: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout
