"""The rules after loading: sources, destinations, routes. Frozen; a reload creates a new `Rules`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Network
from math import isfinite
from pathlib import Path
from ssl import SSLContext
from typing import Literal, NamedTuple

from gateway.bodies.redaction import Redaction
from gateway.model import DeadLettered, DeadReason, ExpressionError
from gateway.rules.batches import split
from gateway.rules.conditions import Condition
from gateway.rules.debounce import Debounce
from gateway.rules.destination_choice import DestinationChoice, UndeclaredDestinationError
from gateway.rules.eligibility import Eligibility
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.rules.file_stamps import Stamps
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.retry_policy import RetryPolicy
from gateway.rules.route_table import RouteTable
from gateway.rules.splits import Split
from gateway.rules.templates import Template
from gateway.verify.client_certificates import CHAIN_SUFFIX, ClientCertificates
from gateway.verify.request import Request
from gateway.verify.verifier import Verifier

RESERVED_HEADERS = frozenset(
    (
        # RFC 9110, section 7.6.1: headers of one connection; and Host and Content-Length, which the client writes.
        *("connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
        *("gateway-event-id", "gateway-delivery-id", "gateway-route", "gateway-attempt"),
    )
)
"""Headers that no sender, route or destination may set; in lower case."""
OPT_IN_HEADERS = frozenset(
    (
        # Who sent a request, from where, and as which user.
        *("forwarded", "x-forwarded", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "client-ip"),
        *("client-cert", "client-cert-chain", "x-client-cert"),  # the first two: RFC 9440
        *("true-client-ip", "cf-connecting-ip", "cf-connecting-ipv6", "fastly-client-ip", "x-azure-clientip"),
        *("x-envoy-external-address", "remote-user", "x-remote-user", "x-webauth-user", "x-goog-iap-jwt-assertion"),
        # What the request is for.
        *("x-rewrite-url", "x-http-method", "x-http-method-override", "x-method-override"),
        "proxy",  # https://httpoxy.org
    )
)
OPT_IN_PREFIXES = (
    *("x-forwarded-", "x-original-"),
    # The user that a proxy has authenticated: oauth2-proxy, AWS (OIDC, client certificates), Google, Azure, Cloudflare.
    *("x-auth-request-", "x-amzn-oidc-", "x-amzn-mtls-", "x-goog-authenticated-user-", "x-ms-client-principal"),
    *("cf-access-", "ssl-client-", "x-ssl-client-"),  # the last two: from nginx's and HAProxy's documentation
)
"""Prefixes of headers that servers trust because their own proxy sets them (full names are above). A sender's are only
forwarded to destinations that ask for them. In lower case."""
SIGNATURE_HEADER_PREFIX = "webhook-"
"""Prefix of the headers that only the gateway sets for a destination with `sign`."""


def cgi_normalized(name: str) -> str:
    """Normalize a header's name like CGI and WSGI, where `X-Real-IP` and `x_real_ip` are the same variable."""
    return name.lower().replace("_", "-")


def is_opt_in_header(name: str) -> bool:
    """Return whether a header is only forwarded to destinations that ask for it."""
    name = cgi_normalized(name)
    return name in OPT_IN_HEADERS or name.startswith(OPT_IN_PREFIXES)


@dataclass(frozen=True, slots=True, kw_only=True)
class AfterDelivery:
    """The destination whose response a sender gets, if it comes within `timeout` seconds of the request."""

    destination: str
    timeout: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """The response to a sender once its event is stored, or if no destination has responded in time.

    Without a body template, or if it can't be rendered, the body is the event's id in JSON. `has_body` is False for
    204.
    """

    status: int = 202
    headers: tuple[tuple[str, Template], ...] = ()
    body: Template | None = None
    after_delivery: AfterDelivery | None = None

    @property
    def has_body(self) -> bool:
        return self.status != HTTPStatus.NO_CONTENT


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLimits:
    """The limits of a source in one ingress process; None if it has no limit of its own.

    `body` is in bytes, `rate` is verified requests per second, `concurrent` is verified requests in progress.
    """

    body: int | None = None
    rate: float | None = None
    concurrent: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A sender: where it posts, how it is verified, what identifies an event.

    `topic` is None for the default topic, which contains the source's name. The expressions default to the scheme's.
    `dedupe` is how many seconds an identity is remembered; None if duplicates are delivered. `response` is None for a
    202. `path` may be a secret: `shown_path` is for display and telemetry. `allow_from` are the networks of its
    clients, without IPv4-mapped ones; None if it accepts requests from anywhere. `client_certificate` is None if
    clients need no certificate. `split` is the path of the list of events in a body; None if a request is one event.
    With a `batch_type`, it only applies to requests with that media type.
    """

    name: str
    path: str = field(repr=False)
    verifier: Verifier
    masked_path: str | None = field(default=None, compare=False)
    """`path` with its references unresolved; None if it has none."""
    id: Expression | None = None
    type: Expression | None = None
    key: Expression | None = None
    topic: str | None = None
    dedupe: float | None = None
    response: StoredResponse | None = None
    allow_from: tuple[IPv4Network | IPv6Network, ...] | None = None
    client_certificate: ClientCertificates | None = None
    proxy_headers: frozenset[bytes] = field(default=frozenset(), compare=False)
    """Headers (lower-case names) that proxies set for the ingress. They aren't forwarded, whoever sent them."""
    limits: SourceLimits = SourceLimits()
    split: tuple[str, ...] | None = None
    batch_type: str | None = None
    quarantine: bool = False
    """Whether requests that failed verification are kept, to be verified again."""
    redaction: Redaction | None = None
    """The values in its events that are hidden from people; None if there are none."""

    def split_body(self, request: Request) -> list[bytes] | None:
        """Return the bodies of a request's events; None if it is one event. Raises RefusedError as `split` does."""
        if self.split is None:
            return None
        if self.batch_type is not None:
            types = request.values(b"content-type")
            if len(types) != 1 or types[0].partition(b";")[0].strip().lower() != self.batch_type.encode():
                return None
        return split(request.content(), self.split)

    @property
    def secret_expiries(self) -> Sequence[float]:
        """Return when each of its secrets expires. Empty if there is a single one that never does."""
        expiries = [lifetime.until for lifetime in self.verifier.lifetimes]
        return expiries if len(expiries) > 1 or any(map(isfinite, expiries)) else ()

    @property
    def awaits_destination(self) -> bool:
        """Return whether its senders wait for a destination's response."""
        return self.response is not None and self.response.after_delivery is not None

    @property
    def shown_path(self) -> str:
        """Return the path without the values of references."""
        return self.path if self.masked_path is None else self.masked_path


class TokenEndpointAuthMethod(StrEnum):
    """Where in the token request the client's id and secret are (RFC 6749, section 2.3.1).

    RFC 7591 calls them client_secret_basic and client_secret_post.
    """

    BASIC = "basic"
    BODY = "body"


@dataclass(frozen=True, slots=True, kw_only=True)
class OAuth2:
    """Client credentials for fetching a token (RFC 6749, section 4.4)."""

    token_url: str = field(repr=False)
    client_id: str = field(repr=False)
    client_secret: str = field(repr=False)
    scope: tuple[str, ...] = ()
    audience: str | None = None
    style: TokenEndpointAuthMethod = TokenEndpointAuthMethod.BASIC


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class Tls:
    """Trusted authorities and our own certificate, as PEM; `context` is built from them. Equal if the texts are equal.

    A `ca` of None means the system's authorities; `certificate` and `key` are both present or neither.
    """

    ca: str | None = field(repr=False)
    certificate: str | None = field(repr=False)
    key: str | None = field(repr=False)
    context: SSLContext = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """An HTTP proxy. `authorization` is the value of `Proxy-Authorization`, if it needs one."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationAccess:
    """How a destination is reached and authenticated, if the URL and headers aren't enough.

    `tls` and `proxy` apply to the token endpoint as well.
    """

    oauth2: OAuth2 | None = None
    tls: Tls | None = None
    proxy: Proxy | None = None


class OnGone(StrEnum):
    """Whether a 410 also pauses the destination, in addition to the dead letter."""

    DEAD_LETTER = "dead_letter"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A downstream URL with its limits. `rate` is requests per second of all processes together; None is unlimited.

    `headers` are added to each request, including basic and bearer authentication. `forward_headers` are headers of the
    sender that are forwarded although they aren't by default, `drop_headers` those that aren't forwarded. `sign` are
    decoded Standard Webhooks secrets, the current one first. `access` is None if the URL is enough.
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
    access: DestinationAccess | None = field(default=None, repr=False)
    on_gone: OnGone = OnGone.DEAD_LETTER


class Target(NamedTuple):
    """A destination of an event. With an `end`, the delivery ends that way without an attempt.

    The destination is "" if the event chooses one that isn't declared.
    """

    destination: str
    end: DeadLettered | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A route: its sources, its conditions on events, its destinations, its retry policy and request."""

    name: str
    sources: tuple[str, ...]
    match: Condition | None
    when: Expression | None
    destinations: tuple[str, ...]
    """All destinations to which it may deliver. With a `choice`, each event goes to some of them."""
    request: RequestTemplate | None
    retry: RetryPolicy
    order: Literal["key"] | None = None
    """With "key", deliveries of the same source and key are made one after another at each destination."""
    on_exhausted: Literal["dead_letter", "halt"] = "dead_letter"
    """For an ordered route: after a delivery has failed for good, the key's next one starts, or the key is halted."""
    eligibility: Eligibility | None = None
    """Which events it takes at all; None if it takes any."""
    choice: DestinationChoice | None = None
    """Which destination an event goes to, besides the `fixed` ones."""
    fixed: tuple[str, ...] = ()
    """With a `choice`, the destinations of every event."""
    stop: bool = False
    """Whether routes after it don't get the events that it takes."""
    catch_all: bool = False
    """Whether it only takes events that no other route takes."""
    split: Split | None = None
    """The list whose items become separate deliveries to each destination."""
    delay: float = 0.0
    """Seconds from an event's receipt until it may be delivered."""
    debounce: Debounce | None = None
    """Which of its events supersede one another. A debounced route is ordered, by the same key."""

    @property
    def fan_out(self) -> int:
        """How many deliveries an event becomes without a `split`."""
        return len(self.destinations) if self.choice is None else len(self.fixed) + 1

    def is_chosen(self, destination: str) -> bool:
        """Return whether only some events go to a destination. It may also be an undeclared one."""
        return self.choice is not None and destination not in self.fixed

    def targets(self, view: EventView, error: ExpressionError | None) -> tuple[Target, ...]:
        """Return the targets of an event that the route takes, or for which its condition failed with an `error`."""
        end = None if error is None else DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error))
        if self.choice is None:
            return tuple([Target(name, end) for name in self.destinations])
        chosen = [target for target in self.chosen(view, end) if target.destination not in self.fixed]
        return *[Target(name, end) for name in self.fixed], *chosen

    def chosen(self, view: EventView, end: DeadLettered | None = None) -> tuple[Target, ...]:
        """Return the target that an event chooses, even if it is a fixed one as well. Never empty.

        Without a `choice`, return all targets.
        """
        if self.choice is None:
            return self.targets(view, None)
        try:
            name = self.choice.of(view)
        except ExpressionError as error:
            is_undeclared = isinstance(error, UndeclaredDestinationError)
            reason = DeadReason.UNKNOWN_DESTINATION if is_undeclared else DeadReason.EXPRESSION_ERROR
            return (Target("", end or DeadLettered(reason=reason, detail=str(error))),)
        return (Target(name, end),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Egress:
    """Where deliveries may connect to.

    `allow` overrides every refusal; link-local and metadata addresses must be listed individually.
    """

    is_private_allowed: bool = True
    allow: tuple[IPv4Network | IPv6Network, ...] = ()


class CertificateFormat(StrEnum):
    """The format in which a proxy passes on a client certificate in a header."""

    XFCC = "xfcc"
    PEM = "pem"
    RFC9440 = "rfc9440"


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateHeader:
    """The header in which trusted proxies pass on client certificates."""

    name: str
    format: CertificateFormat

    @property
    def headers(self) -> frozenset[bytes]:
        """Return the lower-case names of the header, and of the one with the rest of the chain."""
        name = self.name.lower().encode()
        return frozenset((name, name + CHAIN_SUFFIX))


@dataclass(frozen=True, slots=True)
class RoutingRevision:
    """The part of a rules version that decides where events go. `name` is its digest, `routes` are JSON by name."""

    name: str
    routes: Mapping[str, str]


class Contact(NamedTuple):
    """The owner of a source, route or destination, and the URL of its runbook; "" if unknown."""

    owner: str = ""
    runbook: str = ""


NOBODY = Contact()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """One version of the rules. It is consistent: every name that is used is defined."""

    sources: Mapping[str, Source]
    destinations: Mapping[str, Destination]
    routes: Mapping[str, Route]
    egress: Egress
    table: RouteTable[Route]
    files: tuple[Path, ...]
    """Files to watch: rule files, secret files, and folders of include patterns. A reload is due if one changes."""
    stamps: Stamps = field(default_factory=dict, compare=False, repr=False)
    """The stamps of these files, from right before each was read."""
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()
    """Networks of the proxies whose `X-Forwarded-For` and `certificate_header` are trusted."""
    certificate_header: CertificateHeader | None = None
    warnings: tuple[str, ...] = ()
    contacts: Mapping[tuple[str, str], Contact] = field(default_factory=dict)
    """The contacts by kind ("source", "route", "destination") and name, where there is one."""
    secret_values: frozenset[str] = field(default=frozenset(), repr=False)
    """The substituted values of `${…}` references, which are treated as secrets."""
    version: str = field(default="", compare=False)
    """A digest (8 hexadecimal digits) of the rule files' texts; "" for rules that weren't loaded from files."""
    routing_revision: RoutingRevision | None = field(default=None, compare=False, repr=False)
    """Computed while loading, off the event loop; None for rules that weren't loaded from files."""

    def named(self, route: str, destination: str) -> tuple[Route | None, Destination | None]:
        """Return a route and a destination by name; None for each that doesn't exist."""
        return self.routes.get(route), self.destinations.get(destination)

    def contact_of(self, route: str, destination: str) -> Contact:
        """Return the contact for a delivery: its route's, otherwise its destination's."""
        return self.contacts.get(("route", route)) or self.contacts.get(("destination", destination)) or NOBODY

    @property
    def redactions(self) -> Mapping[str, Redaction]:
        """Return the redactions by source name, of sources that have one."""
        return {name: source.redaction for name, source in self.sources.items() if source.redaction is not None}

    @property
    def has_responses(self) -> bool:
        """Return whether any source's senders wait for a destination's response."""
        return any(source.awaits_destination for source in self.sources.values())

    @property
    def client_authorities(self) -> frozenset[bytes]:
        """Return the certificates (DER) of all authorities for client certificates."""
        demanded = [source.client_certificate for source in self.sources.values() if source.client_certificate]
        return frozenset([authority for each in demanded for authority in each.authorities])

    @property
    def ordered(self) -> frozenset[tuple[str, str]]:
        """Return all pairs of an ordered route and one of its destinations."""
        routes = [route for route in self.routes.values() if route.order is not None]
        return frozenset((route.name, destination) for route in routes for destination in route.destinations)
