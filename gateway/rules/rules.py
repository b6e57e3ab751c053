"""What a rule file means, once read: sources, destinations, routes. Frozen; a reload makes a new `Rules`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from gateway.model import RetryPolicy
from gateway.rules.expressions import Expression, Template
from gateway.rules.table import Condition, RouteTable
from gateway.verify.schemes import Verifier

RESERVED_HEADERS = frozenset(
    (
        # RFC 9110, section 7.6.1: what belongs to one connection; with Host and Content-Length, the client's to write.
        *("connection", "content-length", "expect", "host", "keep-alive", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
        *("gateway-event-id", "gateway-delivery-id", "gateway-route", "gateway-attempt"),
    )
)
"""Headers that neither a sender, a route nor a destination sets; in lower case."""
SIGNED_HEADERS = "webhook-"
"""What those begin with that nobody else sets where a destination has `sign`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A sender: where it posts, how it is verified, what identifies an event.

    `topic` is None for the default topic of the source's name. The expressions fall back to the scheme's own.
    """

    name: str
    path: str
    verifier: Verifier
    id: Expression | None = None
    type: Expression | None = None
    key: Expression | None = None
    topic: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A downstream URL with its limits. `rate` is events a second, over the whole fleet; None is unlimited.

    `headers` are added to each request. `sign` are Standard Webhooks secrets, decoded, the current one first.
    """

    name: str
    url: str = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    sign: tuple[bytes, ...] = field(default=(), repr=False)
    timeout: float = 10.0
    concurrency: int = 50
    rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTemplate:
    """What a route sends instead of the raw bytes. `body` is None where only headers are added."""

    headers: tuple[tuple[str, Template], ...] = ()
    body: Template | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A rule: from which sources, which events, to which destinations, with which retry policy and request."""

    name: str
    sources: tuple[str, ...]
    match: Condition | None
    when: Expression | None
    destinations: tuple[str, ...]
    request: RequestTemplate | None
    retry: RetryPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Egress:
    """Where deliveries may connect to. `allow` overrides every refusal."""

    is_private_allowed: bool = True
    allow: tuple[IPv4Network | IPv6Network, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """One version of the rules, whole and consistent: every name that is used is there."""

    sources: Mapping[str, Source]
    destinations: Mapping[str, Destination]
    routes: Mapping[str, Route]
    egress: Egress
    table: RouteTable
    files: tuple[Path, ...]
    """What was read, secrets' files and the folders of an include's pattern too: each changes when we must reload."""
    warnings: tuple[str, ...] = ()
    resolved: frozenset[str] = field(default=frozenset(), repr=False)
    """What references were replaced with: secrets, as far as anybody can tell."""
