"""Counts of traffic, added up, and what can be told of them: pure."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.index.statuses import OPEN, Status
from gateway.index.traffic_schema import DELIVERIES, EVENTS, SPANS, Counted
from gateway.model import Result, immutable


@immutable
class Tally:
    """What was counted in some time.

    `deliveries` are by status and by why they became dead letters (""), `attempts` by result and whether they were
    retries. `spans` are all of these attempts by how long they took: see `SPANS`.
    """

    events: int = 0
    bytes: int = 0
    duplicates: int = 0
    deliveries: Mapping[tuple[Status, str], int]
    attempts: Mapping[tuple[str, bool], int]
    spans: Mapping[int, int]

    @property
    def begun(self) -> int:
        """The deliveries, of which something is recorded, that began."""
        return sum(self.deliveries.values())

    def having(self, *statuses: Status) -> int:
        """Return how many deliveries have one of these statuses, and have never been dead letters."""
        return sum([count for (status, letter), count in self.deliveries.items() if status in statuses and not letter])

    @property
    def delivered(self) -> int:
        return sum([count for (status, _), count in self.deliveries.items() if status is Status.DELIVERED])

    @property
    def waiting(self) -> int:
        """Those that wait: for a retry, for their turn, or parked."""
        return self.having(*[each for each in OPEN if each is not Status.DEAD])

    @property
    def died(self) -> Mapping[str, int]:
        """By reason: those that became dead letters, which may have been replayed or dropped since."""
        died = Counter[str]()
        for (status, letter), count in self.deliveries.items():
            if letter and status is not Status.DELIVERED:
                died[letter] += count
        return died

    @property
    def dead(self) -> int:
        """Those that are open dead letters."""
        return sum([count for (status, _), count in self.deliveries.items() if status is Status.DEAD])

    @property
    def results(self) -> Mapping[str, int]:
        results = Counter[str]()
        for (result, _), count in self.attempts.items():
            results[result] += count
        return results

    @property
    def attempted(self) -> int:
        return sum(self.attempts.values())

    @property
    def failed(self) -> int:
        return sum([count for (result, _), count in self.attempts.items() if result != Result.SUCCESS])

    @property
    def retried(self) -> int:
        """Attempts that weren't their delivery's first."""
        return sum([count for (_, is_retry), count in self.attempts.items() if is_retry])

    def quantile(self, share: float) -> float | None:
        """Return about how long (s) so large a share of the attempts took at most; None if there are none.

        Within a span, times are taken to be spread evenly.
        """
        return quantile(self.spans, share)


@immutable
class Traffic:
    """What was counted: in all, and in each step, by its start (Unix seconds), the oldest first.

    `since` is where it begins: later than asked for if steps of that length aren't kept for so long.
    `has_successes`: of some attempts anywhere in that time, to the hour, it is recorded that they succeeded.
    """

    since: int
    has_successes: bool
    total: Tally
    steps: Sequence[tuple[int, Tally]]


def quantile(spans: Mapping[int, int], share: float) -> float | None:
    """Return about which time (s) so large a share of what is counted in spans doesn't exceed; None for nothing."""
    left = share * sum(spans.values())
    for number in sorted(spans):
        if (count := spans[number]) and left <= count:
            least, most = (SPANS[number - 1] if number else 0), SPANS[number]
            return float(least + (most - least) * left / count) / 1e6
        left -= spans[number]
    return None


class Sums:
    """Counts that are added up: by the start of their step."""

    def __init__(self) -> None:
        self._events = Counter[int]()
        self._bytes = Counter[int]()
        self._duplicates = Counter[int]()
        self._deliveries: defaultdict[int, Counter[tuple[Status, str]]] = defaultdict(Counter)
        self._attempts: defaultdict[int, Counter[tuple[str, bool]]] = defaultdict(Counter)
        self._spans: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def add(self, what: Counted, start: int, counted: Sequence[Any]) -> None:
        """Add a row of what was counted in a step."""
        if what is EVENTS:
            self._events[start] += counted[0]
            self._bytes[start] += counted[1]
            self._duplicates[start] += counted[2]
        elif what is DELIVERIES:
            status, letter, count = counted
            self._deliveries[start][Status(status), letter] += count
        else:
            result, is_retry, span, count = counted
            self._attempts[start][result, bool(is_retry)] += count
            self._spans[start][span] += count

    def traffic(self, starts: Sequence[int], *, has_successes: bool) -> Traffic:
        """Return what was counted, in all and in each step."""
        total = Tally(
            events=self._events.total(),
            bytes=self._bytes.total(),
            duplicates=self._duplicates.total(),
            deliveries=sum(self._deliveries.values(), Counter()),
            attempts=sum(self._attempts.values(), Counter()),
            spans=sum(self._spans.values(), Counter()),
        )
        steps = [(start, self._tally(start)) for start in starts]
        return Traffic(since=starts[0], has_successes=has_successes, total=total, steps=steps)

    def _tally(self, start: int) -> Tally:
        return Tally(
            events=self._events[start],
            bytes=self._bytes[start],
            duplicates=self._duplicates[start],
            deliveries=self._deliveries.get(start, {}),
            attempts=self._attempts.get(start, {}),
            spans=self._spans.get(start, {}),
        )
