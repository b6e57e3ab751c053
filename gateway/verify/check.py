"""What a signing method is to the verifier: a check of the head, then of the body; and how it signs test events."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple, Protocol

from gateway.model import Headers
from gateway.verify.content import Content
from gateway.verify.request import Request, to_bytes

# How much a request may make us compare. No provider sends more than a few candidates.
MAX_LINES = 4  # header lines of one name, each of which may cost an HMAC for each secret
MAX_CANDIDATES = 16  # signatures or credentials
MAX_CHALLENGE = 1024  # characters


class SigningSpec(NamedTuple):
    """One signing method, described for people: where the signature is, and where other signed fields are.

    `tolerance` is in seconds; None if no timestamp is signed.
    """

    proof: str
    header: str | None = None
    query: str | None = None
    timestamp_header: str | None = None
    tolerance: float | None = None
    id_header: str | None = None


BodyCheck = Callable[[Request, Content], int | None]
"""Returns the index of the secret that verifies the whole request, or raises RefusedError.

The index is that among all secrets of the source, from 0; None if it is none that the rules list.
"""


class Check(Protocol):
    """One signing method, with its secrets."""

    def check_head(self, head: Request, now: float) -> BodyCheck:
        """Return the check that remains for the body. Raises RefusedError if no body could pass."""

    def sign(self, draft: "Draft", request: Request, now: float, identity: str) -> None:
        """Add to the draft the headers that make `verify` return.

        Raises UsageError if only the sender can, and RefusedError if something is missing that is signed.
        """

    def query(self, now: float) -> str:
        """Return the query string with the credential, empty without one. Raises UsageError if all have expired."""

    def signing_spec(self) -> SigningSpec:
        """Describe where the signature or credential is."""


class Draft:
    """The headers of a request that is being signed; the first value of a name is kept."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._pairs = {name.lower(): (name, value) for name, value in given.items()}

    def __getitem__(self, name: str) -> str:
        return self._pairs[name.lower()][1]

    def add(self, name: str, value: str) -> None:
        self._pairs.setdefault(name.lower(), (name, value))

    def pairs(self) -> list[tuple[str, str]]:
        return list(self._pairs.values())

    def raw(self) -> Headers:
        return tuple([(name.encode(), to_bytes(value)) for name, value in self._pairs.values()])


def nothing_to_check(request: Request, content: Content) -> None:
    """Return: the head alone has verified the request, by no secret that the rules list."""


@cache
def checked_with(index: int | None) -> BodyCheck:
    """Return what is left to check of a request that the head alone has verified, by the secret with this index."""
    return lambda request, content: index  # noqa: ARG005 - a check's signature
