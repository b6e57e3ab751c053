"""When files that change are read again, and what new rules change: pure; `run.py` has the clock and the disk."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from gateway.rules.rules import Access, Destination, Egress, Route, Rules, Source

Stamp = tuple[int, int, int]
"""What changes with a file's content."""
Stamps = Mapping[Path, Stamp | None]
"""None for a file that isn't there."""

PATIENCE = 10
"""Looks after which files that never rest are read all the same."""


class Watch:
    """Looks at files, a second apart. Those that have changed are read once they rest: who writes them may be at it.

    A file that is cut where it is still valid YAML is a rule file with fewer routes.
    """

    def __init__(self, read: Stamps) -> None:
        self._read = read
        self._before: Stamps | None = None
        self._looks = 0

    def is_due(self, stamps: Stamps) -> bool:
        """Return whether to read the files: they aren't what was read, and are the same as at the look before."""
        if stamps == self._read:
            self._before, self._looks = None, 0
            return False
        is_at_rest = stamps == self._before
        self._before = stamps
        self._looks += 1
        return is_at_rest or self._looks > PATIENCE

    @property
    def is_at_rest(self) -> bool:
        """Nothing has changed since the files were read, by the last look."""
        return self._before is None

    def has_read(self, stamps: Stamps) -> None:
        self._read = stamps
        self._before, self._looks = None, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Rules that weren't put in force. Times are Unix seconds.

    `since` is the last look, by the log's clock, at which the files were still those in force: what an event since then
    has missed, it has missed by this. `until` is when rules were taken again, None while they aren't. `changed_at` is
    the time of the file with the first problem.
    """

    since: float
    file: str
    changed_at: float | None
    problems: tuple[str, ...]
    until: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Routes that went at once, or in several `reloads`, `of` so many that there were. `since` is as in `Refusal`."""

    since: float
    routes: tuple[str, ...]
    of: int
    reloads: int = 1

    def with_more(self, routes: tuple[str, ...], before: Collection[str]) -> "Loss":
        """Return what went up to another loss of routes, of those that there were before it."""
        return Loss(
            since=self.since,
            routes=tuple(dict.fromkeys([*self.routes, *routes])),
            of=max(self.of, len({*self.routes, *before})),
            reloads=self.reloads + 1,
        )


def lost_routes(old: Rules, new: Rules) -> tuple[str, ...]:
    """Return the routes that are gone, where they are at least half of all and more than one: that is hardly meant."""
    gone = tuple([name for name in old.routes if name not in new.routes])
    return gone if len(gone) > 1 and 2 * len(gone) >= len(old.routes) else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What distinguishes two versions of the rules, such as `route build`.

    What has changed is followed by its keys: `route build: match, retry`. A secret's new value changes its source.
    `touched` tells of which sources the events may fare otherwise, and by which routes of the new rules; `identified`
    of which of them others are copies than before.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    touched: Mapping[str, frozenset[str]] = field(default_factory=dict, compare=False)
    identified: frozenset[str] = field(default=frozenset(), compare=False)


def changes(old: Rules, new: Rules) -> Changes:
    """Return what new rules change. Takes milliseconds for thousands of routes: not for the event loop."""
    return Changes(
        added=tuple(
            [f"{what} {name}" for what, before, after in _kinds(old, new) for name in after if name not in before]
        ),
        changed=tuple(
            [
                f"{what} {name}: {_keys(before[name], after[name])}"
                for what, before, after in _kinds(old, new)
                for name in after
                if name in before and before[name] != after[name]
            ]
            + ([] if old.egress == new.egress else [f"egress: {_keys(old.egress, new.egress)}"])
        ),
        removed=tuple(
            [f"{what} {name}" for what, before, after in _kinds(old, new) for name in before if name not in after]
        ),
        touched=_touched(old, new),
        identified=frozenset(
            [name for name, each in new.sources.items() if _identity(old.sources.get(name)) != _identity(each)]
        ),
    )


def _touched(old: Rules, new: Rules) -> Mapping[str, frozenset[str]]:
    others = {name for name, source in new.sources.items() if old.sources.get(name) != source}
    found: dict[str, set[str]] = {name: set() for name in others}
    for name in old.routes.keys() | new.routes.keys():
        before, after = old.routes.get(name), new.routes.get(name)
        is_other = before is None or after is None or _aim(before) != _aim(after)
        for route in (before, after):
            for source in () if route is None else route.sources:
                if is_other or source in others:
                    found.setdefault(source, set()).update(() if after is None else (name,))
    return {source: frozenset(routes) for source, routes in found.items()}


def _identity(source: Source | None) -> tuple[object, ...] | None:
    """Return what decides which events of a source are copies: a new secret doesn't."""
    if source is None:
        return None
    verifier = source.verifier
    return source.id, source.dedupe, verifier.scheme, verifier.id, verifier.ids


def _aim(route: Route) -> tuple[object, ...]:
    return route.sources, route.match, route.when, route.destinations


_Kind = Source | Destination | Route | Egress
_KEYS: Mapping[str, str] = {
    "verifier": "verify",
    "sources": "from",
    "destinations": "to",
    "oauth2": "auth",
    "is_private_allowed": "private",
}
"""What a field is called in a rule file, where it is called otherwise."""


def _keys(before: _Kind | Access, after: _Kind | Access) -> str:
    """Return the keys of a rule file by which two versions of one thing differ."""
    return ", ".join(dict.fromkeys(_differing(before, after)))


def _differing(before: _Kind | Access, after: _Kind | Access) -> Iterator[str]:
    for each in fields(before):
        old, new = getattr(before, each.name), getattr(after, each.name)
        if not each.compare or old == new:
            continue
        if each.name == "access":
            yield from _differing(old or Access(), new or Access())
        elif each.name == "headers":  # `auth` writes one of them
            changed = {name.lower() for name, _ in set(old) ^ set(new)}
            yield from ["auth"] * ("authorization" in changed)
            yield from ["headers"] * (changed != {"authorization"})
        else:
            yield _KEYS.get(each.name, each.name)


def _kinds(old: Rules, new: Rules) -> Iterator[tuple[str, Mapping[str, _Kind], Mapping[str, _Kind]]]:
    yield "source", old.sources, new.sources
    yield "destination", old.destinations, new.destinations
    yield "route", old.routes, new.routes
