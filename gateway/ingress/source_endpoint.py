"""A source as the ingress needs it, for as long as a version of the rules is active; and the proxies in front."""

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from aiohttp import web

from gateway.ingress.admission import Admission
from gateway.ingress.body_memory import Share
from gateway.ingress.certificate_headers import certificate_in
from gateway.ingress.client_address import Address, Networks, client_address, parse_address
from gateway.ingress.server import TlsConnection, peer_of
from gateway.log.topics import Topics
from gateway.model import RefusedError
from gateway.rules.event_builder import EventBuilder
from gateway.rules.rules import CertificateHeader, Source
from gateway.telemetry.metrics import Metrics
from gateway.verify.client_certificates import (
    CHAIN_SUFFIX,
    ForwardedCertificate,
    VerifiedCertificate,
    refused_name,
)
from gateway.verify.remote_keys import KeyCache

NO_LIMIT = 1 << 62
X_FORWARDED_FOR = b"x-forwarded-for"
MAX_SUBJECT = 200  # characters of it in a log line


class Proxies:
    """The trusted proxies: what they say of the clients behind them."""

    __slots__ = ("_chain_header", "_format", "_header", "_networks")

    def __init__(
        self, networks: Iterable[IPv4Network | IPv6Network] = (), certificate_header: CertificateHeader | None = None
    ) -> None:
        self._networks = Networks(networks)
        self._format = None if certificate_header is None else certificate_header.format
        self._header = b"" if certificate_header is None else certificate_header.name.lower().encode()
        self._chain_header = self._header + CHAIN_SUFFIX

    def client_of(self, request: web.BaseRequest) -> Address | None:
        """Return whose request it is; None if that can't be told."""
        forwarded_for = [value for name, value in request.raw_headers if name.lower() == X_FORWARDED_FOR]
        return client_address(peer_of(request), forwarded_for, self._networks)

    def certificate_of(self, request: web.BaseRequest) -> VerifiedCertificate | ForwardedCertificate | None:
        """Return the client's certificate; None if it has none.

        It is the connection's, unless that is a trusted proxy's: then it is in the header, and the connection's is the
        proxy's own. Raises RefusedError for a header that is malformed.
        """
        if self._format is not None and (peer := parse_address(peer_of(request))) and peer in self._networks:
            headers = [(name.lower(), value) for name, value in request.raw_headers]
            values = [value for name, value in headers if name == self._header]
            chain = [value for name, value in headers if name == self._chain_header]
            return certificate_in(self._format, values, chain)
        connection = request.protocol
        return connection.certificate if isinstance(connection, TlsConnection) else None


class SourceEndpoint:
    """A source, with what is computed once per version of the rules."""

    __slots__ = (
        "accepted",
        "admission",
        "after_delivery",
        "allow",
        "allow_from",
        "body_limit",
        "event",
        "events",
        "events_of",
        "fetches_keys",
        "handshake_methods",
        "has_head_checks",
        "keys",
        "last",
        "name",
        "proxies",
        "response",
        "seconds",
        "secret_uses",
        "secrets",
        "share",
        "source",
        "split",
        "status",
        "topic",
    )

    def __init__(
        self,
        source: Source,
        topics: Topics,
        metrics: Metrics,
        *,
        share: Share,
        keys: KeyCache,
        admission: Admission | None,
        proxies: Proxies,
    ) -> None:
        self.name = source.name
        self.source = source
        self.topic = source.topic or topics.events(source.name)
        self.response = source.response
        self.after_delivery = None if source.response is None else source.response.after_delivery
        self.status = 202 if source.response is None else source.response.status
        self.accepted = metrics.requests.labels(source.name, str(self.status))
        self.events = metrics.events.labels(source.name)
        self.last = metrics.last_event_timestamp.labels(source.name)
        self.seconds = metrics.request_duration.labels(source.name)
        self.secrets, self.secret_uses = metrics.events_by_secret(source.name, source), metrics.secret_uses
        self.share = share
        self.keys = keys
        self.admission = admission
        """None if neither its rate nor its requests in progress are limited."""
        self.allow_from = None if source.allow_from is None else Networks(source.allow_from)
        self.proxies = proxies
        self.body_limit = NO_LIMIT if source.limits.body is None else source.limits.body
        builder = EventBuilder(source)
        self.event, self.events_of = builder.event, builder.events
        self.split = source.split
        self.fetches_keys = source.verifier.fetches_keys
        self.handshake_methods = source.verifier.handshake_methods
        has_conditions = source.allow_from is not None or source.client_certificate is not None
        self.has_head_checks = has_conditions or bool(self.handshake_methods)
        """Whether its client, or a handshake, has to be checked before the body is read."""
        self.allow = ", ".join(dict.fromkeys(("POST", *self.handshake_methods)))

    def count(self, at: float, secret: int | None) -> None:
        """Count an event that is stored, and the secret that verified it: for operators alone."""
        self.events.inc()
        self.last.set(at)
        if self.secrets and secret is not None:
            self.secrets[secret].inc()
            self.secret_uses.add(self.name, secret, at=at)

    def check_client(self, request: web.BaseRequest, fields: dict[str, Any], *, now: float) -> None:
        """Refuse a request from elsewhere than `allow_from`, or without a certificate that the source demands.

        Its log line gets the address, or the subject of a certificate of the right authority.
        """
        if self.allow_from is not None:
            address = self.proxies.client_of(request)
            if address is None or address not in self.allow_from:
                if address is not None:
                    fields["address"] = str(address)
                raise RefusedError(403, "address_refused", "expected a request from an address that this source allows")
        demanded = self.source.client_certificate
        if demanded is not None:
            subject = demanded.check(self.proxies.certificate_of(request), now=now)
            if subject is not None:
                fields["certificate"] = subject[:MAX_SUBJECT]
                raise refused_name()

    def sender_of(self, request: web.BaseRequest) -> str:
        """Return the client's address; "" if that can't be told."""
        address = self.proxies.client_of(request)
        return "" if address is None else str(address)
