"""Connections that aren't open yet, as their PROXY header or TLS handshake isn't complete: how many, and whose. Pure.

    accepted ──▶ PROXY header ──▶ TLS handshake ──▶ open
                 └──── at most `Limits.opening` ────┘

Anybody can hold one in this state for some seconds, so that there is a bound. If it is reached, the newest is let in,
and another one is evicted: the oldest of the network that has the most. So whoever holds many open from one address
only evicts their own; and where each has one, as in a flood from everywhere, a handshake must end before as many newer
ones have begun, instead of waiting until they have ended.
"""

from collections.abc import Callable

from gateway.ingress.client_address import network_of


class OpeningConnection:
    """One connection, whose it is, and how to end it. `evict` is called at most once, and not after `remove`."""

    __slots__ = ("address", "evict", "is_evicted", "network", "number")

    def __init__(self, evict: Callable[[], object]) -> None:
        self.evict = evict
        self.is_evicted = False
        self.address = ""
        self.network = ""
        self.number = 0


class OpeningConnections:
    """All of them, of one process."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._next = 0
        self._by_network: dict[str, dict[OpeningConnection, None]] = {}

    def __len__(self) -> int:
        return self._count

    def add(self, connection: OpeningConnection, address: str) -> None:
        """Let a connection in, evicting another one if there are too many."""
        if self._count >= self._most:
            self._evict()
        self._next += 1
        connection.number = self._next
        self._insert(connection, address)

    def move(self, connection: OpeningConnection, address: str) -> None:
        """Count a connection for the address that its PROXY header tells."""
        if not connection.is_evicted:
            self._remove(connection)
            self._insert(connection, address)

    def remove(self, connection: OpeningConnection) -> None:
        """Forget a connection that is open, or has failed."""
        if not connection.is_evicted:
            self._remove(connection)

    def _insert(self, connection: OpeningConnection, address: str) -> None:
        connection.address, connection.network = address, network_of(address)
        self._by_network.setdefault(connection.network, {})[connection] = None
        self._count += 1

    def _remove(self, connection: OpeningConnection) -> None:
        connections = self._by_network[connection.network]
        del connections[connection]
        if not connections:
            del self._by_network[connection.network]
        self._count -= 1

    def _evict(self) -> None:
        most = max(map(len, self._by_network.values()))
        oldest = min(
            [next(iter(each)) for each in self._by_network.values() if len(each) == most],
            key=lambda connection: connection.number,
        )
        self._remove(oldest)
        oldest.is_evicted = True
        oldest.evict()
