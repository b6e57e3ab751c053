"""A source as the ingress needs it, for as long as a version of the rules is active."""

from typing import Any

from aiohttp import web

from gateway.ingress.admission import Admission
from gateway.ingress.body_memory import Share
from gateway.ingress.client_address import Address, Networks, client_address
from gateway.log.topics import Topics
from gateway.model import RefusedError
from gateway.rules.event_builder import EventBuilder
from gateway.rules.rules import Source
from gateway.telemetry.metrics import Metrics
from gateway.verify.remote_keys import KeyCache

NO_LIMIT = 1 << 62
X_FORWARDED_FOR = b"x-forwarded-for"


class Endpoint:
    """A source, with what is computed once per version of the rules."""

    __slots__ = (
        "_trusted_proxies",
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
        trusted_proxies: Networks,
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
        self._trusted_proxies = trusted_proxies
        self.body_limit = NO_LIMIT if source.limits.body is None else source.limits.body
        builder = EventBuilder(source)
        self.event, self.events_of = builder.event, builder.events
        self.split = source.split
        self.fetches_keys = source.verifier.fetches_keys
        self.handshake_methods = source.verifier.handshake_methods
        self.has_head_checks = self.allow_from is not None or bool(self.handshake_methods)
        """Whether its address or a handshake is looked at before all else."""
        self.allow = ", ".join(dict.fromkeys(("POST", *self.handshake_methods)))

    def count(self, at: float, secret: int | None) -> None:
        """Count an event that is stored, and the secret that verified it: for operators alone."""
        self.events.inc()
        self.last.set(at)
        if self.secrets and secret is not None:
            self.secrets[secret].inc()
            self.secret_uses.add(self.name, secret, at=at)

    def check_address(self, request: web.BaseRequest, fields: dict[str, Any]) -> None:
        """Refuse a request from elsewhere than `allow_from`; its log line gets the address, if that can be told."""
        if self.allow_from is None:
            return
        address = self._client_address(request)
        if address is None or address not in self.allow_from:
            if address is not None:
                fields["address"] = str(address)
            raise RefusedError(403, "address_refused", "expected a request from an address that this source allows")

    def sender_of(self, request: web.BaseRequest) -> str:
        """Return the client's address; "" if that can't be told."""
        address = self._client_address(request)
        return "" if address is None else str(address)

    def _client_address(self, request: web.BaseRequest) -> Address | None:
        forwarded_for = [value for name, value in request.raw_headers if name.lower() == X_FORWARDED_FOR]
        return client_address(request.remote or "", forwarded_for, self._trusted_proxies)
