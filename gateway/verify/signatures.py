"""The signing methods, with their secrets: how each checks a request, and how it signs one.

Signatures cover the exact bytes of the body and are compared in constant time, in their encoded form: an expected
signature has one spelling, so that no changed byte passes.
"""

import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple, Protocol
from urllib.parse import unquote_to_bytes, urlsplit

from gateway.model import Headers, RefusedError, UsageError
from gateway.verify.config_keys import Part
from gateway.verify.request import Reason, Request, most_specific, only, refused, to_bytes

# How much a request may make us compare. No provider sends more than a few candidates.
MAX_LINES = 4  # header lines of one name, each of which may cost an HMAC for each secret
MAX_CANDIDATES = 16  # signatures or credentials
MAX_ELEMENTS = 64  # in one header line
MAX_LINE_BYTES = 4096
MAX_TIMESTAMP_BYTES = 40
_BODY_ALONE = (Part("body"),)  # signed by most schemes


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


DigestCache = list[tuple[bytes, str, bytes, bytes]]
"""Key, algorithm, message and HMAC of all digests computed for one request, so that none is computed twice."""


BodyCheck = Callable[[Request, DigestCache], None]
"""Returns if the whole request is verified, or raises RefusedError."""


class Check(Protocol):
    """One signing method, with its secrets."""

    def check_head(self, head: Request, now: float) -> BodyCheck:
        """Return the check that remains for the body. Raises RefusedError if no body could pass."""

    def sign(self, draft: "Draft", request: Request, now: float, identity: str) -> None:
        """Add to the draft the headers that make `verify` return."""

    def query(self) -> str:
        """Return the query string that carries the credential; empty if none does."""

    def signing_spec(self) -> SigningSpec:
        """Describe where the signature or credential is."""


@dataclass(frozen=True, slots=True)
class Unverified:
    """Scheme `none`: everyone may send. Always explicit in the rules, never a default."""

    def check_head(self, head: Request, now: float) -> BodyCheck:  # noqa: ARG002 - a check's signature
        return _nothing_to_check

    def sign(self, draft: "Draft", request: Request, now: float, identity: str) -> None:
        pass

    def query(self) -> str:
        return ""

    def signing_spec(self) -> SigningSpec:
        return SigningSpec(proof="nothing: everyone may send")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A shared secret that is sent as it is: in a header after `prefix` (any case), or in the query.

    A query parameter counts only if its name has no percent-encoding, since only then it is removed from the event.
    """

    header: str | None
    parameter: str | None = None
    prefix: str = ""
    secrets: tuple[bytes, ...] = field(repr=False)

    def check_head(self, head: Request, now: float) -> BodyCheck:  # noqa: ARG002 - a check's signature
        given = self._given(head)
        if not given:
            raise refused(Reason.MISSING_CREDENTIALS, f"expected {self._what()}, got none")
        is_matched = False
        if len(given) <= MAX_CANDIDATES:
            for value in given:
                for secret in self.secrets:
                    # No early exit: the time taken doesn't depend on which one matched.
                    is_matched |= hmac.compare_digest(value, secret)
        if not is_matched:
            raise refused(Reason.BAD_CREDENTIALS, f"expected a known {self._what()}, got another one")
        return _nothing_to_check

    def sign(self, draft: "Draft", request: Request, now: float, identity: str) -> None:  # noqa: ARG002 - as above
        if self.header is not None:
            draft.add(self.header, self.prefix + self.secrets[0].decode("utf-8", "surrogateescape"))

    def query(self) -> str:
        if self.parameter is None:
            return ""
        return f"{self.parameter}=" + "".join([_quote(byte) for byte in self.secrets[0]])

    def signing_spec(self) -> SigningSpec:
        return SigningSpec(proof=self._what(), header=self.header, query=self.parameter)

    def _given(self, request: Request) -> list[bytes]:
        if self.header is None:
            pairs = [pair.partition("=") for pair in request.query.split("&")]
            return [unquote_to_bytes(to_bytes(value)) for name, _, value in pairs if name == self.parameter]
        values = request.values(self.header.lower().encode())
        if not self.prefix:
            return values
        # RFC 9110, section 11.1: the name of an authentication scheme has no case, and 1*SP follows.
        prefix = self.prefix.lower().encode()
        length = len(prefix)
        return [value[length:].lstrip(b" ") for value in values if value[:length].lower() == prefix]

    def _what(self) -> str:
        if self.header is None:
            return f"credential in the query parameter {self.parameter}"
        return f"credential in the header {self.header}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timestamp:
    """Where a timestamp is (a header, or an element with a prefix), and how it is parsed."""

    header: str | None
    name: bytes
    prefix: bytes
    unit: str
    tolerance: float

    def check(self, text: bytes, now: float) -> None:
        at = self._read(text)
        if at is None:
            expected = {"s": "Unix seconds", "ms": "Unix milliseconds", "iso": "an RFC 3339 time"}[self.unit]
            raise refused(Reason.MALFORMED_TIMESTAMP, f"expected a timestamp in {expected}, got something else")
        if abs(now - at) > self.tolerance:
            raise refused(
                Reason.STALE_TIMESTAMP,
                f"expected a timestamp at most {self.tolerance:g} s from now, got one {abs(now - at):.0f} s "
                + ("ago" if at < now else "ahead"),
            )

    def write(self, now: float) -> str:
        if self.unit == "iso":
            return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return str(int(now * 1000) if self.unit == "ms" else int(now))

    def _read(self, text: bytes) -> float | None:
        if len(text) > MAX_TIMESTAMP_BYTES:
            return None
        if self.unit != "iso":
            # `isdigit` of bytes is ASCII only, so that neither signs, underscores nor other scripts' digits pass.
            return int(text) / (1000 if self.unit == "ms" else 1) if text.isdigit() else None
        try:
            at = datetime.fromisoformat(text.decode("ascii"))
        except ValueError:
            return None
        # A time without an offset could be anywhere within a day.
        return None if at.tzinfo is None else at.timestamp()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hmac:
    """An HMAC (RFC 2104) over a string made from the request."""

    header: str
    name: bytes
    algorithm: str
    encode: Callable[[bytes], bytes]
    length: int
    prefix: bytes
    separator: bytes | None
    timestamp: Timestamp | None
    id_header: str | None
    signed: tuple[bytes | Part, ...]
    public_url: str | None
    keys: tuple[bytes, ...] = field(repr=False)

    def check_head(self, head: Request, now: float) -> BodyCheck:
        lines = head.values(self.name)
        if not lines:
            raise refused(Reason.MISSING_SIGNATURE, f"expected a signature in the header {self.header}, got none")
        if len(lines) > MAX_LINES:
            raise refused(
                Reason.MALFORMED_SIGNATURE,
                f"expected at most {MAX_LINES} header lines {self.header}, got {len(lines)}",
            )
        if len(lines) == 1:
            return partial(self._check_body, (self._read(lines[0], head, now),))
        read: list[tuple[list[bytes], bytes]] = []
        refusals: list[RefusedError] = []
        for line in lines:
            try:
                read.append(self._read(line, head, now))
            except RefusedError as error:
                refusals.append(error)
        if not read:
            raise most_specific(refusals)
        return partial(self._check_body, read)

    def sign(self, draft: "Draft", request: Request, now: float, identity: str) -> None:
        if self.id_header is not None:
            draft.add(self.id_header, identity)
        stamp = b""
        if self.timestamp is not None:
            stamp = self.timestamp.write(now).encode()
            if self.timestamp.header is not None:
                draft.add(self.timestamp.header, stamp.decode())
                stamp = draft[self.timestamp.header].encode("utf-8", "surrogateescape")
        outgoing = Request(
            method=request.method, path=request.path, query=request.query, headers=draft.raw(), body=request.body
        )
        try:
            message = self._message(outgoing, stamp)
        except RefusedError as error:
            raise UsageError(f"a test event for this source: {error.detail}") from error
        value = self.prefix + self._signature(self.keys[0], message, [])
        if self.timestamp is not None and self.timestamp.header is None:
            value = self.timestamp.prefix + stamp + (self.separator or b"") + value
        draft.add(self.header, value.decode())

    def query(self) -> str:
        return ""

    def signing_spec(self) -> SigningSpec:
        stamp = self.timestamp
        return SigningSpec(
            proof=f"{self.algorithm} signature in the header {self.header}",
            header=self.header,
            timestamp_header=None if stamp is None else stamp.header or self.header,
            tolerance=None if stamp is None else stamp.tolerance,
            id_header=self.id_header,
        )

    def _read(self, line: bytes, head: Request, now: float) -> tuple[list[bytes], bytes]:
        """Return the signatures in a header line, and the timestamp that they claim to cover."""
        candidates, stamps = self._split(line)
        if not candidates or len(candidates) > MAX_CANDIDATES:
            raise refused(
                Reason.MALFORMED_SIGNATURE,
                f"expected 1 to {MAX_CANDIDATES} signatures in the header {self.header}, each "
                + (f"{self.prefix.decode()} and " if self.prefix else "")
                + f"{self.length} characters, got {len(candidates)}",
            )
        stamp = b""
        if self.timestamp is not None:
            if self.timestamp.header is not None:
                stamps = head.values(self.timestamp.name)
            stamp = self._one_stamp(stamps)
            self.timestamp.check(stamp, now)
        if self.signed != _BODY_ALONE:
            for part in self.signed:
                if isinstance(part, Part) and part.name:
                    only(head, part.name)
        return candidates, stamp

    def _check_body(self, read: Sequence[tuple[list[bytes], bytes]], request: Request, digests: DigestCache) -> None:
        for candidates, stamp in read:
            message = self._message(request, stamp)
            for key in self.keys:
                expected = self._signature(key, message, digests)
                is_matched = False
                for candidate in candidates:
                    is_matched |= hmac.compare_digest(candidate, expected)
                if is_matched:
                    return
        raise refused(Reason.BAD_SIGNATURE, f"the signature in the header {self.header} doesn't match this request")

    def _split(self, line: bytes) -> tuple[list[bytes], list[bytes]]:
        """Return what looks like signatures and timestamps, without their prefixes."""
        prefix, length = self.prefix, len(self.prefix) + self.length
        if self.separator is None:
            return ([line[len(prefix) :]] if len(line) == length and line.startswith(prefix) else []), []
        if len(line) > MAX_LINE_BYTES:
            return [], []
        elements = [element.strip(b" ") for element in line.split(self.separator, MAX_ELEMENTS)]
        candidates = [
            element[len(prefix) :] for element in elements if len(element) == length and element.startswith(prefix)
        ]
        if self.timestamp is None or self.timestamp.header is not None:
            return candidates, []
        mark = self.timestamp.prefix
        return candidates, [element[len(mark) :] for element in elements if element.startswith(mark)]

    def _one_stamp(self, stamps: Sequence[bytes]) -> bytes:
        if len(stamps) == 1:
            return stamps[0]
        where = self.header if self.timestamp is None else self.timestamp.header or self.header
        if not stamps:
            raise refused(Reason.MISSING_TIMESTAMP, f"expected a timestamp in the header {where}, got none")
        raise refused(Reason.MALFORMED_TIMESTAMP, f"expected one timestamp in the header {where}, got {len(stamps)}")

    def _message(self, request: Request, stamp: bytes) -> bytes:
        if self.signed == _BODY_ALONE:
            return request.body
        return b"".join(
            [part if isinstance(part, bytes) else self._field(part, request, stamp) for part in self.signed]
        )

    def _field(self, part: Part, request: Request, stamp: bytes) -> bytes:
        match part.kind:
            case "body":
                return request.body
            case "timestamp":
                return stamp
            case "method":
                return to_bytes(request.method)
            case "path":
                return to_bytes(request.path)
            case "url":
                return self._url(request)
            case _:  # it was there once when the head was checked
                return only(request, part.name)

    def _url(self, request: Request) -> bytes:
        url = self.public_url or ""
        if not urlsplit(url).path:
            url += request.path
        return to_bytes(f"{url}?{request.query}" if request.query else url)

    def _signature(self, key: bytes, message: bytes, digests: DigestCache) -> bytes:
        for *made, digest in digests:
            if made == [key, self.algorithm, message]:
                return self.encode(digest)
        digest = hmac.digest(key, message, self.algorithm)
        digests.append((key, self.algorithm, message, digest))
        return self.encode(digest)


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


def _nothing_to_check(request: Request, digests: DigestCache) -> None:
    """Return: the head alone has verified the request."""


def _quote(byte: int) -> str:
    return chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else f"%{byte:02X}"
