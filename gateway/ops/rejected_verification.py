"""Verifies a refused request again: over the same bytes, as of the time of its receipt, by today's rules.

It was fresh then, and its record says when it was stored, by the log's clock, which mustn't be much later. A secret
that has expired since verifies nothing, and an address that the source doesn't allow any more isn't allowed. A client's
certificate isn't kept: it is only known that it met what was demanded then, so if anything else is demanded now, the
request is refused.
"""

import time
from dataclasses import replace
from ipaddress import ip_address

from gateway.model import Event, RefusedError, UnfetchedError, event_id, identity_of
from gateway.ops.rejected import Rejected
from gateway.quarantine.records import RejectedRequest
from gateway.rules.event_builder import EventBuilder
from gateway.rules.rules import Source
from gateway.verify.kept_proof import revealed
from gateway.verify.remote_keys import (
    MAX_DOCUMENT_BYTES,
    MAX_KEYS_OF_REQUEST,
    Fetch,
    KeyCache,
    KeyNeededError,
    key_unavailable,
)
from gateway.verify.request import Reason, Request, refused
from gateway.verify.verifier import Verified

FETCH_TIMEOUT = 5.0
MAX_FAILING = 60.0
"""Seconds that addresses of keys which couldn't be fetched have taken in all after which no other is tried."""


class RepeatedVerification:
    """Verifies refused requests of a source again. `today` is in Unix seconds, by the clock of this machine."""

    def __init__(self, source: Source, *, today: float, fetch: Fetch | None = None) -> None:
        self._source = source
        self._today = today
        self._fetch = fetch
        self._documents: dict[str, bytes] = {}
        self._unfetched: dict[str, str] = {}  # address → why
        self._failing = 0.0  # seconds that these have taken
        self._builder = EventBuilder(source)

    async def events(self, found: Rejected, request: RejectedRequest, *, received_at: float) -> list[Event] | None:
        """Return the events of a request, None if it is a handshake. Raises RefusedError if it is still refused."""
        source, verifier = self._source, self._source.verifier
        _check_client(source, request)
        kept = Request(request.method, source.path, request.query, request.headers, request.body)
        received = revealed(verifier, kept, request.credentials, request.salt, now=self._today)
        try:
            verified = await self._verify(received, request.at)
        except RefusedError as error:
            if request.credentials and received is kept and error.reason == Reason.MISSING_CREDENTIALS:
                raise refused(Reason.BAD_CREDENTIALS, "the credential isn't one of today's") from error
            raise
        if verified.secret is not None and verifier.lifetimes[verified.secret].until <= self._today:
            raise refused(Reason.BAD_SIGNATURE, "the secret that verifies it has expired since")
        if verifier.handshake(received, now=request.at) is not None:
            return None
        bodies = source.split_body(received)
        if bodies is None:
            events = [self._builder.event(received, received_at=received_at, identity_expression=verified.identity)]
        else:
            events = self._builder.events(
                received, bodies, received_at=received_at, identity_expression=verified.identity
            )
        return [_with_own_id(event, found, request, number) for number, event in enumerate(events)]

    async def _verify(self, received: Request, at: float) -> Verified:
        """Verify a request as of a time, with the keys that it names."""
        keys = KeyCache()
        for _ in range(MAX_KEYS_OF_REQUEST):
            try:
                return self._source.verifier.verify(received, now=at, keys=keys)
            except KeyNeededError as needed:
                try:
                    keys.keep(needed.url, await self._document(needed.url, needed.request_body), at)
                except (UnfetchedError, ValueError) as error:
                    raise key_unavailable(str(error)) from error
        try:
            return self._source.verifier.verify(received, now=at, keys=keys)
        except KeyNeededError as error:
            raise key_unavailable("it would be one too many") from error

    async def _document(self, url: str, request_body: bytes) -> bytes:
        if url not in self._documents:
            if self._fetch is None:
                raise key_unavailable("nothing is fetched here")
            if url in self._unfetched:
                raise key_unavailable(self._unfetched[url])
            if self._failing >= MAX_FAILING:
                raise key_unavailable("nothing else is fetched, as that has failed for long: retry fewer requests")
            began = time.monotonic()
            try:
                self._documents[url] = await self._fetch(
                    url, timeout=FETCH_TIMEOUT, limit=MAX_DOCUMENT_BYTES, request_body=request_body
                )
            except (UnfetchedError, ValueError) as error:
                self._unfetched[url] = str(error)
                self._failing += time.monotonic() - began
                raise
        return self._documents[url]


def _check_client(source: Source, request: RejectedRequest) -> None:
    """Refuse a request by what is demanded of its client now, as far as is known of it. Raises RefusedError."""
    if source.allow_from is not None:
        try:
            address = ip_address(request.address)
        except ValueError:  # it couldn't be told, or the record is another's
            address = None
        if address is None or not any(address in network for network in source.allow_from):
            raise RefusedError(403, "address_refused", "expected a request from an address that this source allows")
    demanded = source.client_certificate
    if demanded is not None and request.certificate != demanded.digest:
        raise RefusedError(
            403,
            "client_certificate_unknown",
            "expected a request whose client has shown the certificate that this source demands now, got one that "
            "met another demand, or none",
        )


def _with_own_id(event: Event, found: Rejected, request: RejectedRequest, number: int) -> Event:
    """Give an event without an identity an id made from the position of its request: the same in every retry."""
    if identity_of(event.id) is not None:
        return event
    name = f"{found.partition.topic}/{found.position} {request.at:.6f} {number}"
    return replace(event, id=event_id(event.source, f"rejected\0{name}"))
