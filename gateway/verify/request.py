"""A request as received, and the reasons for which one is refused."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple
from urllib.parse import unquote_plus

from gateway.bodies.codings import CONTENT_ENCODING, MAX_CONTENT, codings, decompressed
from gateway.model import Headers, RefusedError


class Reason(StrEnum):
    """Why a request was refused: a closed set, and a metric's label.

    A timestamp is stale if it is too old, too far in the future, or a token's that has expired.
    """

    MISSING_SIGNATURE = "missing_signature"
    MALFORMED_SIGNATURE = "malformed_signature"
    BAD_SIGNATURE = "bad_signature"
    MISSING_TIMESTAMP = "missing_timestamp"
    MALFORMED_TIMESTAMP = "malformed_timestamp"
    STALE_TIMESTAMP = "stale_timestamp"
    MISSING_HEADER = "missing_header"
    REPEATED_HEADER = "repeated_header"
    MISSING_CREDENTIALS = "missing_credentials"
    BAD_CREDENTIALS = "bad_credentials"
    UNREADABLE_BODY = "unreadable_body"
    BAD_KEY = "bad_key"
    KEY_UNAVAILABLE = "key_unavailable"
    WRONG_RECIPIENT = "wrong_recipient"
    UNCONFIRMED_SUBSCRIPTION = "unconfirmed_subscription"


MAX_PARAMETERS = 256
"""Most parameters of a query that is parsed: thousands take milliseconds, and anybody may send them."""


class Request(NamedTuple):
    """A request as received: `headers` undecoded, `query` without the question mark, `body` not decompressed.

    `names` are the headers' names in lower case, if they are known already.
    """

    method: str
    path: str
    query: str
    headers: Headers
    body: bytes
    names: Sequence[bytes] | None = None

    def lower_names(self) -> Sequence[bytes]:
        return [name.lower() for name, _ in self.headers] if self.names is None else self.names

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of every header line of that (lower-case) name, in order."""
        names = self.lower_names()
        match names.count(name):
            case 0:
                return []
            case 1:
                return [self.headers[names.index(name)][1]]
            case _:
                return [value for found, (_, value) in zip(names, self.headers, strict=True) if found == name]

    @property
    def has_too_many_parameters(self) -> bool:
        """Whether the query has more than MAX_PARAMETERS parameters. If so, verification looks at none of them."""
        return self.query.count("&") >= MAX_PARAMETERS

    def parameters(self, *names: str) -> Mapping[str, list[str]]:
        """Return the values of these query parameters, decoded, in order; none if there are too many parameters."""
        found: dict[str, list[str]] = {name: [] for name in names}
        for part in () if self.has_too_many_parameters else self.query.split("&"):
            name, _, value = part.partition("=")
            if "%" in name or "+" in name:
                name = unquote_plus(name)
            if name in found:
                found[name].append(unquote_plus(value))
        return found

    def content_codings(self) -> list[str]:
        """Return the names of its content codings (RFC 9110 §8.4), in order; empty if there are none."""
        values = self.values(CONTENT_ENCODING)
        return codings(b",".join(values).decode("latin-1")) if values else []

    def content(self, limit: int = MAX_CONTENT) -> bytes:
        """Return the body, decompressed. For verified requests only, since it takes time.

        Raises UnreadableBodyError, also if it would be larger than the limit, in bytes.
        """
        if CONTENT_ENCODING not in self.lower_names():
            return self.body
        return decompressed(self.body, ",".join(self.content_codings()), limit)


def refused(reason: Reason, detail: str) -> RefusedError:
    return RefusedError(401, reason.value, detail)


def preferred_refusal(refusals: Sequence[RefusedError]) -> RefusedError:
    """Return the refusal to answer with, of those by all signing methods.

    KEY_UNAVAILABLE (503) comes first: the request may be genuine, and its sender repeats it only if it isn't told 401.
    Then a refusal of what was sent comes before one that says that something is missing.

    It is a copy, to be raised. An error that a frame of its own traceback refers to is a reference cycle, which keeps
    everything in these frames, the body included, until the garbage collector runs; for the same reason, `refusals` are
    kept without their tracebacks.
    """
    retryable = [error for error in refusals if error.reason == Reason.KEY_UNAVAILABLE]
    present = [error for error in refusals if not error.reason.startswith("missing_")]
    for error in (*retryable, *present, *refusals):
        return RefusedError(error.status, error.reason, error.detail, retry_after=error.retry_after)
    return refused(Reason.MISSING_SIGNATURE, "expected a way to verify this request, got none")


def single_value(request: Request, name: bytes) -> bytes:
    """Return the value of a signed header, which has to occur exactly once. Raises RefusedError."""
    values = request.values(name)
    if len(values) == 1:
        return values[0]
    if not values:
        raise refused(Reason.MISSING_HEADER, f"expected the header {name.decode()}, which is signed, got none")
    raise refused(Reason.REPEATED_HEADER, f"expected the header {name.decode()} once, got it {len(values)} times")


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
