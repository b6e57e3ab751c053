"""Which idle connections are closed when there are too many: those of the network with the most connections. Pure.

A connection is idle while it waits for its first or next request, which it may do for KEEP_ALIVE. Below the limit of
connections none is closed earlier. At the limit, the network with the most connections loses the one that has been
idle longest. So a client with many connections only loses its own. In a flood from many networks with one connection
each, the one that has been idle longest is closed.
"""

from collections import defaultdict
from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Holding(NamedTuple):
    """The connections of one network: their number (negative), and the idle ones, the longest idle last."""

    minus_count: int
    oldest: float
    number: int
    idle: list[tuple[float, int]]


def longest_idle(
    connections: Iterable[tuple[T, str, float | None]], *, until: float, limit: int
) -> list[tuple[T, float]]:
    """Return up to `limit` connections to close, in that order, and since when each is idle.

    Each of `connections` has a network and a time since which it is idle, None if it isn't. One that became idle
    after `until` isn't closed: it was just accepted, or its client has just received a response and may send more.
    """
    all_: list[T] = []
    idle: dict[str, list[tuple[float, int]]] = {}
    counts: defaultdict[str, int] = defaultdict(int)
    for connection, network, since in connections:
        counts[network] += 1
        if since is not None and since <= until:
            idle.setdefault(network, []).append((since, len(all_)))
            all_.append(connection)
    for each in idle.values():
        each.sort(reverse=True)
    heap = [Holding(-counts[network], each[-1][0], n, each) for n, (network, each) in enumerate(idle.items())]
    heapify(heap)
    chosen: list[tuple[T, float]] = []
    while heap and len(chosen) < limit:
        minus_count, _, number, each = heap[0]
        since, index = each.pop()
        chosen.append((all_[index], since))
        if each:
            heapreplace(heap, Holding(minus_count + 1, each[-1][0], number, each))
        else:  # its other connections are in use
            heappop(heap)
    return chosen
