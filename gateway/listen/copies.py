"""What is sent of an event to a program under development: what its provider sent, but for the connection. Pure."""

from base64 import b64decode
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, NamedTuple

from typing_extensions import override
from yarl import URL

from gateway.client.egress import EgressGuard, EgressRefusedError, is_of_this_machine
from gateway.client.request import Outbound
from gateway.model import UsageError
from gateway.rules.rules import RESERVED_HEADERS, Egress

EVENT_ID = b"gateway-event-id"
_NOT_COPIED = frozenset([name.encode() for name in RESERVED_HEADERS])


class ThisMachine(EgressGuard):
    """Refuses every address but this machine's, whatever a name resolves to."""

    def __init__(self) -> None:
        super().__init__(Egress())

    @override
    def check(self, address: str) -> None:
        """Raise EgressRefusedError for any other address."""
        dialled = ip_address(address.partition("%")[0])
        if not dialled.is_loopback:
            raise EgressRefusedError(f"refused: expected an address of this machine, got {dialled}")


class Target(NamedTuple):
    """Where copies go to, and what says which addresses that may be."""

    url: str
    guard: EgressGuard

    @property
    def host(self) -> str:
        """Its host and port, for people."""
        return URL(self.url).authority


def target_of(text: str, *, allowed_host: str | None) -> Target:
    """Return a target on this machine, or at the host that is allowed. Raises UsageError for any other."""
    try:
        url = URL(text).with_fragment(None)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host or url.user is not None or url.password is not None:
        raise UsageError(f"--forward: expected a URL such as http://localhost:3000/hooks, got {text!r}")
    if allowed_host is not None and allowed_host.lower().strip("[]") == url.host:
        return Target(str(url), EgressGuard(Egress()))
    if not is_of_this_machine(url.host):
        raise UsageError(
            f"--forward: expected an address of this machine, got {url.host}; --allow-host {url.host} sends there"
            " what people have sent"
        )
    return Target(str(url), ThisMachine())


def copy_of(raw: Mapping[str, Any], url: str) -> Outbound:
    """Return the request for an event as the API has it, byte for byte.

    Left out are headers of a single connection (RFC 9110 §7.6.1) and those that the client writes. Raises ValueError,
    KeyError or TypeError for what isn't an event.
    """
    headers = [(b64decode(each["name_base64"]), b64decode(each["value_base64"])) for each in raw["headers"]]
    dropped = set(_NOT_COPIED)
    for name, value in headers:
        if name.lower() == b"connection":
            dropped |= {option.strip().lower() for option in value.split(b",")}
    kept = [(name, value) for name, value in headers if name.lower().replace(b"_", b"-") not in dropped]
    identity = str(raw["id"]).encode()
    return Outbound(url=url, headers=(*kept, (EVENT_ID, identity)), body=b64decode(raw["body_base64"]))
