"""The books of a fault: what was acknowledged against what arrived, and which duplicates there is a reason for.

A delivery may come twice only if an incident explains it. When a gateway is killed, what it had in flight and what it
had finished since its last commit is done again by another one, and nothing else: so the copy that came first came from
that gateway, in the last moments before it was killed. What was repeated may have left a second successor, and so may
an append that got no answer in time; each later attempt then comes twice, too. A request that the retry policy repeats
has another `gateway-attempt` and is no duplicate.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tests.sink import Request

COMMIT_WINDOW = 1.5
"""Seconds before a crash of which the progress may not be committed: commits start every second, and take a moment."""
TITLE = 58
"""The width of the first column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A reason for duplicates of what came between two times (`time.time()`), from this gateway, or from any ("")."""

    since: float
    until: float
    gateway: str = ""

    @classmethod
    def crash(cls, at: float, gateway: str) -> "Incident":
        """Explain what a gateway had not committed when it was killed, and what was still on its way to the sink."""
        return cls(since=at - COMMIT_WINDOW, until=at + 0.2, gateway=gateway)

    def explains(self, copy: "Copy") -> bool:
        return self.since <= copy.at <= self.until and self.gateway in {"", copy.gateway}


class Copy(NamedTuple):
    """One request at a sink."""

    at: float
    gateway: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What came to one destination. `status` is what it was answered."""

    destination: str
    event: str
    attempt: int
    status: int
    body: bytes
    copy: Copy

    @classmethod
    def of(cls, request: Request, destination: str, status: int) -> "Arrival":
        return cls(
            destination=destination,
            event=request.header("gateway-event-id") or "",
            attempt=int(request.header("gateway-attempt") or 0),
            status=status,
            body=request.body,
            copy=Copy(request.at, request.header("x-gateway") or ""),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What became of the acknowledged events: numbers of deliveries, of which each event has one for a destination.

    `refused` are requests with another answer than 202, or none. `retried` are attempts after the first.
    `stored_again` are records of one event beside its first, which the producer wrote as it tried again. `allowed`
    bounds `duplicated`; `unexplained` are those for which there is no reason, and `oddities` tells some of them.
    `slowest` is the longest time from an acknowledgement to the first request, in seconds.
    """

    acknowledged: int
    refused: int
    delivered: int
    dead: int
    lost: int
    altered: int
    retried: int
    stored_again: int
    duplicated: int
    allowed: int
    unexplained: int
    slowest: float
    oddities: tuple[str, ...] = ()


def settle(
    *,
    acknowledged: Mapping[str, float],
    refused: int,
    bodies: Mapping[str, bytes],
    arrivals: Sequence[Arrival],
    destinations: Collection[str],
    dead: Collection[tuple[str, str]],
    stored: Mapping[str, int],
    incidents: Collection[Incident],
) -> Account:
    """Make the account.

    `acknowledged` are the times of the 202s by event, `bodies` what was sent, `dead` the (event, destination) of the
    dead letters, `stored` how many records each event has in the log (one, where it isn't told).
    """
    wanted = {(event, destination) for event in acknowledged for destination in destinations}
    delivered = {(one.event, one.destination) for one in arrivals if one.status // 100 == 2}
    copies: defaultdict[tuple[str, str, int], list[Copy]] = defaultdict(list)
    first: dict[str, float] = {}
    for one in arrivals:
        copies[one.event, one.destination, one.attempt].append(one.copy)
        first[one.event] = min(one.copy.at, first.get(one.event, one.copy.at))
    duplicated = unexplained = 0
    allowed = _explained([one.copy for one in arrivals], incidents)
    unanswered = [incident for incident in incidents if not incident.gateway]
    oddities = []
    for (event, destination, attempt), found in sorted(copies.items()):
        lives = stored.get(event, 1)
        extra = max(0, len(found) - lives)
        before = copies.get((event, destination, attempt - 1), [])
        inherited = max(0, len(before) - lives) + _explained(before, unanswered)
        odd = max(0, extra - inherited - _explained(sorted(found)[:-1], incidents))
        duplicated += extra
        allowed += inherited
        unexplained += odd
        if odd:
            times = ", ".join([f"{copy.at:.3f} by {copy.gateway}" for copy in sorted(found)])
            oddities.append(f"attempt {attempt} of {event} at {destination}: {times}")
    return Account(
        acknowledged=len(acknowledged),
        refused=refused,
        delivered=len(wanted & delivered),
        dead=len(wanted & set(dead)),
        lost=len(wanted - delivered - set(dead)),
        altered=sum(one.body != bodies[one.event] for one in arrivals if one.event in bodies),
        retried=sum(attempt > 1 for _, _, attempt in copies),
        stored_again=sum(count - 1 for count in stored.values()),
        duplicated=duplicated,
        allowed=allowed,
        unexplained=unexplained,
        slowest=max((first[event] - at for event, at in acknowledged.items() if event in first), default=0.0),
        oddities=(*oddities[:5], *map(str, sorted(incidents, key=lambda one: one.since))) if oddities else (),
    )


def number_of(body: bytes) -> int:
    """Return the number that the load has put into a body, -1 where it is no more to be found."""
    found = re.match(rb'\{"n":(\d+),', body)
    return int(found[1]) if found else -1


def rows_of(accounts: Iterable[tuple[str, Account]]) -> list[str]:
    """Return a table of titled accounts: a heading, and a line for each."""
    columns = [name for name in Account.__slots__ if name != "oddities"]
    heading = f"{'fault':{TITLE}} " + " ".join([f"{name.replace('_', ' '):>12}" for name in columns])
    lines = []
    for title, account in accounts:
        cells = [getattr(account, name) for name in columns]
        texts = [f"{cell:.1f} s" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"{title:{TITLE}} " + " ".join([f"{text:>12}" for text in texts]))
    return [heading, *lines]


def _explained(copies: Iterable[Copy], incidents: Collection[Incident]) -> int:
    return sum(any(incident.explains(copy) for incident in incidents) for copy in copies)
