"""Verify who sent a request, by a scheme that is data: built once from a source's `verify:`, then pure.

Five schemes are generic (`hmac`, `token`, `basic`, `bearer`, `none`); a preset is one of them, filled in by
`presets.yaml`. Signatures cover the exact bytes of the body and are compared in constant time, as the text that the
sender must have sent: an expected signature has one spelling, so that no changed byte passes.

    verify:
      scheme: hmac
      header: X-Signature          where the signatures are
      algorithm: sha256            or sha1, sha512
      encoding: hex                or base64
      separator: ","               between several elements in the header; without it the whole value is one
      prefix: v1=                  what a signature starts with; other elements are ignored
      timestamp: {prefix: t=}      an element of the same header, or {header: X-Time}; unit: s, ms or iso
      id_header: X-Id              a signed header that identifies the event
      signed: "{timestamp}.{body}" from {body} {timestamp} {id} {method} {path} {url} {header:NAME}; {{ is a brace
      tolerance: 5m                how far the timestamp may be from now, in both directions; or none
      secrets: ["..."]             any of them will do, for rotation; the first one signs test events
      secret_encoding: raw         or hex, base64, whsec (base64 after `whsec_`)
"""

import binascii
import hashlib
import hmac
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from importlib import resources
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote_to_bytes, urlsplit

import yaml

from gateway.model import Headers, RefusedError, RulesError, UsageError
from gateway.verify.handshakes import HANDSHAKES, Answer, Handshake
from gateway.verify.keys import (
    ENCODINGS,
    GENERIC,
    ID,
    SECRET_ENCODINGS,
    SECRETS,
    TIMESTAMP,
    TOLERANCE,
    URL,
    Key,
    Part,
    Path,
    Place,
    base64_key,
    did_you_mean,
    parse_duration,
    read_keys,
    shown,
    signing_key,
)

# What a request may make us compare. No provider sends more than a few; a flood of candidates is no signature.
MAX_LINES = 4  # header lines of one name, each of which may cost an HMAC for each secret
MAX_CANDIDATES = 16  # signatures or credentials
MAX_ELEMENTS = 64  # in one header line
MAX_LINE_BYTES = 4096
MAX_TIMESTAMP_BYTES = 40

WEAK = 16  # bytes: a shorter key can be found by trying, by anybody who has seen one signed request
DEFAULT_TOLERANCE = 300.0  # what the libraries of Standard Webhooks, Stripe and Slack allow

ALWAYS_CREDENTIALS = frozenset({b"authorization", b"cookie", b"proxy-authorization"})
_BODY_ALONE = (Part("body"),)  # What most schemes sign.


class Reason(StrEnum):
    """Why a request was refused: a closed set, and a metric's label."""

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


class Request(NamedTuple):
    """A request as it came: `headers` undecoded, `query` without the question mark, `body` not decompressed.

    `names` are the headers' names in lower case: whoever has looked at them hands them on.
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


class SchemeError(RulesError):
    """A source's `verify:` is at fault. `problems` has all of them: where below `verify`, and what."""

    def __init__(self, problems: Sequence[tuple[Path, str]]) -> None:
        super().__init__("\n".join(f"{'.'.join(map(str, ('verify', *path)))}: {text}" for path, text in problems))
        self.problems = tuple(problems)


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
    checks: tuple["_Check", ...] = field(repr=False)
    ids: tuple[str | None, ...] = ()
    sends: tuple[tuple[str, str], ...] = ()
    answers: Handshake | None = None
    dedupe: float | None = None
    warnings: tuple[tuple[Path, str], ...] = field(default=(), compare=False)

    @property
    def how(self) -> Sequence["How"]:
        """Return where each of the ways to sign has its proof."""
        return [check.how() for check in self.checks]

    def verify(self, request: Request, *, now: float) -> str | None:
        """Return if any way to sign that the scheme knows holds; `now` is in Unix seconds.

        What is returned is where, by that way, the identity is, in CEL; None if nowhere.

        Raises RefusedError (401) with a `Reason`; its detail says what was expected where, never which secret failed.
        """
        if len(self.checks) == 1:
            self.checks[0].look(request, now)(request, [])
            return self.ids[0]
        return self.look(request, now=now).prove(request)

    def look(self, head: Request, *, now: float) -> "Claim":
        """Check what the headers and the query alone decide, and return what is left for the body to prove.

        Nobody's body needs to be waited for, nor held, who couldn't be let in with any. The body of `head` isn't looked
        at. Raises RefusedError as `verify` does.
        """
        if len(self.checks) == 1:
            return Claim(((self.checks[0].look(head, now), self.ids[0]),), ())
        open_: list[tuple[_Proof, str | None]] = []
        refusals: list[RefusedError] = []
        for check, identity in zip(self.checks, self.ids, strict=True):
            try:
                open_.append((check.look(head, now), identity))
            except RefusedError as error:
                refusals.append(error)
        if not open_:
            raise _most_telling(refusals)
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
        draft = _Draft(headers)
        for name, template in self.sends:
            draft.add(name, template.replace("{id}", id).replace("{type}", type))
        unsigned = Request(method=method, path=path, query=query, headers=(), body=body)
        self.checks[0].sign(draft, unsigned, now, id)
        return draft.pairs()

    def signed_query(self) -> str:
        """Return the query string by which the sender would authenticate, empty if it doesn't do it there."""
        return self.checks[0].query()


class How(NamedTuple):
    """One way to sign, for people: where the proof is, and where what it covers beside the body.

    `tolerance` is in seconds, and None where no timestamp is signed.
    """

    proof: str
    header: str | None = None
    query: str | None = None
    timestamp_header: str | None = None
    tolerance: float | None = None
    id_header: str | None = None


class Claim:
    """What the head of a request claims, by each of the ways to sign that it may hold by."""

    __slots__ = ("_open", "_refusals")

    def __init__(self, open_: Sequence[tuple["_Proof", str | None]], refusals: Sequence[RefusedError]) -> None:
        self._open = open_
        self._refusals = refusals

    def prove(self, request: Request) -> str | None:
        """Return where the identity is, if the whole request holds by any of the ways; else as `Verifier.verify`."""
        digests: _Digests = []
        refusals: list[RefusedError] = []
        for proof, identity in self._open:
            try:
                proof(request, digests)
            except RefusedError as error:
                refusals.append(error)
            else:
                return identity
        raise _most_telling([*refusals, *self._refusals])


def build_verifier(config: Mapping[str, object], *, public_url: str | None = None) -> Verifier:
    """Build what a source's `verify:` says; `public_url` is the address that the sender was given, for `{url}`.

    `public_url` lacks the query; where it has no path either, the request's is appended. Raises SchemeError with every
    problem. No message repeats a secret.
    """
    problems: dict[tuple[Path, str], None] = {}
    verifier = _build(config, Place((), problems), public_url)
    if verifier is None or problems:
        raise SchemeError(list(problems))
    return verifier


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the `verify:` mapping."""
    return {
        "type": "object",
        "description": "Who may send to this source, and how that is verified.",
        "properties": {"scheme": {"enum": list(_known_schemes()), "description": "A provider, or a generic scheme."}},
        "required": ["scheme"],
        "allOf": [
            {
                "if": {"properties": {"scheme": {"const": scheme}}, "required": ["scheme"]},
                "then": _keys_schema(scheme),
            }
            for scheme in _known_schemes()
        ],
    }


# ---- The checks: one per way to sign ----


_Digests = list[tuple[bytes, str, bytes, bytes]]
"""Key, algorithm, message and HMAC of all that one request has had us compute: nothing is computed twice."""

_Proof = Callable[[Request, _Digests], None]
"""Returns if the whole request holds, or raises RefusedError."""


class _Check(Protocol):
    """One way to sign, with its secrets."""

    def look(self, head: Request, now: float) -> _Proof:
        """Return what the body has to prove, or raise RefusedError where none could."""

    def sign(self, draft: "_Draft", request: Request, now: float, identity: str) -> None:
        """Add to the draft what makes `verify` return."""

    def query(self) -> str:
        """Return what the sender puts into the query string."""

    def how(self) -> How:
        """Return where the proof is."""


@dataclass(frozen=True, slots=True)
class _Unverified:
    """Scheme `none`: everyone may send. Written out in the rules, never a default."""

    def look(self, head: Request, now: float) -> _Proof:  # noqa: ARG002 - a check's signature
        return _proved

    def sign(self, draft: "_Draft", request: Request, now: float, identity: str) -> None:
        pass

    def query(self) -> str:
        return ""

    def how(self) -> How:
        return How(proof="nothing: everyone may send")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Credential:
    """A shared secret that is sent as it is: in a header after `prefix` (any case), or in the query.

    A query parameter counts only if its name is spelled without percent-encoding, as only then it is taken out.
    """

    header: str | None
    parameter: str | None = None
    prefix: str = ""
    secrets: tuple[bytes, ...] = field(repr=False)

    def look(self, head: Request, now: float) -> _Proof:  # noqa: ARG002 - a check's signature
        given = self._given(head)
        if not given:
            raise _refused(Reason.MISSING_CREDENTIALS, f"expected {self._what()}, got none")
        is_matched = False
        if len(given) <= MAX_CANDIDATES:
            for value in given:
                for secret in self.secrets:
                    # No early exit: what is compared doesn't depend on what was right before.
                    is_matched |= hmac.compare_digest(value, secret)
        if not is_matched:
            raise _refused(Reason.BAD_CREDENTIALS, f"expected a known {self._what()}, got another one")
        return _proved

    def sign(self, draft: "_Draft", request: Request, now: float, identity: str) -> None:  # noqa: ARG002 - as above
        if self.header is not None:
            draft.add(self.header, self.prefix + self.secrets[0].decode("utf-8", "surrogateescape"))

    def query(self) -> str:
        if self.parameter is None:
            return ""
        return f"{self.parameter}=" + "".join([_quote(byte) for byte in self.secrets[0]])

    def how(self) -> How:
        return How(proof=self._what(), header=self.header, query=self.parameter)

    def _given(self, request: Request) -> list[bytes]:
        if self.header is None:
            pairs = [pair.partition("=") for pair in request.query.split("&")]
            return [unquote_to_bytes(_encode(value)) for name, _, value in pairs if name == self.parameter]
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
class _Timestamp:
    """Where a timestamp is (a header, or an element with a prefix) and how it is to be read."""

    header: str | None
    name: bytes
    prefix: bytes
    unit: str
    tolerance: float

    def check(self, text: bytes, now: float) -> None:
        at = self._read(text)
        if at is None:
            expected = {"s": "Unix seconds", "ms": "Unix milliseconds", "iso": "an RFC 3339 time"}[self.unit]
            raise _refused(Reason.MALFORMED_TIMESTAMP, f"expected a timestamp in {expected}, got something else")
        if abs(now - at) > self.tolerance:
            raise _refused(
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
        # A time without an offset is somewhere within a day, so it's no time.
        return None if at.tzinfo is None else at.timestamp()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hmac:
    """An HMAC (RFC 2104) over a string made from the request."""

    header: str
    name: bytes
    algorithm: str
    encode: Callable[[bytes], bytes]
    length: int
    prefix: bytes
    separator: bytes | None
    timestamp: _Timestamp | None
    id_header: str | None
    signed: tuple[bytes | Part, ...]
    public_url: str | None
    keys: tuple[bytes, ...] = field(repr=False)

    def look(self, head: Request, now: float) -> _Proof:
        lines = head.values(self.name)
        if not lines:
            raise _refused(Reason.MISSING_SIGNATURE, f"expected a signature in the header {self.header}, got none")
        if len(lines) > MAX_LINES:
            raise _refused(
                Reason.MALFORMED_SIGNATURE,
                f"expected at most {MAX_LINES} header lines {self.header}, got {len(lines)}",
            )
        if len(lines) == 1:
            return partial(self._prove, (self._read(lines[0], head, now),))
        read: list[tuple[list[bytes], bytes]] = []
        refusals: list[RefusedError] = []
        for line in lines:
            try:
                read.append(self._read(line, head, now))
            except RefusedError as error:
                refusals.append(error)
        if not read:
            raise _most_telling(refusals)
        return partial(self._prove, read)

    def sign(self, draft: "_Draft", request: Request, now: float, identity: str) -> None:
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

    def how(self) -> How:
        stamp = self.timestamp
        return How(
            proof=f"{self.algorithm} signature in the header {self.header}",
            header=self.header,
            timestamp_header=None if stamp is None else stamp.header or self.header,
            tolerance=None if stamp is None else stamp.tolerance,
            id_header=self.id_header,
        )

    def _read(self, line: bytes, head: Request, now: float) -> tuple[list[bytes], bytes]:
        """Return the signatures of a line and the time that they are said to cover."""
        candidates, stamps = self._split(line)
        if not candidates or len(candidates) > MAX_CANDIDATES:
            raise _refused(
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
                    _only(head, part.name)
        return candidates, stamp

    def _prove(self, read: Sequence[tuple[list[bytes], bytes]], request: Request, digests: _Digests) -> None:
        for candidates, stamp in read:
            message = self._message(request, stamp)
            for key in self.keys:
                expected = self._signature(key, message, digests)
                is_matched = False
                for candidate in candidates:
                    is_matched |= hmac.compare_digest(candidate, expected)
                if is_matched:
                    return
        raise _refused(
            Reason.BAD_SIGNATURE, f"expected a signature of this request in the header {self.header}, got another one"
        )

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
            raise _refused(Reason.MISSING_TIMESTAMP, f"expected a timestamp in the header {where}, got none")
        raise _refused(Reason.MALFORMED_TIMESTAMP, f"expected one timestamp in the header {where}, got {len(stamps)}")

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
                return _encode(request.method)
            case "path":
                return _encode(request.path)
            case "url":
                return self._url(request)
            case _:  # it was there once when the head was looked at
                return _only(request, part.name)

    def _url(self, request: Request) -> bytes:
        url = self.public_url or ""
        if not urlsplit(url).path:
            url += request.path
        return _encode(f"{url}?{request.query}" if request.query else url)

    def _signature(self, key: bytes, message: bytes, digests: _Digests) -> bytes:
        for *made, digest in digests:
            if made == [key, self.algorithm, message]:
                return self.encode(digest)
        digest = hmac.digest(key, message, self.algorithm)
        digests.append((key, self.algorithm, message, digest))
        return self.encode(digest)


class _Draft:
    """The headers of a request that is being signed; the first value of a name stays."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._pairs = {name.lower(): (name, value) for name, value in given.items()}

    def __getitem__(self, name: str) -> str:
        return self._pairs[name.lower()][1]

    def add(self, name: str, value: str) -> None:
        self._pairs.setdefault(name.lower(), (name, value))

    def pairs(self) -> list[tuple[str, str]]:
        return list(self._pairs.values())

    def raw(self) -> Headers:
        return tuple([(name.encode(), _encode(value)) for name, value in self._pairs.values()])


def _proved(request: Request, digests: _Digests) -> None:
    """Return: the head has proved it."""


def _refused(reason: Reason, detail: str) -> RefusedError:
    return RefusedError(401, reason.value, detail)


def _most_telling(refusals: Sequence[RefusedError]) -> RefusedError:
    """Return the refusal of what the sender did send, rather than of what it may never have meant to send."""
    present = [error for error in refusals if not error.reason.startswith("missing_")]
    for error in (*present, *refusals):
        return error
    return _refused(Reason.MISSING_SIGNATURE, "expected a way to verify this request, got none")


def _only(request: Request, name: bytes) -> bytes:
    values = request.values(name)
    if len(values) == 1:
        return values[0]
    if not values:
        raise _refused(Reason.MISSING_HEADER, f"expected the header {name.decode()}, which is signed, got none")
    raise _refused(Reason.REPEATED_HEADER, f"expected the header {name.decode()} once, got it {len(values)} times")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _quote(byte: int) -> str:
    return chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else f"%{byte:02X}"


# ---- From configuration to checks ----


class _Way(NamedTuple):
    """One generic scheme, with its keys' values as read; of a preset without secrets, which are those that `takes`.

    `id` is where the identity of what is signed so is, if elsewhere than the preset's.
    """

    scheme: str
    values: Mapping[str, Any]
    takes: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A provider: the ways by which it may sign, and what its events look like."""

    ways: tuple[_Way, ...]
    id: str | None = None
    type: str | None = None
    sends: tuple[tuple[str, str], ...] = ()
    handshake: str | None = None
    dedupe: float | None = None

    @property
    def has_timestamp(self) -> bool:
        return any("timestamp" in way.values for way in self.ways)

    def with_secrets(self, given: Mapping[str, Any]) -> list[_Way]:
        """Return the ways with the user's secrets and tolerance."""
        marks = tuple([way.takes for way in self.ways if way.takes])
        ways = []
        for way in self.ways:
            secrets = [
                secret
                for secret in given.get("secrets", ())
                if (secret.text.startswith(way.takes) if way.takes else not marks or not secret.text.startswith(marks))
            ]
            own = {"secrets": secrets}
            if "tolerance" in given and "timestamp" in way.values:
                own["tolerance"] = given["tolerance"]
            ways.append(way._replace(values={**way.values, **own}))
        return ways


def _load_presets() -> Mapping[str, Preset]:
    text = resources.files("gateway.verify").joinpath("presets.yaml").read_text("utf-8")
    return MappingProxyType({name: _preset(dict(entry)) for name, entry in yaml.safe_load(text).items()})


def _preset(entry: dict[str, Any]) -> Preset:
    about: dict[str, Any] = {key: entry.pop(key) for key in ("id", "type", "handshake") if key in entry}
    if "dedupe" in entry:
        about["dedupe"] = parse_duration(entry.pop("dedupe"))
    sends = tuple(entry.pop("sends", {}).items())
    ways = []
    for config in entry.get("any_of", [entry]):
        scheme = config.get("scheme", "hmac")
        keys = {name: key for name, key in GENERIC[scheme].items() if name != "secrets"}
        problems: dict[tuple[Path, str], None] = {}
        way = dict(config)
        takes, identity = way.pop("takes", None), way.pop("id", None)
        values = read_keys(way, keys, Place((), problems))
        if problems:
            raise SchemeError(list(problems))
        ways.append(_Way(scheme, values, takes, identity))
    return Preset(ways=tuple(ways), sends=sends, **about)


PRESETS: Mapping[str, Preset] = _load_presets()
"""The providers, by the name that stands under `scheme`."""


def _known_schemes() -> tuple[str, ...]:
    return (*GENERIC, *PRESETS)


def _user_keys(scheme: str) -> Mapping[str, Key]:
    """Return what may be written beside this scheme: of a preset, only what isn't the provider's to say."""
    if scheme in GENERIC:
        return GENERIC[scheme]
    return {"secrets": SECRETS, "tolerance": TOLERANCE} if PRESETS[scheme].has_timestamp else {"secrets": SECRETS}


def _keys_schema(scheme: str) -> dict[str, Any]:
    keys = _user_keys(scheme)
    schema = {
        "properties": {"scheme": True, **{name: dict(key.schema) for name, key in keys.items()}},
        "required": [name for name, key in keys.items() if key.is_required],
        "additionalProperties": False,
    }
    if scheme == "token":
        schema["oneOf"] = [{"required": ["header"]}, {"required": ["query"]}]
    return schema


def _build(config: Mapping[str, object], place: Place, public_url: str | None) -> Verifier | None:
    """Build the verifier; None, or one that is unfit, where there are problems."""
    scheme = config.get("scheme")
    if not isinstance(scheme, str):
        place.report(f"expected the key 'scheme' with a scheme's name, got {shown(scheme)}")
        return None
    if scheme not in _known_schemes():
        hint = did_you_mean(scheme, _known_schemes()) or f", expected one of {', '.join(_known_schemes())}"
        place.below("scheme").report(f"unknown scheme {shown(scheme)}{hint}")
        return None
    given = read_keys(config, _user_keys(scheme), place)
    if scheme in GENERIC:
        header = given.get("id_header")
        preset = Preset(ways=(), id=header and f'headers["{header.lower()}"]')
        ways = [_Way(scheme, given)]
        _refuse_contradictions(scheme, config, given, place)
    else:
        preset = PRESETS[scheme]
        ways = preset.with_secrets(given)
    if not public_url and any(URL in way.values.get("signed", ()) for way in ways):
        place.report("expected the source's public_url, since the address that the sender knows is signed, got none")
    # A way that got no secrets isn't checked, but what its senders put into a header is a credential all the same.
    tokens = [way.values for way in ways if way.scheme == "token"]
    used = [way for way in ways if way.scheme == "none" or way.values.get("secrets")]
    checks = [_check(way, place, public_url) for way in used]
    ids = tuple([way.id or preset.id for way in used])
    return Verifier(
        scheme=scheme,
        id=ids[0] if len(set(ids)) == 1 else preset.id,
        ids=ids,
        type=preset.type,
        credential_headers=ALWAYS_CREDENTIALS
        | {values["header"].lower().encode() for values in tokens if "header" in values},
        credential_query=frozenset([values["query"] for values in tokens if "query" in values]),
        checks=tuple([check for check in checks if check is not None]),
        sends=preset.sends,
        answers=HANDSHAKES[preset.handshake] if preset.handshake else None,
        dedupe=preset.dedupe,
        warnings=_weaknesses(ways, given),
    )


def _weaknesses(ways: Sequence[_Way], given: Mapping[str, Any]) -> tuple[tuple[Path, str], ...]:
    found: dict[tuple[Path, str], None] = {}
    place = Place((), found)
    if given.get("tolerance") == math.inf:
        place.below("tolerance").report("expected a duration, got none: a recorded request is good at any later time")
    for way in ways:
        for secret in way.values.get("secrets", ()):
            if len(_decode(secret.text, way.values.get("secret_encoding", "raw"))) < WEAK:
                expected = f"expected a secret of at least {WEAK} bytes"
                place.below("secrets").below(secret.place).report(
                    f"{expected}, got a shorter one, which can be guessed"
                )
    return tuple(found)


def _refuse_contradictions(scheme: str, config: Mapping[str, object], values: Mapping[str, Any], place: Place) -> None:
    """Report keys that can't be read without each other. `values` lacks what has a problem already."""
    if scheme == "token" and ("header" in config) == ("query" in config):
        place.report(f"expected either header or query, got {'both' if 'header' in config else 'neither'}")
    signed = values.get("signed", ())
    if TIMESTAMP in signed and "timestamp" not in config:
        place.below("signed").report("expected the key 'timestamp' beside {timestamp}, got none")
    if "timestamp" in config and signed and TIMESTAMP not in signed:
        place.below("timestamp").report("expected {timestamp} in 'signed', as it proves nothing unsigned, got none")
    if ID in signed and "id_header" not in config:
        place.below("signed").report("expected the key 'id_header' beside {id}, got none")
    if "id_header" in values and signed and not {ID, Part("header", values["id_header"].lower().encode())} & {*signed}:
        place.below("id_header").report("expected {id} in 'signed', as an identity is anybody's unsigned, got none")
    if "tolerance" in config and "timestamp" not in config:
        place.below("tolerance").report("expected the key 'timestamp' beside it, got none")
    if "prefix" in values.get("timestamp", ()) and "separator" not in config:
        place.below("timestamp").report("expected the key 'separator' beside a timestamp's prefix, got none")


def _check(way: _Way, place: Place, public_url: str | None) -> _Check | None:
    """Build a check; None where a value that it needs has a problem."""
    values = way.values
    secrets = tuple([_encode(secret.text) for secret in values.get("secrets", ())])
    match way.scheme:
        case "hmac" if {"header", "algorithm", "encoding", "signed", "secret_encoding"} <= values.keys():
            return _hmac(values, _decoded(values, place), public_url)
        case "token":
            return _Credential(header=values.get("header"), parameter=values.get("query"), secrets=secrets)
        case "basic" if "username" in values:
            user = _encode(values["username"])
            pairs = tuple([binascii.b2a_base64(user + b":" + secret, newline=False) for secret in secrets])
            return _Credential(header="Authorization", prefix="Basic ", secrets=pairs)
        case "bearer":
            return _Credential(header="Authorization", prefix="Bearer ", secrets=secrets)
        case "none":
            return _Unverified()
        case _:
            return None


def _hmac(values: Mapping[str, Any], keys: tuple[bytes, ...], public_url: str | None) -> _Hmac:
    encode = ENCODINGS[values["encoding"]]
    id_header: str = values.get("id_header", "")
    identity = Part("header", id_header.lower().encode())
    stamp = values.get("timestamp")
    return _Hmac(
        header=values["header"],
        name=values["header"].lower().encode(),
        algorithm=values["algorithm"],
        encode=encode,
        length=len(encode(bytes(hashlib.new(values["algorithm"], usedforsecurity=False).digest_size))),
        prefix=values.get("prefix", b""),
        separator=values.get("separator"),
        timestamp=stamp
        and _Timestamp(
            header=stamp.get("header"),
            name=stamp.get("header", "").lower().encode(),
            prefix=stamp.get("prefix", b""),
            unit=stamp.get("unit", "s"),
            tolerance=values.get("tolerance", DEFAULT_TOLERANCE),
        ),
        id_header=id_header or None,
        signed=tuple([identity if part == ID else part for part in values["signed"]]),
        public_url=public_url,
        keys=keys,
    )


def _decoded(values: Mapping[str, Any], place: Place) -> tuple[bytes, ...]:
    """Turn the secrets into the HMAC's keys; an empty key would be a signature that anyone can make."""
    keys = []
    for secret in values["secrets"]:
        key = _decode(secret.text, values["secret_encoding"])
        if key:
            keys.append(key)
        else:
            expected = SECRET_ENCODINGS[values["secret_encoding"]]
            place.below("secrets").below(secret.place).report(f"expected {expected}, got a text that isn't")
    return tuple(keys)


def _decode(text: str, encoding: str) -> bytes:
    """Return the key, empty if the text isn't of that encoding."""
    try:
        match encoding:
            case "raw":
                return _encode(text)
            case "hex":
                return binascii.unhexlify(text)
            case "whsec":
                return signing_key(text)
            case _:
                return base64_key(text)
    except ValueError:
        return b""
