"""The ledger of a fault: compares acknowledged events with the requests that arrived, and finds unexplained duplicates.

A delivery may arrive twice only if an incident explains it. When a gateway is killed, another one repeats what it had
in flight and what it had finished since its last commit, and nothing else: so the first of the two requests came from
that gateway, in the last moments before it was killed. If the log or a network fails, the first request came during the
failure, and there are no more of them than could not be committed, or were in flight. A repeated delivery may have a
second successor, and so may one whose append got no response in time; each later attempt then arrives twice, too. A
request that the retry policy repeats has another `gateway-attempt` and is no duplicate.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from tests.sink import Request

COMMIT_WINDOW = 1.5
"""Seconds before a crash whose progress may be uncommitted: a commit starts every second, and takes a moment."""
TITLE = 58
"""The width of the first column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A reason for duplicates of requests between two times (`time.time()`) from this gateway, or from any ("").

    It holds at this destination only, or at any (""), and explains at most `at_most` at each. With `is_zombie` the last
    of several requests may also be this gateway's: it was evicted, and sends without knowing what another has sent.
    """

    since: float
    until: float
    gateway: str = ""
    destination: str = ""
    at_most: float = math.inf
    is_zombie: bool = False

    @classmethod
    def crash(cls, at: float, gateway: str, *, ended: float = 0.0) -> "Incident":
        """Return the incident of a killed gateway: explains what was uncommitted, or on its way to the sink.

        `ended` is when its process was gone, if that was later than `at`.
        """
        return cls(since=at - COMMIT_WINDOW, until=max(at, ended) + 0.2, gateway=gateway)

    def explains(self, origin: "Origin", destination: str) -> bool:
        """Return whether it explains a duplicate of this request, if it isn't used up."""
        is_here = self.gateway in {"", origin.gateway} and self.destination in {"", destination}
        return is_here and self.since <= origin.at <= self.until


class Origin(NamedTuple):
    """When a request arrived at a sink, and from which gateway."""

    at: float
    gateway: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request that arrived at a destination. `status` is that of the response."""

    destination: str
    event: str
    attempt: int
    status: int
    body: bytes
    origin: Origin

    @classmethod
    def of(cls, request: Request, destination: str, status: int) -> "Arrival":
        return cls(
            destination=destination,
            event=request.header("gateway-event-id") or "",
            attempt=int(request.header("gateway-attempt") or 0),
            status=status,
            body=request.body,
            origin=Origin(request.at, request.header("x-gateway") or ""),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The result for the acknowledged events: numbers of deliveries, one per event and destination.

    `refused` are requests with another response than 202, or none. `retried` are attempts after the first.
    `stored_again` are further records of an event, which the producer wrote when it retried. `allowed` bounds
    `duplicated`: as many as the incidents would have explained, had there been any; as many as follow from repetitions
    of the attempt before; and those that were explained by a delivery that was deferred just before a crash.
    `unexplained` are those without a reason, some of which are described in `oddities`.
    `slowest` is the longest time from an acknowledgement to the first request at a destination, in seconds, and
    `latest` has it for each destination.
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
    latest: Mapping[str, float]
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
    deferred: Mapping[tuple[str, str], Sequence[float]] | None = None,
) -> Account:
    """Return the account.

    `acknowledged` has the time of each event's 202, `bodies` what was sent, `dead` the (event, destination) of the dead
    letters, `stored` the number of an event's records in the log, if it isn't one. `deferred` has when a delivery was
    stored in a retry topic without an attempt: if its gateway was killed just then, its event is read again as well.
    """
    wanted = {(event, destination) for event in acknowledged for destination in destinations}
    delivered = {(one.event, one.destination) for one in arrivals if one.status // 100 == 2}
    requests: defaultdict[tuple[str, str, int], list[Origin]] = defaultdict(list)
    first: dict[tuple[str, str], float] = {}
    for one in arrivals:
        requests[one.event, one.destination, one.attempt].append(one.origin)
        place = one.event, one.destination
        first[place] = min(one.origin.at, first.get(place, one.origin.at))
    duplicated = following = of_deferred = unexplained = 0
    reasons = {destination: _Reasons(destination, incidents) for destination in destinations}
    oddities = []
    for (event, destination, attempt), found in sorted(requests.items()):
        lives = stored.get(event, 1)
        extra = max(0, len(found) - lives)
        before = requests.get((event, destination, attempt - 1), [])
        inherited = max(0, len(before) - lives)
        following += inherited
        odd = max(0, extra - inherited)
        odd -= reasons[destination].use(odd, sorted(found), before)
        if attempt == 1 and odd:
            stored_at = (deferred or {}).get((event, destination), ())
            left = min(odd, sum(_is_before_crash(at, incidents) for at in stored_at))
            odd -= left
            of_deferred += left
        reasons[destination].count(found, before)
        duplicated += extra
        unexplained += odd
        if odd:
            times = ", ".join([f"{origin.at:.3f} by {origin.gateway}" for origin in sorted(found)])
            put_off = [f", deferred at {at:.3f}" for at in (deferred or {}).get((event, destination), ())]
            oddities.append(f"attempt {attempt} of {event} at {destination}: {times}{''.join(put_off)}")
    of_incidents = sum(each.allowed for each in reasons.values())
    latest = {
        destination: max(
            (first[event, destination] - at for event, at in acknowledged.items() if (event, destination) in first),
            default=0.0,
        )
        for destination in destinations
    }
    return Account(
        acknowledged=len(acknowledged),
        refused=refused,
        delivered=len(wanted & delivered),
        dead=len(wanted & set(dead)),
        lost=len(wanted - delivered - set(dead)),
        altered=sum(one.body != bodies[one.event] for one in arrivals if one.event in bodies),
        retried=sum(attempt > 1 for _, _, attempt in requests),
        stored_again=sum(count - 1 for count in stored.values()),
        duplicated=duplicated,
        allowed=of_incidents + following + of_deferred,
        unexplained=unexplained,
        slowest=max(latest.values()),
        latest=latest,
        oddities=(*oddities[:5], *map(str, sorted(incidents, key=lambda one: one.since))) if oddities else (),
    )


def _is_before_crash(at: float, incidents: Collection[Incident]) -> bool:
    return any(each.gateway and not each.is_zombie and each.since <= at <= each.until for each in incidents)


class Written(NamedTuple):
    """An event in the log."""

    key: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedAccount:
    """The result for the acknowledged events at a destination of an ordered route: numbers of events.

    `repeated` ones arrived again in direct succession, `apart` ones after a later event of their key. `misplaced` ones
    arrived after one that should have followed them. `oddities` describes some of these.
    """

    lost: int
    repeated: int
    apart: int
    misplaced: int
    oddities: tuple[str, ...] = ()


def settle_ordered(
    *,
    acknowledged: Collection[str],
    answered: Sequence[str],
    written: Mapping[str, Sequence[Written]],
    settled: Collection[str] = (),
) -> OrderedAccount:
    """Return the account of the events that a destination answered with 2xx, in this order.

    `written` has the positions of each event in the log. Events of a key and a partition must arrive in the order of
    their offsets. `settled` are those that were appended after a growth of their topic: they must arrive after all
    others of their key. An event that the producer wrote twice has two positions, and may arrive at either.
    """
    by_key: defaultdict[str, list[str]] = defaultdict(list)
    for event in answered:
        by_key[written[event][0].key].append(event)
    repeated = apart = misplaced = 0
    oddities = []
    for key, events in sorted(by_key.items()):
        once = [event for event, _ in groupby(events)]
        repeated += len(events) - len(once)
        again = {event for event, count in Counter(once).items() if count > len(written[event])}
        apart += len(again)
        wrong = again | set(_misplaced([event for event in once if len(written[event]) == 1], written, settled))
        misplaced += len(wrong - again)
        oddities += [f"key {key}: {event} at {written[event]}" for event in sorted(wrong)]
    return OrderedAccount(
        lost=len(set(acknowledged) - set(answered)),
        repeated=repeated,
        apart=apart,
        misplaced=misplaced,
        oddities=tuple(oddities[:5]),
    )


def _misplaced(
    events: Iterable[str], written: Mapping[str, Sequence[Written]], settled: Collection[str]
) -> Iterator[str]:
    """Yield the events of a key that should have come earlier."""
    furthest: dict[int, int] = {}
    is_settled = False
    for event in dict.fromkeys(events):
        [place] = written[event]
        if place.offset < furthest.get(place.partition, 0) or (is_settled and event not in settled):
            yield event
        furthest[place.partition] = max(place.offset, furthest.get(place.partition, 0))
        is_settled = is_settled or event in settled


def number_of(body: bytes) -> int:
    """Return the number that the load has put into a body, -1 without one."""
    found = re.match(rb'\{"n":(\d+),', body)
    return int(found[1]) if found else -1


def rows_of(accounts: Iterable[tuple[str, Account]]) -> list[str]:
    """Return a table of titled accounts: a heading, and a line for each."""
    columns = [name for name in Account.__slots__ if name not in {"latest", "oddities"}]
    heading = f"{'fault':{TITLE}} " + " ".join([f"{name.replace('_', ' '):>12}" for name in columns])
    lines = []
    for title, account in accounts:
        cells = [getattr(account, name) for name in columns]
        texts = [f"{cell:.1f} s" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"{title:{TITLE}} " + " ".join([f"{text:>12}" for text in texts]))
    return [heading, *lines]


class _Reasons:
    """The duplicates that incidents explain at one destination, and how many are used up."""

    def __init__(self, destination: str, incidents: Collection[Incident]) -> None:
        self._destination = destination
        self._incidents = sorted(incidents, key=lambda one: -one.at_most)  # unbounded ones are used first
        self._used: Counter[Incident] = Counter()
        self._most: Counter[Incident] = Counter()

    def use(self, wanted: int, requests: Sequence[Origin], before: Sequence[Origin]) -> int:
        """Return how many of `wanted` duplicates are explained, by these requests or those of the attempt before."""
        *earlier, last = requests
        zombies = [incident for incident in self._that_explain(last) if incident.is_zombie]
        found = 0
        for reason in (*self._of(earlier, before), zombies):
            if found == wanted:
                break
            for incident in reason:
                if self._used[incident] < incident.at_most:
                    self._used[incident] += 1
                    found += 1
                    break
        return found

    def count(self, requests: Sequence[Origin], before: Sequence[Origin]) -> None:
        """Count the duplicates that would have been explained, had there been any."""
        for reason in self._of(requests, before):
            self._most.update(reason[:1] if reason and reason[0].at_most == math.inf else reason)

    @property
    def allowed(self) -> int:
        """How many duplicates would have been explained."""
        return sum(int(min(count, incident.at_most)) for incident, count in self._most.items())

    def _of(self, requests: Sequence[Origin], before: Sequence[Origin]) -> Iterator[list[Incident]]:
        """Yield the incidents that explain each request; for the attempt before, only appends without a response."""
        for origin in requests:
            yield self._that_explain(origin)
        for origin in before:
            yield [incident for incident in self._that_explain(origin) if not incident.gateway]

    def _that_explain(self, origin: Origin) -> list[Incident]:
        return [incident for incident in self._incidents if incident.explains(origin, self._destination)]
