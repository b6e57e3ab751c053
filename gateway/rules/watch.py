"""Decides when to read changed files again, and tells what new rules change. No I/O: that is in `reload.py`."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

from gateway.rules.eligibility import Eligibility
from gateway.rules.file_stamps import Stamps
from gateway.rules.precedence import deciders
from gateway.rules.rules import Destination, DestinationAccess, Egress, Route, Rules, Source
from gateway.turns import give_way

MAX_UNSTABLE_LOOKS = 10
"""Files that keep changing are read anyway after this many observations."""


class Watch:
    """Observes files every second. Changed files are read once they are stable, since they may still be being written.

    A truncated file may be valid YAML: a rule file with fewer routes.
    """

    def __init__(self, read: Stamps) -> None:
        self._read = read
        self._before: Stamps | None = None
        self._looks = 0

    def observe(self, stamps: Stamps) -> bool:
        """Return whether to read the files: they differ from those last read, and are unchanged since the last call."""
        if stamps == self._read:
            self._before, self._looks = None, 0
            return False
        is_at_rest = stamps == self._before
        self._before = stamps
        self._looks += 1
        return is_at_rest or self._looks > MAX_UNSTABLE_LOOKS

    @property
    def is_at_rest(self) -> bool:
        """Whether the files were unchanged since they were read, at the last observation."""
        return self._before is None

    def mark_read(self, stamps: Stamps) -> None:
        self._read = stamps
        self._before, self._looks = None, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Rules that were refused. Times are Unix seconds.

    `since` is when the files were last seen to be the active ones, by the log's clock: events since then may have
    missed the new rules. `until` is when rules were accepted again, None before. `changed_at` is the modification time
    of the file with the first problem.
    """

    since: float
    file: str
    changed_at: float | None
    problems: tuple[str, ...]
    until: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Routes removed by one reload or several `reloads`, out of a total of `of`. `since` is as in `Refusal`."""

    since: float
    routes: tuple[str, ...]
    of: int
    reloads: int = 1

    def with_more(self, routes: tuple[str, ...], before: Collection[str]) -> "Loss":
        """Combine this loss with another one. `before` are the routes that existed before that one."""
        return Loss(
            since=self.since,
            routes=tuple(dict.fromkeys([*self.routes, *routes])),
            of=max(self.of, len({*self.routes, *before})),
            reloads=self.reloads + 1,
        )


def lost_routes(old: Rules, new: Rules) -> tuple[str, ...]:
    """Return the removed routes if they are several and at least half of all, which is hardly intended."""
    gone = tuple([name for name in old.routes if name not in new.routes])
    return gone if len(gone) > 1 and 2 * len(gone) >= len(old.routes) else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The differences between two versions of the rules, such as `route build`.

    `changed` entries include the keys: `route build: match, retry`. A secret's new value changes its source. `touched`
    are the sources whose events may be routed differently, with the new rules' routes. `identified` are the sources
    for which different events are duplicates. `conditions` are the new rules' routes that may match other events.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    touched: Mapping[str, frozenset[str]] = field(default_factory=dict, compare=False)
    identified: frozenset[str] = field(default=frozenset(), compare=False)
    conditions: frozenset[str] = field(default=frozenset(), compare=False)


def changes(old: Rules, new: Rules) -> Changes:
    """Compare two versions of the rules. It takes milliseconds for many routes: don't call it on the event loop."""
    decided = _decided_otherwise(old, new)
    return Changes(
        added=tuple(
            [f"{what} {name}" for what, before, after in _kinds(old, new) for name in after if name not in before]
        ),
        changed=tuple(
            [
                f"{what} {name}: {_keys(before[name], after[name])}"
                for what, before, after in _kinds(old, new)
                for name in after
                if name in before and _differ(before[name], after[name])
            ]
            + [
                f"route {name}: what others take before it"
                for name in sorted(decided)
                if not _differ(old.routes[name], new.routes[name])
            ]
            + ([] if old.egress == new.egress else [f"egress: {_keys(old.egress, new.egress)}"])
            + ([f"ingress: {', '.join(ingress)}"] if (ingress := _ingress_keys(old, new)) else [])
        ),
        removed=tuple(
            [f"{what} {name}" for what, before, after in _kinds(old, new) for name in before if name not in after]
        ),
        touched=_touched(old, new, decided),
        identified=frozenset(
            [name for name, each in new.sources.items() if _identity(old.sources.get(name)) != _identity(each)]
        ),
        conditions=_with_other_conditions(old, new) | decided,
    )


def _ingress_keys(old: Rules, new: Rules) -> Sequence[str]:
    keys = ("trusted_proxies", "certificate_header")
    return [key for key in keys if getattr(old, key) != getattr(new, key)]


def _touched(old: Rules, new: Rules, decided: frozenset[str]) -> Mapping[str, frozenset[str]]:
    others = {name for name, source in new.sources.items() if old.sources.get(name) != source}
    found: dict[str, set[str]] = {name: set() for name in others}
    for name in old.routes.keys() | new.routes.keys():
        give_way()
        before, after = old.routes.get(name), new.routes.get(name)
        is_other = before is None or after is None or _aim(before) != _aim(after) or name in decided
        for route in (before, after):
            for source in () if route is None else route.sources:
                if is_other or source in others:
                    found.setdefault(source, set()).update(() if after is None else (name,))
    return {source: frozenset(routes) for source, routes in found.items()}


def _with_other_conditions(old: Rules, new: Rules) -> frozenset[str]:
    others = {name for name, source in new.sources.items() if _fields(old.sources.get(name)) != _fields(source)}
    found: set[str] = set()
    for name, after in new.routes.items():
        give_way()
        before = old.routes.get(name)
        is_other = before is None or _condition(before) != _condition(after)
        if is_other or not others.isdisjoint(after.sources):
            found.add(name)
    return frozenset(found)


def _decided_otherwise(old: Rules, new: Rules) -> frozenset[str]:
    """Return the routes that get different events because of changes to other routes (`stop`, `catch_all`)."""
    before, after = deciders(old.routes.values()), deciders(new.routes.values())
    return frozenset([name for name in new.routes if name in old.routes and before.get(name) != after.get(name)])


def _fields(source: Source | None) -> tuple[object, ...] | None:
    """Return the settings that determine the fields of a source's events to which conditions refer."""
    return None if source is None else (source.id, source.type, source.key, source.verifier.type)


def _condition(route: Route) -> tuple[object, ...]:
    return route.sources, route.match, route.when, route.eligibility, route.stop, route.catch_all


def _identity(source: Source | None) -> tuple[object, ...] | None:
    """Return the settings that decide which events of a source are duplicates. Secrets don't."""
    if source is None:
        return None
    verifier = source.verifier
    return source.id, source.dedupe, verifier.scheme, verifier.id, verifier.ids


def _aim(route: Route) -> tuple[object, ...]:
    return *_condition(route), route.destinations, route.choice


_Kind = Source | Destination | Route | Egress
_Differing = _Kind | DestinationAccess | Eligibility
_KEYS: Mapping[str, str] = {
    "verifier": "verify",
    "sources": "from",
    "destinations": "to",
    "choice": "to",
    "response": "respond",
    "oauth2": "auth",
    "is_private_allowed": "private",
}
"""The rule file's names of fields with another name in code."""


def _differ(before: _Kind, after: _Kind) -> bool:
    give_way()
    return before != after


def _keys(before: _Kind, after: _Kind) -> str:
    """Return the keys, as in the rule file, in which two versions of an object differ."""
    return ", ".join(dict.fromkeys(_differing(before, after)))


def _differing(before: _Differing, after: _Differing) -> Iterator[str]:
    for each in fields(before):
        old, new = getattr(before, each.name), getattr(after, each.name)
        if not each.compare or old == new:
            continue
        if each.name == "fixed":
            continue  # `to` has it
        if each.name == "access":
            yield from _differing(old or DestinationAccess(), new or DestinationAccess())
        elif each.name == "eligibility":
            yield from _differing(old or Eligibility(), new or Eligibility())
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
