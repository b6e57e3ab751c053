"""The overview: what is wrong first, each with the next step; then how much of the last hour and day isn't well."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gateway.api import dead_letters as dead_api
from gateway.api import events as event_api
from gateway.api import findings as finding_api
from gateway.api import names as api
from gateway.api import shapes
from gateway.api import spools as spool_api
from gateway.api.problems import ApiError
from gateway.console.asking import Asking
from gateway.console.dead_letter_pages import REASONS
from gateway.console.page import Given, Page
from gateway.console.text import address, plural
from gateway.console.traffic import periods

COUNTED = 200
"""Events up to which a figure is exact; beyond, it is told as more."""
STOPPED = 50
PERIODS = (("", "Now"), ("1h", "Last hour"), ("24h", "Last day"))
"""Of which events; "" is of all that the index has."""
ROWS = (
    ("dead", "Dead", "dead"),
    ("waiting", "Waiting", "parked,retrying,pending"),
    ("unknown", "Unknown", "unknown"),
)
"""Status as the page of events calls it, as people do, and as the query language does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """Something that is wrong: what, why, and the next step. `kind` is how it is marked.

    `steps` are more of them: commands, and comments that begin with `#`. Without a `path`, no page has more.
    """

    kind: str
    what: str
    why: str
    since: str | None
    until: str | None
    path: str
    step: str = ""
    steps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """How many events; `is_more`: at least so many."""

    count: int
    is_more: bool
    path: str


async def overview(asking: Asking, _: Given) -> Page:
    """Show what is wrong, and how things are."""
    rules = await asking.ask(api.get_rules)
    # At once: each of them may wait for as long as a log that doesn't respond is waited for.
    stopped, paused, letters, index, seen, spools = await asyncio.gather(
        asking.try_asking(api.list_destinations, stopped=True, limit=STOPPED),
        asking.try_asking(api.list_routes, stopped=True, limit=STOPPED),
        asking.try_asking(dead_api.list_dead_letters, limit=COUNTED),
        asking.try_asking(event_api.get_index),
        asking.try_asking(finding_api.list_findings),
        asking.try_asking(spool_api.list_spools),
    )
    problems = {
        each.detail: each for each in (stopped, paused, letters, index, seen, spools) if isinstance(each, ApiError)
    }
    shown = [] if isinstance(seen, ApiError) else of_log(seen)
    stored = () if isinstance(spools, ApiError) else spools.items
    wrong = [
        *refused(rules),
        *of_spools(stored),
        *[each for each in shown if each.kind == "bad"],
        *([] if isinstance(stopped, ApiError) else of_destinations(stopped)),
        *([] if isinstance(paused, ApiError) else of_routes(paused)),
        *[each for each in shown if each.kind != "bad"],
        *([] if isinstance(letters, ApiError) else of_letters(letters)),
    ]
    figures = [] if isinstance(index, ApiError) else await _figures(asking)
    values = {
        "rules": rules,
        "wrong": wrong,
        "problems": list(problems.values()),
        "index": None if isinstance(index, ApiError) else index,
        "seen": None if isinstance(seen, ApiError) else seen,
        "others": () if isinstance(seen, ApiError) else of_log(seen, are_wrong=False),
        "spools": [each for each in stored if each.events],
        "figures": figures,
        "traffic": [] if isinstance(index, ApiError) else await periods(asking),
        "periods": PERIODS,
        "is_more": any(not isinstance(each, ApiError) and each.next_cursor for each in (stopped, paused)),
    }
    return Page(template="overview.html", title="Overview", section="overview", values=values)


def refused(rules: shapes.RulesInForce) -> list[Wrong]:
    """Return that the files have rules that aren't in force."""
    if rules.refusal is None:
        return []
    problems = rules.refusal.problems
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    why = f"refused: {problems[0]}{more}" if problems else "refused"
    return [
        Wrong(
            kind="bad",
            what="The rules in the files aren't in force",
            why=why,
            since=rules.refusal.since,
            until=None,
            path=address("rules"),
            step="Correct the files: they are read again by themselves",
        )
    ]


NEARLY_FULL = 0.8
"""Of a spool's nearest limit, as `gateway status` has it."""


def of_spools(spools: Sequence[spool_api.Spool]) -> list[Wrong]:
    """Return which spools take no more, or nearly so, and what isn't moved to the log."""
    found: list[Wrong] = []
    for each in spools:
        whys, step = list[str](), "Bring the log back: they are moved by themselves"
        if each.refuses is not None:
            whys.append(f"accepts no more: {each.refuses}")
        elif each.used > NEARLY_FULL:
            whys.append(f"{each.used:.0%} of its bytes, its age or its disk are used")
        kind = "bad" if whys else "waiting"
        step += "; make room on its disk, or raise --spool-bytes or --spool-days, and never delete it" if whys else ""
        waits = [f"{topic.topic}: {topic.waits}" for topic in each.topics if topic.waits]
        if reasons := [each.waits] if each.waits else waits:
            more = f"; and {len(reasons) - MOST_REASONS} more" if len(reasons) > MOST_REASONS else ""
            whys.append(f"not moved: {'; '.join(reasons[:MOST_REASONS])}{more}")
        if whys:
            what = f"Spool of {each.process}: {plural(each.events, 'event')} on its disk alone"
            why = "; ".join(whys)
            found.append(Wrong(kind=kind, what=what, why=why, since=each.oldest, until=None, path="", step=step))
    return found


MOST_REASONS = 3


def of_destinations(page: shapes.DestinationPage) -> list[Wrong]:
    """Return what holds or pauses destinations, open breakers first."""
    found: list[Wrong] = []
    for each in page.items:
        if each.hold is not None:
            is_breaker = each.hold.why != "retry_after"
            found.append(
                Wrong(
                    kind="open" if is_breaker else "held",
                    what=f"Destination {each.name}",
                    why="its breaker is open: it has failed too often"
                    if is_breaker
                    else "it asked for silence (Retry-After)",
                    since=each.hold.since,
                    until=each.hold.until,
                    path=address("destinations", each.name),
                    step=f"Ask {each.owner}" if each.owner else "Look at what it answers",
                )
            )
        if each.pause is not None:
            found.append(_paused("destination", each.name, each.pause))
    return sorted(found, key=lambda each: each.kind != "open")


def of_routes(page: shapes.RoutePage) -> list[Wrong]:
    """Return which routes are paused."""
    return [_paused("route", each.name, each.pause) for each in page.items if each.pause is not None]


def _paused(kind: str, name: str, pause: shapes.Pause) -> Wrong:
    by = f" by {pause.by}" if pause.by else ""
    return Wrong(
        kind="paused",
        what=f"{kind.capitalize()} {name}",
        why=f"paused{by}" if pause.state == "paused" else "being resumed",
        since=pause.since,
        until=None,
        path=address(f"{kind}s", name),
        step="Resume it once that is over" if pause.state == "paused" else "Wait: what was stored is queued again",
    )


MARKS = {
    "not_read": "bad",
    "paused": "paused",
    "held": "open",
    "waiting": "waiting",
    "source": "held",
    "silent": "unknown",
}
"""How a finding of the log is marked."""


def of_log(found: finding_api.Findings, *, are_wrong: bool = True) -> list[Wrong]:
    """Return what the log shows of all processes: what is wrong, or what else an operator may want to know."""
    return [
        Wrong(
            kind=MARKS[each.kind] if are_wrong else "none",
            what=_titled(each),
            why=each.why,
            since=each.since,
            until=None if each.is_due else each.until,
            path=_path_of(each),
            steps=each.steps,
        )
        for each in found.items
        if each.needs_attention is are_wrong
    ]


def _titled(finding: finding_api.Finding) -> str:
    """Return what a finding is about, names and topics as they are; and of how many, unless its reason says that."""
    kind, blank, name = finding.what.partition(" ")
    is_kind = kind in ("source", "sources", "route", "destination")
    what = f"{kind.capitalize()}{blank}{name}" if is_kind else finding.what
    return what if finding.count is None or finding.why[:1].isdecimal() else f"{what}: {finding.count:,}"


def _path_of(finding: finding_api.Finding) -> str:
    """Return the page that has more of a finding; "" if there is none."""
    if finding.destination:
        return address("destinations", finding.destination)
    if finding.route:
        return address("routes", finding.route)
    return address("sources", finding.source) if finding.source else ""


def of_letters(page: shapes.DeadLetterPage) -> list[Wrong]:
    """Return the open dead letters, by destination and reason."""
    groups: dict[tuple[str | None, str], list[shapes.DeadLetter]] = {}
    for letter in page.items:
        groups.setdefault((letter.destination, letter.reason), []).append(letter)
    more = "At least " if page.next_cursor else ""
    return [
        Wrong(
            kind="dead",
            what=f"{more}{plural(len(letters), 'dead letter')}{f' for {destination}' if destination else ''}",
            why=f"{REASONS.get(reason, reason)}; the last: {_last_of(letters[0])}",
            since=letters[-1].at,
            until=None,
            path=address("dead-letters", destination=destination, reason=reason),
            step="Repair the cause, then replay or drop them",
        )
        for (destination, reason), letters in sorted(groups.items(), key=lambda each: -len(each[1]))
    ]


def _last_of(letter: shapes.DeadLetter) -> str:
    return letter.last_result or letter.detail or "no attempt"


async def _figures(asking: Asking) -> list[tuple[str, str, list[Figure | None]]]:
    """Return how many events have which status, by period; None where that can't be asked."""
    rows: list[tuple[str, str, list[Figure | None]]] = []
    for status, label, statuses in ROWS:
        figures: list[Figure | None] = []
        for since, _ in PERIODS:
            query = f"status:{statuses}" + (f" since:{since}" if since else "")
            try:
                count, is_more = await asking.share(("events", query), partial(_counted, asking, query))
            except ApiError:
                figures.append(None)
                continue
            path = address("events", status=status, since=since or None)
            figures.append(Figure(count=count, is_more=is_more, path=path))
        rows.append((status, label, figures))
    return rows


async def _counted(asking: Asking, query: str) -> tuple[int, bool]:
    """Return how many events match a query, and whether there may be more."""
    page = await asking.ask(event_api.search_events, query=query, limit=COUNTED)
    return len(page.items), page.next_cursor is not None or page.is_cut_short
