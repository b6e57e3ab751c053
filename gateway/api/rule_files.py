"""The rule files themselves, line by line, without secrets: as they are on the disk of the process that answers."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gateway.access.principal import Principal
from gateway.api.backend import Backend
from gateway.api.overview import Overview
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.shares import whose_turn
from gateway.api.traffic import traffic_of
from gateway.api.traffic_shapes import Traffic
from gateway.api.visibility import sees_named, sees_source
from gateway.ops.rule_file_views import FileView, FileViews, file_views
from gateway.ops.shown_rules import Entry
from gateway.rules.file_stamps import stamps_of
from gateway.rules.rules import Rules
from gateway.turns import give_way

Kind = Literal["source", "destination", "route"]
BEFORE = 20
"""Lines before what is asked for."""
MOST_ROUTES = 200
"""Maximum number of routes whose traffic is shown with their lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleFileSummary:
    """A rule file: its name, how many lines it has, and how many sources, destinations and routes."""

    file: str
    lines: int
    sources: int
    destinations: int
    routes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleLine:
    """A line, or several up to `last` that aren't shown: `text` is null, and `hidden` says why.

    `kind` and `name` are what begins there: a source, destination or route of the active rules. `traffic` is a
    route's of the last day, if it is asked for; null for all others, and after the first 200 routes.
    """

    number: int
    last: int
    text: str | None
    hidden: str | None
    kind: Kind | None
    name: str | None
    traffic: Traffic | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleFile:
    """Some lines of a rule file. `number` is which of the `files` it is, from 0 on, the first being the root.

    `is_in_force`: what is on the disk are the active rules. `found` is the line at which what was asked for begins.
    `next_line` is where the file goes on, null at its end. `problem` is why none of its lines is shown.
    """

    number: int
    files: tuple[RuleFileSummary, ...]
    is_in_force: bool
    lines: tuple[RuleLine, ...]
    found: int | None
    next_line: int | None
    problem: str | None


async def get_rule_file(
    backend: Backend,
    principal: Principal,
    *,
    number: int = 0,
    line: int = 1,
    limit: int = 200,
    kind: Kind | None = None,
    name: str | None = None,
    traffic: bool = False,
) -> RuleFile:
    """Return lines of a rule file: from one on, or about a source, destination or route; without secrets."""
    rules = backend.rules()
    overview, views = await backend.overview(rules), await views_of(backend, rules)
    found: int | None = None
    if kind is not None and name is not None:
        place = views.place_of(kind, name)
        if place is None or not _sees(principal, rules, overview, kind, name):
            raise not_found(f"a {kind} in the rule files")
        number, found = place.file, place.entry.first
        line = max(1, found - BEFORE)
    elif (kind is None) is not (name is None):
        raise ApiError(Code.INVALID_REQUEST, "kind, name: expected both, or neither, got one")
    if number >= len(views.files):
        raise not_found("a rule file")
    view = views.files[number]
    who = whose_turn(principal)
    if principal.is_limited:  # of all that the file has it is looked at whose it is
        mine = await backend.aside(who, lambda: _seen_entries(principal, rules, overview, view))
        if number and not mine:  # the root has everybody's
            raise not_found("a rule file")
        entries = view.shown.entries
        lines, following = await backend.aside(
            who, lambda: _lines(rules, view, line, limit, _seen_lines(mine, entries))
        )
        summaries = [_summary(view, mine)]
    else:
        lines, following = _lines(rules, view, line, limit, None)
        summaries = [_summary(each, each.shown.entries) for each in views.files]
    if traffic:
        names = [each.name for each in lines if each.kind == "route" and each.name is not None][:MOST_ROUTES]
        its = await traffic_of(backend, principal, "route", names)
        lines = tuple(
            [replace(each, traffic=its.get(each.name or "")) if each.kind == "route" else each for each in lines]
        )
    return RuleFile(
        number=number,
        files=tuple(summaries),
        is_in_force=views.version == rules.version,
        lines=lines,
        found=found,
        next_line=following,
        problem=view.shown.problem or None,
    )


async def views_of(backend: Backend, rules: Rules) -> FileViews:
    """Return the rule files as they are now; those that were read last, unless one has changed."""
    root = Path(backend.rules_status()["file"])
    async with backend.reading_files:
        kept = backend.file_views
        if kept is None or await asyncio.to_thread(stamps_of, kept.stamps) != kept.stamps or kept.files[0].path != root:
            kept = backend.file_views = await backend.aside("", lambda: file_views(root, rules.files))
        return kept


def _summary(view: FileView, entries: Sequence[Entry]) -> RuleFileSummary:
    kinds = [each.kind for each in entries]
    return RuleFileSummary(
        file=str(view.path),
        lines=len(view.shown.lines),
        sources=kinds.count("source"),
        destinations=kinds.count("destination"),
        routes=kinds.count("route"),
    )


def _sees(principal: Principal, rules: Rules, overview: Overview, kind: str, name: str) -> bool:
    """Return whether a principal sees something that is written in a file: with limits, only what is in force."""
    if not principal.is_limited:
        return True
    match kind:
        case "source":
            return name in rules.sources and sees_source(principal, rules, name)
        case "destination":
            return name in rules.destinations and sees_named(principal, rules, kind, name, overview.sources_of[name])
        case _:
            route = rules.routes.get(name)
            return route is not None and sees_named(principal, rules, "route", name, route.sources)


_TESTS = "tests, which may have bodies of events"
_OTHERS = "not yours"


def _lines(
    rules: Rules, view: FileView, line: int, limit: int, is_theirs: set[int] | None
) -> tuple[tuple[RuleLine, ...], int | None]:
    """Return so many lines from one on, and where the file goes on after them."""
    shown = view.shown
    begins = {entry.first: entry for entry in shown.entries}
    tests = shown.tests or (0, 0)
    found: list[RuleLine] = []
    number, end = line, len(shown.lines)
    while number <= end and len(found) < limit:
        why = _TESTS if tests[0] <= number <= tests[1] else ""
        if not why and is_theirs is not None and number not in is_theirs:
            why = _OTHERS
        if why:
            last = number
            while last < end and _is_hidden(last + 1, why, tests, is_theirs):
                last += 1
            found.append(RuleLine(number=number, last=last, text=None, hidden=why, kind=None, name=None))
            number = last + 1
            continue
        kind, name = _named(rules, begins.get(number))
        found.append(
            RuleLine(number=number, last=number, text=shown.lines[number - 1], hidden=None, kind=kind, name=name)
        )
        number += 1
    return tuple(found), number if number <= end else None


def _is_hidden(number: int, why: str, tests: tuple[int, int], is_theirs: set[int] | None) -> bool:
    is_test = tests[0] <= number <= tests[1]
    return is_test if why is _TESTS else not is_test and is_theirs is not None and number not in is_theirs


def _seen_entries(principal: Principal, rules: Rules, overview: Overview, view: FileView) -> Sequence[Entry]:
    """Return what somebody with limits sees of what a file has."""
    found = []
    for entry in view.shown.entries:
        give_way()
        if _sees(principal, rules, overview, entry.kind, entry.name):
            found.append(entry)
    return found


def _seen_lines(seen: Sequence[Entry], entries: Sequence[Entry]) -> set[int]:
    """Return the lines of what is seen, without those that something else is on, too."""
    mine = set(seen)
    of_mine, of_others = set[int](), set[int]()
    for entry in entries:
        give_way()
        (of_mine if entry in mine else of_others).update(range(entry.first, entry.last + 1))
    return of_mine - of_others


def _named(rules: Rules, entry: Entry | None) -> tuple[Kind | None, str | None]:
    """Return what begins at a line, if the active rules have it."""
    match entry:
        case Entry(kind="source", name=name) if name in rules.sources:
            return "source", name
        case Entry(kind="destination", name=name) if name in rules.destinations:
            return "destination", name
        case Entry(kind="route", name=name) if name in rules.routes:
            return "route", name
        case _:
            return None, None
