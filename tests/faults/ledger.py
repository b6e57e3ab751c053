"""The books of a fault: what was acknowledged against what arrived, and which duplicates there is a reason for.

A delivery may come twice only if an incident explains it. When a gateway is killed, what it had in flight and what it
had finished since its last commit is done again by another one, and nothing else: so the copy that came first came from
that gateway, in the last moments before it was killed. Where it is the log that fails, or a network, the copy that came
first came meanwhile, and there are no more of them than could not be committed, or were in flight. What was repeated
may have left a second successor, and so may an append that got no answer in time; each later attempt then comes twice,
too. A request that the retry policy repeats has another `gateway-attempt` and is no duplicate.
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
"""Seconds before a crash of which the progress may not be committed: commits of little start every second, and take a
moment."""
TITLE = 58
"""The width of the first column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A reason for duplicates of what came between two times (`time.time()`), from this gateway, or from any ("").

    At this destination alone, or at any (""); at each of them it is a reason for at most `at_most`. With `is_zombie`
    also of what came from it last: it was thrown out of its group, and sends without knowing what another has sent.
    """

    since: float
    until: float
    gateway: str = ""
    destination: str = ""
    at_most: float = math.inf
    is_zombie: bool = False

    @classmethod
    def crash(cls, at: float, gateway: str) -> "Incident":
        """Explain what a gateway had not committed when it was killed, and what was still on its way to the sink."""
        return cls(since=at - COMMIT_WINDOW, until=at + 0.2, gateway=gateway)

    def explains(self, copy: "Copy", destination: str) -> bool:
        """Return whether it is a reason, if it is not used up."""
        is_here = self.gateway in {"", copy.gateway} and self.destination in {"", destination}
        return is_here and self.since <= copy.at <= self.until


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
) -> Account:
    """Make the account.

    `acknowledged` are the times of the 202s by event, `bodies` what was sent, `dead` the (event, destination) of the
    dead letters, `stored` how many records each event has in the log (one, where it isn't told).
    """
    wanted = {(event, destination) for event in acknowledged for destination in destinations}
    delivered = {(one.event, one.destination) for one in arrivals if one.status // 100 == 2}
    copies: defaultdict[tuple[str, str, int], list[Copy]] = defaultdict(list)
    first: dict[tuple[str, str], float] = {}
    for one in arrivals:
        copies[one.event, one.destination, one.attempt].append(one.copy)
        place = one.event, one.destination
        first[place] = min(one.copy.at, first.get(place, one.copy.at))
    duplicated = allowed = unexplained = 0
    reasons = {destination: _Reasons(destination, incidents) for destination in destinations}
    oddities = []
    for (event, destination, attempt), found in sorted(copies.items()):
        lives = stored.get(event, 1)
        extra = max(0, len(found) - lives)
        before = copies.get((event, destination, attempt - 1), [])
        inherited = max(0, len(before) - lives)
        odd = max(0, extra - inherited)
        odd -= reasons[destination].use(odd, sorted(found), before)
        reasons[destination].count(found, before)
        duplicated += extra
        allowed += inherited
        unexplained += odd
        if odd:
            times = ", ".join([f"{copy.at:.3f} by {copy.gateway}" for copy in sorted(found)])
            oddities.append(f"attempt {attempt} of {event} at {destination}: {times}")
    allowed += sum(each.allowed for each in reasons.values())
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
        retried=sum(attempt > 1 for _, _, attempt in copies),
        stored_again=sum(count - 1 for count in stored.values()),
        duplicated=duplicated,
        allowed=allowed,
        unexplained=unexplained,
        slowest=max(latest.values()),
        latest=latest,
        oddities=(*oddities[:5], *map(str, sorted(incidents, key=lambda one: one.since))) if oddities else (),
    )


class Written(NamedTuple):
    """An event in the log."""

    key: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedAccount:
    """What became of the acknowledged events at a destination of an ordered route: numbers of events.

    `repeated` came again right after themselves, `apart` after a later one of their key; `misplaced` came after one
    that they should have come before, and `oddities` tells some of these.
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
    """Make the account of what a destination has answered with 2xx, in this order.

    `written` has the places of each event in the log. The events of a key and a partition come in the order of their
    offsets. `settled` are those that were appended when a growth of their topic was over: they come after all others
    of their key. What the producer wrote twice has two places, and may come at each.
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
    """Return the number that the load has put into a body, -1 where it is no more to be found."""
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
    """What the incidents explain at one destination, and how much of that is used up."""

    def __init__(self, destination: str, incidents: Collection[Incident]) -> None:
        self._destination = destination
        self._incidents = sorted(incidents, key=lambda one: -one.at_most)  # what has no bound is used first
        self._used: Counter[Incident] = Counter()
        self._most: Counter[Incident] = Counter()

    def use(self, wanted: int, copies: Sequence[Copy], before: Sequence[Copy]) -> int:
        """Explain so many duplicates by the copies, or those of the attempt before; return how many it did."""
        *earlier, last = copies
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

    def count(self, copies: Sequence[Copy], before: Sequence[Copy]) -> None:
        """Take note of what might have been explained, had it come again."""
        for reason in self._of(copies, before):
            self._most.update(reason[:1] if reason and reason[0].at_most == math.inf else reason)

    @property
    def allowed(self) -> int:
        """How many duplicates there might have been."""
        return sum(int(min(count, incident.at_most)) for incident, count in self._most.items())

    def _of(self, copies: Sequence[Copy], before: Sequence[Copy]) -> Iterator[list[Incident]]:
        """Yield the incidents that explain each copy. Of an attempt before, an append that got no answer in time."""
        for copy in copies:
            yield self._that_explain(copy)
        for copy in before:
            yield [incident for incident in self._that_explain(copy) if not incident.gateway]

    def _that_explain(self, copy: Copy) -> list[Incident]:
        return [incident for incident in self._incidents if incident.explains(copy, self._destination)]
