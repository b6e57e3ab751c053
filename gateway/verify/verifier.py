"""Who sent a request: a scheme with its secrets, pure once it is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway.model import RefusedError
from gateway.verify.config_keys import Path
from gateway.verify.handshakes import Answer, Handshake
from gateway.verify.request import Request, most_specific
from gateway.verify.signatures import Check, DigestCache, Draft, Proof, SigningSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """A scheme with its secrets. Made by `build_verifier` only.

    `id` and `type` are CEL: where this scheme's events have their identity and type, if they have them anywhere; `ids`
    are where they have it by each of the checks, as another way to sign vouches for another header.
    The headers (lower-case names) and query parameters that carry a credential must go no further than the ingress.
    `dedupe` is for how many seconds a repeated event should be taken for a copy, None where the provider never repeats
    by itself, or on purpose only. `warnings` are what makes it weaker than it looks: where below `verify`, and what.
    """

    scheme: str
    id: str | None
    type: str | None
    credential_headers: frozenset[bytes]
    credential_query: frozenset[str]
    checks: tuple[Check, ...] = field(repr=False)
    ids: tuple[str | None, ...] = ()
    sends: tuple[tuple[str, str], ...] = ()
    answers: Handshake | None = None
    dedupe: float | None = None
    warnings: tuple[tuple[Path, str], ...] = field(default=(), compare=False)

    @property
    def how(self) -> Sequence[SigningSpec]:
        """Return where each of the ways to sign has its proof."""
        return [check.how() for check in self.checks]

    def verify(self, request: Request, *, now: float) -> str | None:
        """Return if any way to sign that the scheme knows holds; `now` is in Unix seconds.

        What is returned is where, by that way, the identity is, in CEL; None if nowhere.

        Raises RefusedError (401) with a `Reason`; its detail says what was expected where, never which secret failed.
        """
        if len(self.checks) == 1:
            self.checks[0].check_head(request, now)(request, [])
            return self.ids[0]
        return self.check_head(request, now=now).prove(request)

    def check_head(self, head: Request, *, now: float) -> "Claim":
        """Check what the headers and the query alone decide, and return what is left for the body to prove.

        Nobody's body needs to be waited for, nor held, who couldn't be let in with any. The body of `head` isn't looked
        at. Raises RefusedError as `verify` does.
        """
        if len(self.checks) == 1:
            return Claim(((self.checks[0].check_head(head, now), self.ids[0]),), ())
        open_: list[tuple[Proof, str | None]] = []
        refusals: list[RefusedError] = []
        for check, identity in zip(self.checks, self.ids, strict=True):
            try:
                open_.append((check.check_head(head, now), identity))
            except RefusedError as error:
                refusals.append(error)
        if not open_:
            raise most_specific(refusals)
        return Claim(open_, refusals)

    def handshake(self, request: Request) -> Answer | None:
        """Return what a provider's handshake must be answered, None if the request is an event. Verify it first."""
        return None if self.answers is None else self.answers(request)

    def sign(
        self,
        body: bytes,
        *,
        now: float,
        id: str,  # noqa: A002 - the word of the glossary, as a keyword
        type: str,  # noqa: A002 - the word of the glossary, as a keyword
        headers: Mapping[str, str],
        method: str = "POST",
        path: str = "/",
        query: str = "",
    ) -> list[tuple[str, str]]:
        """Return `headers` and after them those that the sender would add: identity, type, timestamp, signature.

        A given header wins over ours, and is what gets signed; so a forged one stays forged. Signs with the first
        secret. An identity or type that the scheme has in the body must be there already. Raises UsageError for a
        header that is signed and that only the caller can know.
        """
        draft = Draft(headers)
        for name, template in self.sends:
            draft.add(name, template.replace("{id}", id).replace("{type}", type))
        unsigned = Request(method=method, path=path, query=query, headers=(), body=body)
        self.checks[0].sign(draft, unsigned, now, id)
        return draft.pairs()

    def signed_query(self) -> str:
        """Return the query string by which the sender would authenticate, empty if it doesn't do it there."""
        return self.checks[0].query()


class Claim:
    """What the head of a request claims, by each of the ways to sign that it may hold by."""

    __slots__ = ("_open", "_refusals")

    def __init__(self, open_: Sequence[tuple[Proof, str | None]], refusals: Sequence[RefusedError]) -> None:
        self._open = open_
        self._refusals = refusals

    def prove(self, request: Request) -> str | None:
        """Return where the identity is, if the whole request holds by any of the ways; else as `Verifier.verify`."""
        digests: DigestCache = []
        refusals: list[RefusedError] = []
        for proof, identity in self._open:
            try:
                proof(request, digests)
            except RefusedError as error:
                refusals.append(error)
            else:
                return identity
        raise most_specific([*refusals, *self._refusals])
