"""Connections that are opening: their PROXY header or TLS handshake isn't complete. Decides which are evicted. Pure.

    accepted ──▶ PROXY header ──▶ TLS handshake ──▶ open
                 └──── at most `Limits.opening` ────┘

Anybody can keep a connection in this state for some seconds, so their number is bounded. At the bound a new one is
accepted and another one evicted: the oldest of the network that has the most. So a client with many connections only
evicts its own. In a flood from many networks, a handshake has to complete before as many newer ones have begun as the
bound allows; it doesn't have to wait for theirs to complete.
"""

from collections.abc import Callable

from gateway.ingress.client_address import network_of


class OpeningConnection:
    """A connection, its network, and how to close it. `evict` is called at most once, and not after `remove`."""

    __slots__ = ("address", "evict", "is_evicted", "network", "number")

    def __init__(self, evict: Callable[[], object]) -> None:
        self.evict = evict
        self.is_evicted = False
        self.address = ""
        self.network = ""
        self.number = 0


class OpeningConnections:
    """The opening connections of one process."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._next = 0
        self._by_network: dict[str, dict[OpeningConnection, None]] = {}

    def __len__(self) -> int:
        return self._count

    def add(self, connection: OpeningConnection, address: str) -> None:
        """Add a connection, evicting another one at the limit."""
        if self._count >= self._limit:
            self._evict()
        self._next += 1
        connection.number = self._next
        self._insert(connection, address)

    def move(self, connection: OpeningConnection, address: str) -> None:
        """Count a connection for the client address in its PROXY header."""
        if not connection.is_evicted:
            self._remove(connection)
            self._insert(connection, address)

    def remove(self, connection: OpeningConnection) -> None:
        """Remove a connection that is open now, or has failed."""
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
        largest = max(map(len, self._by_network.values()))
        oldest = min(
            [next(iter(each)) for each in self._by_network.values() if len(each) == largest],
            key=lambda connection: connection.number,
        )
        self._remove(oldest)
        oldest.is_evicted = True
        oldest.evict()
