"""The records of `gateway.rejected`: refused requests, and the markers that say what became of them.

A source's requests share a key, and so a partition, in which they keep their order. A marker has another key, and is
appended to the partition that it is about.

    refused request   value: the body, or its beginning
      gw_v            format version, "1"
      gw_rejected     JSON: source, reason, when (Unix seconds, by the clock that signatures were verified by), address,
                      method, path without secrets, size of the body, what is missing, salt and digests of
                      credentials (hexadecimal), whether a credential is in the body, and the digest of the source's
                      settings that the client's certificate satisfied (hexadecimal), absent if there were none
      gw_headers      the header pairs as received, without credentials: `name: value`, joined by CRLF
      gw_query        the query string, without credentials

    marker            no value
      gw_v            format version, "1"
      gw_marker       JSON: kind, the command's id, who gave it, and outcomes of requests of this partition, by offset

    claim ──▶ renew (no outcomes), done (with outcomes) ──▶ … ──▶ end          one command at a time has a partition

A record of another format is listed as unreadable, and ignored by all other commands.
"""

import re
from enum import StrEnum

import orjson

from gateway.log.base import Record
from gateway.log.json_fields import JsonFields, check_format
from gateway.log.records import parse_pairs
from gateway.model import NAME_PATTERN, Headers, UndecodableRecordError, immutable
from gateway.verify.kept_proof import SALT_BYTES, KeptCredential

FORMAT = 1
MAX_STORE_DELAY = 300.0
"""Seconds after its receipt within which a request is stored."""
MAX_CLOCK_AHEAD = 120.0
"""Seconds by which the receipt may be later than the append: different clocks stamp them."""


class Missing(StrEnum):
    """The part of a request that wasn't kept, without which it can't be verified again: a closed set."""

    NOTHING = ""
    BODY = "body"
    """It is too large: only its beginning was kept."""
    CREDENTIAL = "credential"
    """It is so short that it could be guessed from its digest."""


class RequestOutcome(StrEnum):
    """What became of a refused request: a closed set."""

    ADMITTED = "admitted"
    PRESENT = "present"
    """Its event was in the log already: sent again by its provider, or admitted by a retry that was killed."""
    HANDSHAKE = "handshake"
    DROPPED = "dropped"


class Kind(StrEnum):
    """The kind of a marker. See the diagram above."""

    CLAIM = "claim"
    RENEW = "renew"
    DONE = "done"
    END = "end"


@immutable
class RejectedRequest:
    """A request that verification refused, `at` a time (Unix seconds), as it was kept.

    `path` is without secrets, `size` that of the whole body.
    """

    source: str
    reason: str
    at: float
    address: str
    method: str
    path: str
    query: str
    headers: Headers
    body: bytes
    size: int
    missing: Missing = Missing.NOTHING
    salt: bytes
    credentials: tuple[KeptCredential, ...] = ()
    is_body_secret: bool = False
    certificate: str = ""
    """Of the settings that its client's certificate satisfied (`ClientCertificates`), the digest; "" without them."""


@immutable
class Marker:
    """A marker of the command `name`, issued by `by`."""

    kind: Kind
    name: str
    by: str = ""
    outcomes: tuple[tuple[int, RequestOutcome], ...] = ()


def key_of(source: str) -> bytes:
    """Return the key of a source's refused requests."""
    return source.encode()


def encode_rejected(request: RejectedRequest) -> list[tuple[str, bytes]]:
    """Return the record headers of a refused request; the record's value is its body."""
    fields: dict[str, object] = {
        "source": request.source,
        "reason": request.reason,
        "at": request.at,
        "address": request.address,
        "method": request.method,
        "path": request.path,
        "size": request.size,
        "missing": request.missing,
        "salt": request.salt.hex(),
        "credentials": [
            {"name": each.name, "header": int(each.is_header), "digest": each.digest.hex()}
            for each in request.credentials
        ],
        "body_secret": int(request.is_body_secret),
    }
    if request.certificate:
        fields["certificate"] = request.certificate
    headers = [
        ("gw_v", b"%d" % FORMAT),
        ("gw_rejected", orjson.dumps(fields)),
        ("gw_headers", b"\r\n".join(map(b": ".join, request.headers))),
    ]
    if request.query:
        headers.append(("gw_query", request.query.encode("utf-8", "surrogateescape")))
    return headers


def encode_marker(marker: Marker) -> list[tuple[str, bytes]]:
    """Return the record headers of a marker; the record has no value."""
    outcomes = [{"offset": offset, "outcome": outcome} for offset, outcome in marker.outcomes]
    fields = {"kind": marker.kind, "name": marker.name, "by": marker.by, "outcomes": outcomes}
    return [("gw_v", b"%d" % FORMAT), ("gw_marker", orjson.dumps(fields))]


def decode(record: Record) -> RejectedRequest | Marker:
    """Read a record. Raises UndecodableRecordError or NewerRecordError."""
    headers = dict(record.headers)
    check_format("gw_v", headers.get("gw_v"), FORMAT)
    if "gw_marker" in headers:
        return _marker(JsonFields.parse("gw_marker", headers["gw_marker"]))
    return _rejected(JsonFields.parse("gw_rejected", headers.get("gw_rejected")), headers, record)


def _rejected(fields: JsonFields, headers: dict[str, bytes], record: Record) -> RejectedRequest:
    at = fields.number("at")
    # It is verified again as of that time, which whoever wrote the record must not be free to choose.
    if not -MAX_CLOCK_AHEAD <= record.appended_at - at <= MAX_STORE_DELAY:
        raise fields.error(
            "at", f"a time from {MAX_STORE_DELAY:.0f} s before the record was stored to {MAX_CLOCK_AHEAD:.0f} s after"
        )
    size, missing = fields.integer("size"), fields.text("missing")
    if missing not in _MISSING:
        raise fields.error("missing", "what is missing")
    if missing != Missing.BODY and size != len(record.value):
        raise fields.error("size", "the length of the body")
    if "gw_headers" not in headers:
        raise UndecodableRecordError("gw_headers", "this record header", None)
    return RejectedRequest(
        source=fields.text("source", like=NAME_PATTERN, expected="a source's name"),
        reason=fields.text("reason", like=_REASON, expected="a reason"),
        at=at,
        address=fields.text("address"),
        method=fields.text("method"),
        path=fields.text("path"),
        query=headers.get("gw_query", b"").decode("utf-8", "surrogateescape"),
        headers=parse_pairs(headers["gw_headers"]),
        body=record.value,
        size=size,
        missing=Missing(missing),
        salt=bytes.fromhex(fields.text("salt", like=_SALT, expected=f"{SALT_BYTES} bytes in hexadecimal")),
        credentials=tuple([_credential(each) for each in fields.each("credentials")]),
        is_body_secret=fields.integer("body_secret", maximum=1) == 1,
        certificate=(
            fields.text("certificate", like=_DIGEST, expected="32 bytes in hexadecimal")
            if fields.has("certificate")
            else ""
        ),
    )


def _credential(fields: JsonFields) -> KeptCredential:
    digest = fields.text("digest", like=_DIGEST, expected="32 bytes in hexadecimal")
    return KeptCredential(fields.text("name"), fields.integer("header", maximum=1) == 1, bytes.fromhex(digest))


def _marker(fields: JsonFields) -> Marker:
    kind = fields.text("kind")
    if kind not in _KINDS:
        raise fields.error("kind", "a kind of marker")
    outcomes: list[tuple[int, RequestOutcome]] = []
    for each in fields.each("outcomes"):
        outcome = each.text("outcome")
        if outcome not in _OUTCOMES:
            raise each.error("outcome", "an outcome")
        outcomes.append((each.integer("offset"), RequestOutcome(outcome)))
    name = fields.text("name", like=_NAME, expected="a command's id")
    return Marker(kind=Kind(kind), name=name, by=fields.text("by"), outcomes=tuple(outcomes))


_MISSING, _KINDS, _OUTCOMES = frozenset(Missing), frozenset(Kind), frozenset(RequestOutcome)
_REASON, _NAME = re.compile(r"[a-z_]{1,40}"), re.compile(r"[0-9a-f-]{1,64}")
_SALT, _DIGEST = re.compile(f"[0-9a-f]{{{2 * SALT_BYTES}}}"), re.compile("[0-9a-f]{64}")
