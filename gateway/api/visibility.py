"""What a principal may see and operate, by the limits to owners and sources. Pure.

An event is its source's. A route or destination concerns the sources that it has events of, and is seen with any of
them; operating it requires access to all of them.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from gateway.access.principal import AccessRole, Principal
from gateway.api.overview import Overview
from gateway.api.problems import ApiError, Code
from gateway.ops.findings import SOURCE, Finding
from gateway.rules.rules import Route, Rules

OF_OTHERS = "details hidden: includes events or deliveries that you may not see"


def sees_source(principal: Principal, rules: Rules, source: str) -> bool:
    """Return whether somebody sees a source, and its events; one that isn't in the rules has no owner."""
    return principal.may_see(source=source, owner=_owner(rules, "source", source))


def sees_delivery(principal: Principal, rules: Rules, source: str, route: str, destination: str) -> bool:
    """Return whether a principal sees a delivery: its owner does, and so does anyone who sees its event."""
    owner = rules.contact_of(route, destination).owner or None
    return sees_source(principal, rules, source) or principal.may_see(source=source, owner=owner)


def sees_named(principal: Principal, rules: Rules, kind: str, name: str, sources: Iterable[str]) -> bool:
    """Return whether somebody sees a route or destination that has events of these sources."""
    owner = _owner(rules, kind, name)
    return any(principal.may_see(source=source, owner=owner) for source in sources) or (
        principal.sources is None and principal.may_see(source=None, owner=owner)
    )


def sources_seen(principal: Principal, rules: Rules, route: Route) -> tuple[str, ...]:
    """Return the sources of a route of which somebody sees what it delivers."""
    owner = _owner(rules, "route", route.name)
    return tuple(
        [
            source
            for source in route.sources
            if principal.may_see(source=source, owner=owner) or sees_source(principal, rules, source)
        ]
    )


def seen_finding(principal: Principal, rules: Rules, overview: Overview, finding: Finding) -> Finding | None:
    """Return what somebody sees of a finding; with limits, what is about something of theirs, None for nothing.

    Of a route's deliveries to a destination, that is the route's events, or the deliveries that they answer for: who
    sees a destination for the events of one route doesn't see what others deliver there. If events or deliveries of
    others are among those that it is about, it says neither how many nor what was answered to them, nor of which
    sources they are; only that something is paused or held is told as it is.
    """
    if not principal.is_limited:
        return finding
    if finding.source:
        return finding if sees_source(principal, rules, finding.source) else None
    route, destination = rules.routes.get(finding.route), finding.destination
    if route is not None:
        seen = [sees_delivery(principal, rules, source, route.name, destination) for source in route.sources]
        is_seen, is_whole = any(seen), all(seen)
    else:
        sources = overview.sources_of.get(destination, frozenset())
        is_seen = destination in rules.destinations and sees_named(
            principal, rules, "destination", destination, sources
        )
        is_whole = not finding.route and may_operate(principal, rules, "destination", destination, sources)
    if not is_seen:
        return None
    if is_whole or (finding.count is None and finding.rank != SOURCE):
        return finding
    return replace(
        finding, why=OF_OTHERS, since=None, until=None, is_due=False, count=None, next=tuple(_bare_steps(finding))
    )


def _bare_steps(finding: Finding) -> Iterator[str]:
    """Yield the steps of a finding that tell of no event, no time and no reason."""
    for step in finding.next:
        if step.startswith(_LISTS_DEAD):
            yield step.partition(" --reason ")[0]
        elif _BARE_STEP.match(step):
            yield step


_LISTS_DEAD = "gateway dead list --route "
_BARE_STEP = re.compile(r"gateway (route|destination) (kick|resume) ")


def may_operate(principal: Principal, rules: Rules, kind: str, name: str, sources: Iterable[str]) -> bool:
    """Return whether somebody may operate a route or destination that has events of these sources."""
    owner, known = _owner(rules, kind, name), list(sources)
    if not known:
        return principal.sources is None and principal.may_see(source=None, owner=owner)
    return all(principal.may_see(source=source, owner=owner) for source in known)


def needs_no_limit(principal: Principal, what: str) -> None:
    """Raise ApiError for a principal with limits, for what can't be limited."""
    if principal.is_limited:
        raise ApiError(Code.FORBIDDEN, f"expected a principal without limits for {what}, got one with some")


def reads_bodies(principal: Principal) -> bool:
    return principal.role.covers(AccessRole.READER)


def _owner(rules: Rules, kind: str, name: str) -> str | None:
    contact = rules.contacts.get((kind, name))
    return None if contact is None else contact.owner or None
