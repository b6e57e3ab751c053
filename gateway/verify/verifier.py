"""Verifies requests by a scheme and its secrets; pure once it is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.model import RefusedError, UsageError
from gateway.verify.check import BodyCheck, Check, Draft, SigningSpec
from gateway.verify.config_reader import Path
from gateway.verify.content import Content
from gateway.verify.credentials import Unverified
from gateway.verify.handshakes import Handshake, HandshakeKeys, HandshakeResponse
from gateway.verify.key_ring import SecretLifetime
from gateway.verify.preset_keys import PresetResponse
from gateway.verify.remote_keys import KeyCache, KeyNeededError
from gateway.verify.request import Request, preferred_refusal
from gateway.verify.signatures import SignatureCheck


class Verified(NamedTuple):
    """By what a request was verified: where its identity is (CEL; None if nowhere), and by which secret.

    `secret` is the secret's index in the verifier's `lifetimes`, None if it isn't there. Only operators may know it.
    """

    identity: str | None
    secret: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """A scheme with its secrets. Created by `build_verifier` only.

    `id` and `type` are CEL: where this scheme's events have their identity and type, if anywhere; `ids` has the
    identity's place for each of the checks, since each signing method covers other headers.
    The headers (lower-case names) and query parameters that carry a credential must go no further than the ingress.
    `dedupe` is for how many seconds a repeated event should be treated as a duplicate; None if the provider never
    redelivers automatically. `lifetimes` are those of the source's secrets, then of its public keys. With
    `fetches_keys`, a request may need a key that has to be fetched. `warnings` are what makes it weaker than it looks:
    the path below `verify`, and the text.
    """

    scheme: str
    id: str | None
    type: str | None
    credential_headers: frozenset[bytes]
    credential_query: frozenset[str]
    checks: tuple[Check, ...] = field(repr=False)
    ids: tuple[str | None, ...] = ()
    sends: tuple[tuple[str, str], ...] = ()
    respond_to_handshake: Handshake | None = None
    handshake_keys: HandshakeKeys = field(default=HandshakeKeys(), repr=False)
    dedupe: float | None = None
    response: PresetResponse | None = None
    split: tuple[str, ...] | None = None
    batch_type: str | None = None
    lifetimes: tuple[SecretLifetime, ...] = field(default=(), repr=False)
    fetches_keys: bool = False
    warnings: tuple[tuple[Path, str], ...] = field(default=(), compare=False)
    _results: tuple[Mapping[int | None, Verified], ...] = field(init=False, compare=False, repr=False)
    """For each check, by the index of the secret: what a request is verified by. Made once, for all requests."""

    def __post_init__(self) -> None:
        indexes = (None, *range(len(self.lifetimes)))
        results = tuple([{index: Verified(identity, index) for index in indexes} for identity in self.ids])
        object.__setattr__(self, "_results", results)

    @property
    def is_open(self) -> bool:
        """Return whether anybody is let in: nothing is verified."""
        return any(isinstance(check, Unverified) for check in self.checks)

    @property
    def signing_specs(self) -> Sequence[SigningSpec]:
        """Return for each signing method where its signature or credential is."""
        return [check.signing_spec() for check in self.checks]

    def verify(self, request: Request, *, now: float, keys: KeyCache | None = None) -> Verified:
        """Return by what the request is verified: the identity is that of the signing method that verifies it.

        `now` is in Unix seconds; `keys` are those that were fetched. Raises RefusedError with a `Reason` if none does
        (401; 503 if a key can't be fetched); its detail says what was expected where, never which secret failed. Raises
        KeyNeededError if that depends on a key that must be fetched.
        """
        if len(self.checks) == 1:
            return self._results[0][self.checks[0].check_head(request, now)(request, Content(request, keys, now))]
        return self.check_head(request, now=now).verify(request, keys)

    def check_head(self, head: Request, *, now: float) -> "PendingVerification":
        """Check what the headers and the query alone decide, and return what remains to be verified with the body.

        So no body is read or kept in memory that couldn't be accepted anyway. The body of `head` is ignored. Raises
        RefusedError as `verify` does.
        """
        if len(self.checks) == 1:
            return PendingVerification(((self.checks[0].check_head(head, now), self._results[0]),), (), now)
        open_: list[tuple[BodyCheck, Mapping[int | None, Verified]]] = []
        refusals: list[RefusedError] = []
        for check, results in zip(self.checks, self._results, strict=True):
            try:
                open_.append((check.check_head(head, now), results))
            except RefusedError as error:
                refusals.append(error.with_traceback(None))
        if not open_:
            raise preferred_refusal(refusals)
        return PendingVerification(open_, refusals, now)

    def handshake(self, request: Request, *, now: float) -> HandshakeResponse | None:
        """Return the response to a provider's handshake; None if the request is an event. Verify the request first."""
        if self.respond_to_handshake is None or self.respond_to_handshake.methods:
            return None
        return self.respond_to_handshake.respond(request, self.handshake_keys.at(now))

    @property
    def is_pending(self) -> bool:
        """Return whether a token is awaited that is to be shown to operators."""
        return self.respond_to_handshake is not None and self.respond_to_handshake.shows_token

    @property
    def handshake_methods(self) -> tuple[str, ...]:
        """Return the methods of the requests that may be a handshake without being verified."""
        return () if self.respond_to_handshake is None else self.respond_to_handshake.methods

    def unverified_handshake(self, head: Request, *, now: float) -> HandshakeResponse | None:
        """Return the response to a handshake that comes unverified; None if it isn't one.

        `head` is a request of one of the `handshake_methods`, without its body. Raises RefusedError.
        """
        if self.respond_to_handshake is None:
            return None
        return self.respond_to_handshake.respond(head, self.handshake_keys.at(now))

    def sign(
        self,
        body: bytes,
        *,
        now: float,
        id: str,  # noqa: A002 - CloudEvents' attribute, as a keyword
        type: str,  # noqa: A002 - CloudEvents' attribute, as a keyword
        headers: Mapping[str, str],
        method: str = "POST",
        path: str = "/",
        query: str = "",
    ) -> list[tuple[str, str]]:
        """Return `headers`, followed by those that the sender would add: identity, type, timestamp, signature.

        A given header takes precedence over ours, and is what gets signed; so a forged one stays forged. Signs with the
        first secret that hasn't expired. What the scheme has in the body must be there already: identity and type, and
        what `complete` writes.
        Raises UsageError for a signed header that only the caller can know, and if every secret has expired.
        """
        draft = Draft(headers)
        for name, template in self.sends:
            draft.add(name, template.replace("{id}", id).replace("{type}", type))
        unsigned = Request(method=method, path=path, query=query, headers=(), body=body)
        try:
            self.checks[0].sign(draft, unsigned, now, id)
        except RefusedError as error:  # what is signed isn't in the request
            raise UsageError(f"a test event for this source: {error.detail}") from error
        return draft.pairs()

    def complete(
        self,
        body: bytes,
        *,
        now: float,
        headers: Mapping[str, str],
        path: str = "/",
        query: str = "",
        is_forged: bool = False,
    ) -> bytes:
        """Return a body with the time and the signature, where the sender writes them into it: as it is for most.

        A forged signature is that of another text. Raises UsageError for a body that has no place for them.
        """
        check = self.checks[0]
        if not isinstance(check, SignatureCheck):
            return body
        request = Request(method="POST", path=path, query=query, headers=Draft(headers).raw(), body=body)
        try:
            return check.complete(request, now, is_forged=is_forged).body
        except RefusedError as error:
            raise UsageError(f"a test event for this source: {error.detail}") from error

    def signed_query(self, *, now: float) -> str:
        """Return the query string by which the sender would authenticate; empty if it doesn't use the query."""
        return self.checks[0].query(now)


class PendingVerification:
    """A request whose head has been checked, with the body checks of the signing methods that are still possible."""

    __slots__ = ("_now", "_open", "_refusals")

    def __init__(
        self,
        open_: Sequence[tuple[BodyCheck, Mapping[int | None, Verified]]],
        refusals: Sequence[RefusedError],
        now: float,
    ) -> None:
        self._open = open_
        self._refusals = refusals
        self._now = now

    def verify(self, request: Request, keys: KeyCache | None = None) -> Verified:
        """Return by what it is verified, if any of the body checks passes. Raises as `Verifier.verify` does."""
        content = Content(request, keys, self._now)
        refusals: list[RefusedError] = []
        needed: tuple[str, bytes] | None = None
        for check_body, results in self._open:
            try:
                verified = results[check_body(request, content)]
            except KeyNeededError as error:
                needed = needed or (error.url, error.request_body)
            except RefusedError as error:
                refusals.append(error.with_traceback(None))
            else:
                return verified
        if needed is not None:
            raise KeyNeededError(*needed)
        raise preferred_refusal([*refusals, *self._refusals])
