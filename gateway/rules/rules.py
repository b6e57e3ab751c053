"""What a rule file means, once read: sources, destinations, routes. Frozen; a reload makes a new `Rules`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from ssl import SSLContext
from typing import Literal

from gateway.model import RetryPolicy
from gateway.rules.conditions import Condition
from gateway.rules.expressions import Expression
from gateway.rules.route_table import RouteTable
from gateway.rules.templates import Template
from gateway.verify.verifier import Verifier

RESERVED_HEADERS = frozenset(
    (
        # RFC 9110, section 7.6.1: what belongs to one connection; with Host and Content-Length, the client's to write.
        *("connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
        *("gateway-event-id", "gateway-delivery-id", "gateway-route", "gateway-attempt"),
    )
)
"""Headers that neither a sender, a route nor a destination sets; in lower case."""
HELD_BACK_HEADERS = frozenset(
    (
        # Who has sent a request, from where, and as whom.
        *("forwarded", "x-forwarded", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "client-ip"),
        *("true-client-ip", "cf-connecting-ip", "remote-user", "x-remote-user"),
        # What it asks for.
        *("x-rewrite-url", "x-http-method", "x-http-method-override", "x-method-override"),
        "proxy",  # https://httpoxy.org
    )
)
HELD_BACK_BEGINNINGS = ("x-forwarded-", "x-original-")
"""What servers believe of a request because their own proxy says so: no sender's word reaches a destination that
doesn't ask for it. In lower case."""
SIGNED_HEADERS = "webhook-"
"""What those begin with that nobody else sets where a destination has `sign`."""


def folded(name: str) -> str:
    """Return a header's name as CGI and WSGI know it: they make one variable of `X-Real-IP` and `x_real_ip`."""
    return name.lower().replace("_", "-")


def is_held_back(name: str) -> bool:
    """Return whether a header isn't passed on unless a destination asks for it."""
    name = folded(name)
    return name in HELD_BACK_HEADERS or name.startswith(HELD_BACK_BEGINNINGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A sender: where it posts, how it is verified, what identifies an event.

    `topic` is None for the default topic of the source's name. The expressions fall back to the scheme's own. `dedupe`
    is for how many seconds an identity that has come is remembered, None where what comes again is delivered again.
    """

    name: str
    path: str
    verifier: Verifier
    id: Expression | None = None
    type: Expression | None = None
    key: Expression | None = None
    topic: str | None = None
    dedupe: float | None = None


class TokenStyle(StrEnum):
    """Where a client's id and secret stand in the request for a token (RFC 6749, section 2.3.1)."""

    BASIC = "basic"
    BODY = "body"


@dataclass(frozen=True, slots=True, kw_only=True)
class OAuth2:
    """Client credentials (RFC 6749, section 4.4), for which a token is fetched."""

    token_url: str = field(repr=False)
    client_id: str = field(repr=False)
    client_secret: str = field(repr=False)
    scope: tuple[str, ...] = ()
    audience: str | None = None
    style: TokenStyle = TokenStyle.BASIC


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Whom we trust and who we are, as PEM. Two are equal if the texts are; `context` is what was made of them.

    `ca` None is the system's trust; `certificate` and `key` are both there or neither.
    """

    ca: str | None = field(repr=False)
    certificate: str | None = field(repr=False)
    key: str | None = field(repr=False)
    context: SSLContext = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """An HTTP proxy. `authorization` is the value of `Proxy-Authorization`, if it wants one."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a destination is reached, and proves who calls, where headers aren't enough.

    `tls` and `proxy` hold for the token endpoint as well.
    """

    oauth2: OAuth2 | None = None
    tls: Tls | None = None
    proxy: Proxy | None = None


class OnGone(StrEnum):
    """What a 410 leads to beside the dead letter."""

    DEAD_LETTER = "dead_letter"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A downstream URL with its limits. `rate` is events a second, over the whole fleet; None is unlimited.

    `headers` are added to each request; basic and bearer authentication are among them. `forward_headers` are the
    sender's that are passed on though they are otherwise held back, `drop_headers` those that aren't. `sign` are
    Standard Webhooks secrets, decoded, the current one first. `access` is None where there is nothing to it but the
    URL.
    """

    name: str
    url: str = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    forward_headers: tuple[str, ...] = ()
    drop_headers: tuple[str, ...] = ()
    sign: tuple[bytes, ...] = field(default=(), repr=False)
    timeout: float = 10.0
    concurrency: int = 50
    rate: float | None = None
    access: Access | None = field(default=None, repr=False)
    on_gone: OnGone = OnGone.DEAD_LETTER


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
    order: Literal["key"] | None = None
    """With "key", the deliveries of one source and key follow each other at each destination."""
    on_exhausted: Literal["dead_letter", "halt"] = "dead_letter"
    """What becomes of an ordered key whose delivery has ended without success: the next begins, or all wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Egress:
    """Where deliveries may connect to.

    `allow` overrides every refusal; that of link-local and metadata addresses only where it has the very address.
    """

    is_private_allowed: bool = True
    allow: tuple[IPv4Network | IPv6Network, ...] = ()


@dataclass(frozen=True, slots=True)
class RoutingRevision:
    """What decides where events go, by its digest: the routes, by name, as JSON (`edition.py`)."""

    name: str
    routes: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """One version of the rules, whole and consistent: every name that is used is there."""

    sources: Mapping[str, Source]
    destinations: Mapping[str, Destination]
    routes: Mapping[str, Route]
    egress: Egress
    table: RouteTable[Route]
    files: tuple[Path, ...]
    """What was read, secrets' files and the folders of an include's pattern too: each changes when we must reload."""
    warnings: tuple[str, ...] = ()
    resolved: frozenset[str] = field(default=frozenset(), repr=False)
    """What references were replaced with: secrets, as far as anybody can tell."""
    routing_revision: RoutingRevision | None = field(default=None, compare=False, repr=False)
    """What the routes match, as the log keeps it, where that was worked out beside the event loop."""

    @property
    def ordered(self) -> frozenset[tuple[str, str]]:
        """Return each ordered route with each of its destinations."""
        routes = [route for route in self.routes.values() if route.order is not None]
        return frozenset((route.name, destination) for route in routes for destination in route.destinations)
