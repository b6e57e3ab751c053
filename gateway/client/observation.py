"""What is observed of one attempt besides its result, where a caller asks for it: its phases, and the response.

    on_dial ─▶ on_resolved ─▶ on_connected ─▶ on_secured ─┐
    on_reuse ─────────────────────────────────────────────┴▶ on_send ─▶ on_response

Steps that don't apply (the resolution of an IP address, TLS for http) are left out. It is filled in while the attempt
is made, so that an attempt that is cut short shows how far it came. Of several requests (a stale connection, a new
token), the last one counts.
"""

from collections.abc import Callable

from gateway.client.http1 import ResponseReader
from gateway.model import AttemptPhases


class Observation:
    """What is observed of one attempt. `clock` is a monotonic one, that of `ResponseReader.started_at`.

    `response` is the last request's; `authorizations` are the values of Authorization with tokens that were fetched
    for its requests, to be masked.
    """

    __slots__ = ("_clock", "_connect", "_dns", "_first_byte", "_since", "_tls", "authorizations", "response")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = 0.0
        self._dns: float | None = None
        self._connect: float | None = None
        self._tls: float | None = None
        self._first_byte: float | None = None
        self.response: ResponseReader | None = None
        self.authorizations: tuple[bytes, ...] = ()

    @property
    def phases(self) -> AttemptPhases:
        return AttemptPhases(self._dns, self._connect, self._tls, self._first_byte)

    def on_reuse(self) -> None:
        """Note that the next request goes through a connection that is open."""
        self._dns = self._connect = self._tls = None

    def on_dial(self) -> None:
        """Note that a new connection is opened for the next request."""
        self.on_reuse()
        self._since = self._clock()

    def on_resolved(self) -> None:
        self._dns = self._lap()

    def on_connected(self) -> None:
        """Note that the connection is open, through a proxy's tunnel if there is one."""
        self._connect = self._lap()

    def on_secured(self) -> None:
        self._tls = self._lap()

    def on_send(self) -> None:
        self._first_byte = self.response = None
        self._since = self._clock()

    def on_response(self, response: ResponseReader) -> None:
        self._first_byte = max(0.0, response.started_at - self._since)
        self.response = response

    def _lap(self) -> float:
        """Return how long the part took that ends now; the next one begins."""
        since = self._since
        self._since = self._clock()
        return self._since - since
