"""Routes that match no event, by the processes' counts: a mistyped condition unroutes nothing if others match, too.

Each process counts the events that it routes, so only the sum over those that were queried tells whether a route is
quiet: one that matched something in any of them isn't.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.engine.control.records import ControlRecord
from gateway.engine.control.state import Control
from gateway.log.json_fields import LATEST
from gateway.ops.findings import SOURCE, Finding
from gateway.ops.output import rfc3339, when
from gateway.ops.process_status import UNREADABLE, unreadable_finding
from gateway.ops.recovery import covers, replayed
from gateway.ops.route_counts import Past

IMPROBABLE = 0.01
"""A route that matches nothing since its condition changed is reported if that was less probable than this."""
MIN_EVENTS = 20
"""Minimum number of events for a route without a past to be reported, if it has matched none of them."""
MAX_ROWS, MAX_NAMES = 5, 20
"""Routes without a past that get a row each; if there are more, those that are named in a common row."""

Status = tuple[Mapping[str, Any], str]
"""What a process returns at `/status`, and its address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """A route that has matched none of its sources' events in a period: in one process, or in several together."""

    route: str
    sources: tuple[str, ...]
    events: int
    by: str
    since: float | None = None
    until: float | None = None
    event: str | None = None
    loaded_at: float | None = None
    changed: tuple[str, ...] = ()
    past: Past | None = None

    @property
    def is_improbable(self) -> bool:
        return self.past is not None and self.past.chance_of_none(self.events) < IMPROBABLE

    @property
    def none_of(self) -> str:
        return f"matched none of {self.events:,} events of {', '.join(self.sources)}"

    @property
    def replay_step(self) -> str:
        assert self.since is not None, self
        return f"gateway replay --route {self.route} --from {rfc3339(self.since)} --undelivered"


def quiet_route_findings(
    statuses: Sequence[Status], control: Control, *, routes: Collection[str] | None = None
) -> list[Finding]:
    """Return the routes that match nothing, by what processes return at `/status`; of `routes` only, unless None.

    An ingress and a process of an older version don't send their counts.
    """
    found: list[Finding] = []
    now: list[Mapping[str, Quiet]] = []
    before: list[Mapping[str, Quiet]] = []
    for status, where in statuses:
        sent = status.get("quiet_routes")
        if sent is None:
            continue
        try:
            current, missed = _read(sent, where)
        except UNREADABLE:
            found.append(unreadable_finding(("quiet_routes",), status.get("version"), where))
            continue
        now.append(current)
        before.append(missed)
    common = set[str]() if not now else set.intersection(*[set(each) for each in now])
    quiet = [_together([each[name] for each in now]) for name in sorted(common) if routes is None or name in routes]
    names = sorted({name for each in before for name in each if routes is None or name in routes})
    missed_now = [_together([each[name] for each in before if name in each]) for name in names]
    found += [_changed_finding(each) for each in quiet if each.is_improbable]
    found += [_missed_finding(each, control) for each in missed_now if each.is_improbable]
    return found + _new_findings([each for each in quiet if each.past is None and each.events >= MIN_EVENTS])


def _read(sent: Mapping[str, Any], where: str) -> tuple[Mapping[str, Quiet], Mapping[str, Quiet]]:
    """Return a process's quiet routes, and what routes missed while they were quiet. Raises one of UNREADABLE."""
    current = {
        name: Quiet(
            route=name,
            sources=tuple(group["sources"]),
            events=int(group["events"]),
            since=_time(group["since"]),
            event=group["event"],
            by=where,
        )
        for group in sent["new"]
        for name in group["routes"]
    }
    current |= {each["route"]: _read_one(each, where) for each in sent["changed"]}
    return current, {each["route"]: _read_one(each, where) for each in sent["missed"]}


def _read_one(sent: Mapping[str, Any], where: str) -> Quiet:
    past = sent["before"]
    return Quiet(
        route=sent["route"],
        sources=tuple(sent["sources"]),
        events=int(sent["events"]),
        since=_time(float(sent["since"])),
        until=_time(sent.get("until")),
        loaded_at=_time(sent.get("loaded_at")),
        changed=tuple(sent.get("changed", ())),
        past=Past(events=int(past["events"]), matched=int(past["matched"]), event=past["event"]),
        by=where,
    )


def _time(at: object) -> float | None:
    """Return a time that can be shown. Raises ValueError for one that can't."""
    if at is None:
        return None
    if not isinstance(at, int | float) or not 0 <= at < LATEST:
        raise ValueError(at)
    return at


def _together(several: Sequence[Quiet]) -> Quiet:
    """Return a route's counts in several processes as one: with the past and the change of those that know them."""
    pasts = [each.past for each in several if each.past is not None]
    known = [each for each in several if each.past is not None] or several
    first = known[0]
    return Quiet(
        route=first.route,
        sources=first.sources,
        events=sum([each.events for each in several]),
        by=first.by if len(several) == 1 else f"{len(several):,} processes",
        since=_least([each.since for each in known]),
        until=max([each.until for each in known if each.until is not None], default=None),
        event=next((each.event for each in several if each.event is not None), None),
        loaded_at=_least([each.loaded_at for each in known]),
        changed=tuple(dict.fromkeys([text for each in known for text in each.changed])),
        past=_sum(pasts),
    )


def _sum(pasts: Sequence[Past]) -> Past | None:
    if not pasts:
        return None
    events, matched = sum([each.events for each in pasts]), sum([each.matched for each in pasts])
    return Past(events=events, matched=matched, event=pasts[0].event)


def _least(times: Iterable[float | None]) -> float | None:
    known = list(times)
    return None if None in known else min([at for at in known if at is not None])


def _changed_finding(quiet: Quiet) -> Finding:
    """Return that a route matches nothing since its condition changed, though it did before."""
    assert quiet.past is not None, quiet
    change = (
        ()
        if quiet.loaded_at is None
        else (f"# the rules loaded at {when(quiet.loaded_at)} changed {'; '.join(quiet.changed) or 'its condition'}",)
    )
    return Finding(
        rank=SOURCE,
        what=f"route {quiet.route}",
        why=f"{quiet.none_of} since its condition changed; before, {_share(quiet.past)}",
        since=quiet.since,
        by=quiet.by,
        next=(
            *change,
            *_explain_steps(quiet.past),
            "# once its condition is correct and active (`rules_reloaded`), recover what it missed (--dry-run counts):",
            quiet.replay_step,
        ),
    )


def _missed_finding(quiet: Quiet, control: Control) -> Finding:
    """Return what a route missed under conditions that have been changed since: wrong until a replay has found some."""
    past, since, until = quiet.past, quiet.since, quiet.until
    assert past is not None, quiet
    assert since is not None, quiet
    until = since if until is None else until
    done = replayed(control, quiet.sources, (quiet.route,), since=since, until=until)
    is_covered = any(_has_covered(command, quiet, since, until) for command in control.commands.values())
    needs_attention = done is None or not done.queued or not is_covered
    steps = (
        *(_explain_steps(past) if done is not None and not done.queued else ()),
        "# if its condition is correct now, recover what it missed (count first with --dry-run):",
        quiet.replay_step,
    )
    return Finding(
        rank=SOURCE,
        what=f"route {quiet.route}",
        why=f"{quiet.none_of} until its condition changed at {when(until)}; before, {_share(past)}"
        + ("" if done is None else f"; {done}"),
        needs_attention=needs_attention,
        since=since,
        until=until,
        by=quiet.by,
        next=steps if needs_attention else (),
    )


def _has_covered(command: ControlRecord, quiet: Quiet, since: float, until: float) -> bool:
    source = quiet.sources[0] if len(quiet.sources) == 1 else None
    return command.state == "done" and covers(command, quiet.route, source=source, since=since, until=until)


def _new_findings(several: Sequence[Quiet]) -> list[Finding]:
    """Return which routes have matched nothing yet: nothing wrong, as nobody knows whether they should have."""
    if len(several) > MAX_ROWS:
        names = [each.route for each in several[:MAX_NAMES]]
        more = f", and {len(several) - MAX_NAMES:,} more" if len(several) > MAX_NAMES else ""
        why = f"matched none of their sources' events, at least {MIN_EVENTS} each: {', '.join(names)}{more}"
        whose = {each.by for each in several}
        by = whose.pop() if len(whose) == 1 else ""
        return [Finding(rank=SOURCE, what="routes", why=why, needs_attention=False, by=by, count=len(several))]
    return [_new_finding(each) for each in several]


def _new_finding(quiet: Quiet) -> Finding:
    recover = ("# if its condition is wrong: once it is correct, recover what it missed (count first with --dry-run):",)
    return Finding(
        rank=SOURCE,
        what=f"route {quiet.route}",
        why=f"{quiet.none_of} {'since the process started' if quiet.since is None else 'under its current rules'}",
        needs_attention=False,
        since=quiet.since,
        by=quiet.by,
        next=(
            *(("# why it doesn't match the last one:", f"gateway explain {quiet.event}") if quiet.event else ()),
            *(() if quiet.since is None else (*recover, quiet.replay_step)),
        ),
    )


def _share(past: Past) -> str:
    return f"{past.matched:,} of {past.events:,}"


def _explain_steps(past: Past) -> tuple[str, ...]:
    return ("# why it doesn't match an event that it matched before:", f"gateway explain {past.event}")
