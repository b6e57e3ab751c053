"""`gateway diff`: what other rules would do with the same events, a route at a time."""

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import orjson

from gateway.bodies.redaction import HIDDEN, Redaction
from gateway.client.echoes import Echoes
from gateway.client.request import Outbound, compose
from gateway.engine.deliveries_of_event import plan_as_attempted
from gateway.model import Delivery, Event, EventId, ExpressionError, RefusedError, UsageError, identity_of
from gateway.ops.rule_documents import rule_documents
from gateway.ops.rule_tests import NONE, Difference, body_of, differing, lasting_headers, refusal
from gateway.rules.event_builder import EventBuilder
from gateway.rules.event_view import EventView
from gateway.rules.rule_tests import captured_event
from gateway.rules.rules import Destination, DestinationAccess, Route, Rules
from gateway.rules.watch import Changes, changes
from gateway.rules.yaml_document import Node, reason_of
from gateway.verify.request import Request

MAX_SAMPLES = 3
MAX_LINE = 64 << 20  # bytes of an event in a file
GIT_TIMEOUT = 60.0
STDIN = Path("-")
"""In the place of a file of events."""
_KINDS_OF_ACCESS = (("oauth2", "auth"), ("tls", "tls"), ("proxy", "proxy"))
"""How a destination is reached beside its URL: fields of its `access`, each with its key in a rule file."""

Matched = tuple[Route, Delivery, str]
"""A route that takes an event, its delivery, and why that ends without an attempt, "" if it doesn't."""
Deliveries = dict[tuple[str, str, int | None], Matched]
"""Those of an event, by route and destination, and of a split the item."""


@dataclass(slots=True)
class RouteDiff:
    """What becomes of a route's deliveries. `samples` are, by kind of change, some events' ids and what differs.

    `worst` of those that are gained would be dead letters: these are shown first.
    """

    before: int = 0
    after: int = 0
    gained: int = 0
    lost: int = 0
    changed: int = 0
    worst: int = 0
    samples: dict[str, list[tuple[str, tuple[str, ...]]]] = field(default_factory=dict)

    @property
    def is_changed(self) -> bool:
        return bool(self.gained or self.lost or self.changed)

    def is_shown(self, kind: str, *, is_worst: bool = False) -> bool:
        """Return whether a change of this kind would be one of the samples."""
        return (self.worst if is_worst else len(self.samples.get(kind, ()))) < MAX_SAMPLES

    def add(self, kind: str, event: Event, what: tuple[str, ...], *, is_worst: bool = False) -> None:
        """Count a change. One that is the worst of its kind is shown instead of another."""
        setattr(self, kind, getattr(self, kind) + 1)
        if not self.is_shown(kind, is_worst=is_worst):
            return
        samples, at = self.samples.setdefault(kind, []), self.worst
        self.worst += is_worst
        samples.insert(at if is_worst else len(samples), (event.id, what))
        del samples[MAX_SAMPLES:]


class _Made(NamedTuple):
    """A request as it is compared, or the error instead; `has_own` body of the event, which no template wrote."""

    fields: dict[str, object]
    has_own: bool = False


class _Seen:
    """What people may see of an event, where it is shown: without what the old or the new rules hide."""

    def __init__(self, redaction: Redaction | None, event: Event) -> None:
        hidden = None if redaction is None else redaction.of(event.headers, event.query, event.body)
        self.text = Echoes(*(() if hidden is None else (hidden,))).text
        self._body: object = None
        self._is_part = hidden is not None and hidden.body != event.body
        if hidden is not None and self._is_part:
            self._body = HIDDEN if hidden.body == HIDDEN.encode() else orjson.loads(hidden.body)

    def difference(self, found: Difference, *, is_own: tuple[bool, bool]) -> str:
        """Return what differs in two requests; `is_own` is of which of them the body is the event's own."""
        steps, values = found.steps, [found.one, found.other]
        if self._is_part and steps[:1] == ("body",):
            for side in [side for side in (0, 1) if is_own[side] and values[side] is not NONE]:
                depth, value = self._within(steps[1:])
                values[side] = value
                if depth < len(steps) - 1:  # its own fields are hidden, too
                    steps, values = steps[: depth + 1], [HIDDEN, HIDDEN]
        return Difference(steps, *values).text("request", ("was", "is"), self.text)

    def _within(self, steps: Sequence[str | int]) -> tuple[int, object]:
        """Return how far steps lead into the event's body, and what may be seen of what is there."""
        value = self._body
        for depth, step in enumerate(steps):
            if isinstance(value, dict):
                value = value.get(step, HIDDEN)
            elif isinstance(value, list) and isinstance(step, int):
                value = value[step] if step < len(value) else HIDDEN
            else:
                return depth, HIDDEN
        return len(steps), value


class RuleDiff:
    """Compares two versions of the rules, whose files are read for it, and event by event what they do."""

    def __init__(self, old: Rules, new: Rules, *, now: float) -> None:
        self.changes = _changes(old, new)
        """What differs in the rules, also what no request shows, such as how often it is tried."""
        self.events = 0
        self.refused = 0
        """How many events the ingress would refuse by the new rules alone."""
        self.unrouted: Counter[str] = Counter()
        """How many events no route takes, `before` and `after`; a refused one isn't among the latter."""
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
        hidden = dict(old.redactions)
        self._hidden = hidden | {name: each.joined(hidden.get(name)) for name, each in new.redactions.items()}

    @property
    def is_changed(self) -> bool:
        """Whether anything differs: a delivery, what the ingress takes, or the rules themselves."""
        listed = self.changes.added or self.changes.changed or self.changes.removed
        return bool(listed or self.refused or any(route.is_changed for route in self.routes.values()))

    def add(self, event: Event) -> None:
        """Compare what both versions would do with an event."""
        self.events += 1
        is_read_alike = event.source in self._same_source
        old, new = (event, event) if is_read_alike else (self._read(0, event), self._read(1, event))
        if isinstance(old, RefusedError):  # it was taken all the same: with others in a request, or by other rules
            old, new = event, event if isinstance(new, RefusedError) else new
        # Each with a view of its own, since the expressions over one view have a common limit.
        before = self._deliveries(self._old, old)
        self.unrouted["before"] += not before
        if isinstance(new, RefusedError):
            self.refused += 1
            for route, destination, part in before:
                counted = self.routes[route]
                counted.before += 1
                why = self._seen(event).text(refusal(new)) if counted.is_shown("lost") else ""
                counted.add("lost", event, (f"to {_shown(destination, part)}", why))
            return
        after = self._deliveries(self._new, new)
        self.unrouted["after"] += not after
        for key in before | after:
            self._compare(event, key, before, after, (old, new))

    def _compare(
        self,
        event: Event,
        key: tuple[str, str, int | None],
        before: Deliveries,
        after: Deliveries,
        events: tuple[Event, Event],
    ) -> None:
        route, destination, part = key
        counted, to = self.routes[route], f"to {_shown(destination, part)}"
        counted.before += key in before
        counted.after += key in after
        if key not in before:
            error = self._composed(self._new, after[key]).fields.get("error")
            if error and counted.is_shown("gained", is_worst=True):
                to = f"{to} (dead letter: {self._seen(event).text(str(error))})"
            counted.add("gained", event, (to,), is_worst=bool(error))
        elif key not in after:
            counted.add("lost", event, (to,))
        else:
            made = self._both_made(destination, before[key], after[key], events)
            if made is None:
                return
            found = differing(made[0].fields, made[1].fields)
            access = self._access_differences(destination, made)
            if not counted.is_shown("changed"):  # the first difference is enough
                if access or next(found, None) is not None:
                    counted.add("changed", event, (to,))
            elif (different := list(found)) or access:
                seen, is_own = self._seen(event), (made[0].has_own, made[1].has_own)
                texts = dict.fromkeys([seen.difference(each, is_own=is_own) for each in different])
                counted.add("changed", event, (to, *texts, *access))

    def _seen(self, event: Event) -> _Seen:
        return _Seen(self._hidden.get(event.source), event)

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
            for delivery, end, *_ in plan_as_attempted(event, view, matches)
        }

    def _read(self, side: int, event: Event) -> Event | RefusedError:
        """Return the event as these rules identify and classify it, or why they refuse it.

        Where they find no identity, it keeps its id.
        """
        builder = self._builders[side].get(event.source)
        rules = (self._old, self._new)[side]
        if builder is None:
            return event
        path = rules.sources[event.source].path
        request = Request(method="POST", path=path, query=event.query, headers=event.headers, body=event.body)
        try:
            read = builder.event(request, received_at=event.received_at)
        except RefusedError as error:
            return error
        return replace(read, id=event.id) if identity_of(read.id) is None else read

    def _both_made(
        self, destination: str, before: Matched, after: Matched, events: tuple[Event, Event]
    ) -> tuple[_Made, _Made] | None:
        """Return both requests of one delivery; None if they are the same by what they are made of."""
        has_own = any(route.request or delivery.part is not None or why for route, delivery, why in (before, after))
        is_event = not has_own and events[0] is events[1]
        if is_event and self._old.destinations.get(destination) == self._new.destinations.get(destination):
            return None
        return self._composed(self._old, before), self._composed(self._new, after)

    def _access_differences(self, destination: str, made: tuple[_Made, _Made]) -> list[str]:
        """Return how both requests are made otherwise, if both are made."""
        old, new = [rules.destinations.get(destination) for rules in (self._old, self._new)]
        if old is None or new is None or any("error" in each.fields for each in made):
            return []
        return list(_access_differences(old, new))

    def _composed(self, rules: Rules, matched: Matched) -> _Made:
        route, delivery, problem = matched
        if problem:
            return _Made({"error": problem})
        to = rules.destinations[delivery.destination]
        try:
            request = compose(delivery, to, route.request, now=self._now, split=route.split)
        except ExpressionError as error:
            return _Made({"error": str(error)})
        return _Made(_shown_request(request, is_signed=bool(to.sign)), request.body == delivery.event.body)


def _changes(old: Rules, new: Rules) -> Changes:
    """Return what differs in the rules, also where another reference is written: it may have the same placeholder."""
    found = changes(old, new)
    if old.version == new.version:
        return found
    keys = {entry.partition(": ")[0]: entry.partition(": ")[2].split(", ") for entry in found.changed}
    before, after = _references(old), _references(new)
    for name in [name for name in after if name in before]:
        for key in dict.fromkeys([*before[name], *after[name]]):
            if before[name].get(key, []) != after[name].get(key, []) and key not in keys.setdefault(name, []):
                keys[name].append(key)
    return replace(found, changed=tuple([f"{name}: {', '.join(of_name)}" for name, of_name in keys.items() if of_name]))


def _references(rules: Rules) -> dict[str, dict[str, list[str]]]:
    """Return what is written with a reference in each source and each destination, by key."""
    found: dict[str, dict[str, list[str]]] = {}
    for _, root in rule_documents(rules.files):
        for what, node in _named(root):
            found[what] = {key: list(_referring(child)) for key, child in _members(node)}
    return found


def _named(root: Node) -> Iterator[tuple[str, Node]]:
    """Yield the sources and destinations of a file, also those that stand in `to` of a route."""
    for kind in ("source", "destination"):
        yield from [(f"{kind} {name}", node) for name, node in _members(root.child(f"{kind}s"))]
    for route in _items(root.child("routes")):
        to = route.child("to")
        for node in (to, *_items(to)):
            if node is not None and (name := node.child("name")) is not None:
                yield f"destination {name.value}", node


def _members(node: Node | None) -> Iterable[tuple[str, Node]]:
    return sorted(node.value.items()) if node is not None and isinstance(node.value, dict) else ()


def _items(node: Node | None) -> Iterable[Node]:
    return node.value if node is not None and isinstance(node.value, list) else ()


def _referring(node: Node) -> Iterator[str]:
    if isinstance(node.value, str) and "${" in node.value:
        yield node.value
    for child in (*[child for _, child in _members(node)], *_items(node)):
        yield from _referring(child)


def _shown(destination: str, part: int | None) -> str:
    return (destination or "no destination") + ("" if part is None else f", item {part}")


def _shown_request(request: Outbound, *, is_signed: bool) -> dict[str, object]:
    return {
        "method": str(request.method),
        "url": request.address,
        "headers": {name.lower(): value for name, value in lasting_headers(request.headers, is_signed=is_signed)},
        "body": body_of(request),
    }


def _access_differences(old: Destination, new: Destination) -> Iterator[str]:
    """Yield which kinds of credentials and access differ, without what they are: each may be a secret."""
    before, after = old.access or DestinationAccess(), new.access or DestinationAccess()
    for kind, key in _KINDS_OF_ACCESS:
        was, is_ = getattr(before, kind), getattr(after, kind)
        if was != is_:
            end = "none" if is_ is None else f"another {kind}" if was is not None else kind
            yield f"{key}: was {'none' if was is None else kind}, is {end}"


def events_in(path: Path) -> Iterator[Event]:
    """Yield the events in a file: lines of JSON as `gateway events show --json` prints them. Raises UsageError."""
    try:
        file = sys.stdin.buffer if path == STDIN else path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: expected a file of events, got: {reason_of(error)}") from error
    with file:
        lines = iter(lambda: file.readline(MAX_LINE), b"")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _event_of(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError):
                expected = "expected an event as `gateway events show --json` prints it"
                raise UsageError(f"{path}:{number}: {expected}") from None


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
    if path.exists():
        yield path
        return
    if not colon or not revision:
        named = name.strip(":") or "HEAD"
        raise UsageError(
            f"{name}: expected a rule file, or REVISION:PATH of Git as in {named}:routes.yaml, got no file"
        )
    if Path(inside).is_absolute():
        raise UsageError(f"{name}: expected a path from the repository's root after the colon, got an absolute one")
    root = _git("rev-parse", "--show-toplevel").decode().strip()
    folder = str(Path(inside).parent)
    try:
        found = _git("-C", root, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    except UsageError:
        raise UsageError(f"{name}: expected a revision of Git before the colon, got {revision!r}") from None
    commit = found.decode().strip()
    expected = "expected a rule file in that revision, by its path from the repository's root"
    try:
        _git("-C", root, "cat-file", "-e", f"{commit}:{Path(inside).as_posix()}")
    except UsageError:
        raise UsageError(f"{name}: {expected}, got none") from None
    archive = _git("-C", root, "archive", "--format=tar", commit, "--", *([] if folder == "." else [folder]))
    with TemporaryDirectory(prefix="gateway-diff-") as target:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(target, filter=_within)  # noqa: S202 - as Python's own filter does it
        file = Path(target) / inside
        if not file.is_file():
            raise UsageError(f"{name}: {expected}")
        yield file


def _within(member: tarfile.TarInfo, target: str) -> tarfile.TarInfo | None:
    """Leave out what isn't within the folder, such as a link to a place that other machines haven't."""
    try:
        return tarfile.data_filter(member, target)
    except tarfile.FilterError:
        return None


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
