"""Which connections are closed when there are too many: those that are silent, of whoever has the most. Pure.

A connection is silent while it waits for a request, its first or another; anybody can hold one so for KEEP_ALIVE. As
long as there is room, nothing is closed before that. If there is none, the one is closed that has been silent for the
longest time, of the network that has the most connections: so whoever holds many only loses their own; and where each
network has one, as in a flood from everywhere, the one that is used least.
"""

from collections import defaultdict
from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Holding(NamedTuple):
    """What one network has: how many connections (negative), and the silent ones, the longest silent last."""

    minus_count: int
    oldest: float
    number: int
    silent: list[tuple[float, int]]


def longest_silent(
    connections: Iterable[tuple[T, str, float | None]], *, until: float, most: int
) -> list[tuple[T, float]]:
    """Return up to `most` connections to close, in that order, and since when each is silent.

    `connections` have a network, and since when they are silent, None if they aren't. One that became silent after
    `until` isn't closed: it has just been accepted, or its client has just got a response and may go on.
    """
    all_: list[T] = []
    silent: dict[str, list[tuple[float, int]]] = {}
    counts: defaultdict[str, int] = defaultdict(int)
    for connection, network, since in connections:
        counts[network] += 1
        if since is not None and since <= until:
            silent.setdefault(network, []).append((since, len(all_)))
            all_.append(connection)
    for each in silent.values():
        each.sort(reverse=True)
    heap = [Holding(-counts[network], each[-1][0], n, each) for n, (network, each) in enumerate(silent.items())]
    heapify(heap)
    chosen: list[tuple[T, float]] = []
    while heap and len(chosen) < most:
        minus_count, _, number, each = heap[0]
        since, index = each.pop()
        chosen.append((all_[index], since))
        if each:
            heapreplace(heap, Holding(minus_count + 1, each[-1][0], number, each))
        else:  # whatever else it has is in use
            heappop(heap)
    return chosen
