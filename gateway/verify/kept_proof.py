"""What of a refused request is kept, so that it can be verified again once the right secret is known. Pure.

    signature, or a token that covers the body    kept as it came: it is good for this request alone
    credential in a header or the query           replaced by a salted digest (BLAKE2b, RFC 7693)
    credential in a field of the body             kept, as in the body of an event
    Authorization, Cookie and the like            not kept, unless the signature itself is in it

A refused credential is somebody's: the provider's new one, or one that was never meant for us. What was kept of it must
not be of use to whoever reads the log. A digest is enough to recognise the credential among the secrets that the rules
have later, and a secret that can't be guessed can't be found by its digest. One that is shorter than `SHORT` bytes may
be guessed: of it nothing is kept, and its request can't be verified again.
"""

import binascii
import hashlib
import hmac
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote_plus

from gateway.model import Headers, RefusedError
from gateway.verify.check import MAX_CANDIDATES
from gateway.verify.content import Content
from gateway.verify.credentials import Credential
from gateway.verify.json_web_tokens import JsonWebToken
from gateway.verify.message_signatures import MessageSignature
from gateway.verify.request import Request
from gateway.verify.signatures import SignatureCheck
from gateway.verify.tokens import TOKEN
from gateway.verify.verifier import Verifier

SALT_BYTES = 16
SHORT = 16
"""Bytes of a credential below which it may be guessed; of Basic authentication those of the password."""
_BASIC = "Basic "
_NAME = re.compile(TOKEN.pattern.encode())


class KeptCredential(NamedTuple):
    """The digest of a credential (32 bytes), and where it was: a header (lower-case name), or a query parameter."""

    name: str
    is_header: bool
    digest: bytes


class Concealed(NamedTuple):
    """The head of a request without its credentials. `is_whole` is False if nothing could be kept of one."""

    headers: Headers
    query: str
    credentials: tuple[KeptCredential, ...]
    is_whole: bool


def why_not_kept(verifier: Verifier) -> str:
    """Return what it is about a scheme for which its refused requests can't be verified again; "" if they can."""
    if verifier.is_open:
        return "none, which refuses nothing"
    if any(isinstance(check, JsonWebToken) and not check.covers_body for check in verifier.checks):
        return "a token that is good for any body, and so must not be kept"
    return ""


def is_body_secret(verifier: Verifier) -> bool:
    """Return whether a credential is in the body of a source's requests."""
    return any(isinstance(check, Credential) and check.path for check in verifier.checks)


class Proofs(NamedTuple):
    """Where an event has what proves who sent it: in which headers (lower-case names) and parameters, and as what.

    `values` are the signatures and credentials in its body.
    """

    headers: frozenset[bytes]
    parameters: frozenset[str]
    values: tuple[bytes, ...]


def proofs_in(verifier: Verifier, request: Request) -> Proofs:
    """Return what a stored request has of signatures and credentials: what must not go to where it isn't needed."""
    specs = verifier.signing_specs
    named = {spec.header.lower().encode() for spec in specs if spec.header is not None}
    signatures = {b"signature", b"signature-input"} if _has_message_signature(verifier) else set[bytes]()
    headers = verifier.credential_headers | named | _proof_headers(verifier) | signatures
    parameters = verifier.credential_query | {spec.query for spec in specs if spec.query is not None}
    paths = [check.path for check in verifier.checks if isinstance(check, Credential | SignatureCheck) and check.path]
    content, values = Content(request), list[bytes]()
    for path in paths:
        with suppress(RefusedError):  # a body of another kind has no such field
            values += [value for value in content.fields(path) if value]
    for name in [check.form for check in verifier.checks if isinstance(check, SignatureCheck) and check.form]:
        with suppress(RefusedError):
            values += [value for key, value in content.form() if key == name.encode() and value]
    return Proofs(headers, parameters, tuple(values))


def _has_message_signature(verifier: Verifier) -> bool:
    return any(isinstance(check, MessageSignature) for check in verifier.checks)


def conceal(verifier: Verifier, request: Request, salt: bytes) -> Concealed:
    """Return the head of a refused request as it may be kept; the salt (SALT_BYTES) is to be kept with it."""
    digested = {check.header.lower().encode() for check in _credentials(verifier) if check.header is not None}
    hidden = (verifier.credential_headers - _proof_headers(verifier)) | digested
    names = request.lower_names()
    headers = tuple([pair for name, pair in zip(names, request.headers, strict=True) if name not in hidden])
    query = request.query
    lost = (hidden - digested).intersection(names)
    is_whole = not lost or lost.isdisjoint(_signed_headers(verifier, request))
    if request.has_too_many_parameters:  # none of which verifies anything
        query, is_whole = "", False
    elif verifier.credential_query:
        parts = query.split("&")
        query = "&".join(
            [part for part in parts if unquote_plus(part.partition("=")[0]) not in verifier.credential_query]
        )
    kept: dict[KeptCredential, None] = {}
    for check in _credentials(verifier):
        for value in check.given(request)[:MAX_CANDIDATES]:
            if _strength(check, value) < SHORT:
                is_whole = False
            else:
                kept[KeptCredential(_name(check), check.header is not None, _digest(value, salt))] = None
    return Concealed(headers, query, tuple(kept), is_whole)


def revealed(
    verifier: Verifier, request: Request, credentials: Sequence[KeptCredential], salt: bytes, *, now: float
) -> Request:
    """Return a kept request with the credential that it came with, if that is one of today's (`now`) secrets."""
    for check in _credentials(verifier):
        digests = [
            each.digest
            for each in credentials
            if (each.name, each.is_header) == (_name(check), check.header is not None)
        ]
        for entry in check.secrets.at(now) if digests else ():
            digest = _digest(entry.key, salt)
            if any(hmac.compare_digest(digest, each) for each in digests):
                return check.carried(request, entry.key)
    return request


def _credentials(verifier: Verifier) -> list[Credential]:
    """Return the checks whose credential is in the head."""
    return [check for check in verifier.checks if isinstance(check, Credential) and not check.path]


def _proof_headers(verifier: Verifier) -> set[bytes]:
    """Return the headers that have a signature, its time, or a token that covers the body, in lower case."""
    found: set[bytes] = set()
    for check in verifier.checks:
        if isinstance(check, SignatureCheck):
            found.update(check.names)
            found.update([check.timestamp.name] if check.timestamp is not None else [])
        elif isinstance(check, JsonWebToken):
            found.add(check.header.lower().encode())
    return found - {b""}


def _signed_headers(verifier: Verifier, request: Request) -> set[bytes]:
    """Return the headers without which a request's signature can't be verified, in lower case.

    Some signatures list by themselves what they cover: of these, it is whatever the list mentions.
    """
    found: set[bytes] = set()
    for check in verifier.checks:
        if isinstance(check, SignatureCheck):
            found.update(check.signed.header_names)
            for name in check.signed.list_headers:
                found.update(_NAME.findall(b" ".join(request.values(name)).lower()))
        elif isinstance(check, MessageSignature):
            found.update(_NAME.findall(b" ".join(request.values(b"signature-input")).lower()))
    return found


def _name(check: Credential) -> str:
    return check.parameter or "" if check.header is None else check.header.lower()


def _digest(value: bytes, salt: bytes) -> bytes:
    return hashlib.blake2b(value, key=salt, digest_size=32).digest()


def _strength(check: Credential, value: bytes) -> int:
    """Return the length of the part of a credential that isn't known anyway."""
    if check.prefix != _BASIC:
        return len(value)
    try:
        return len(binascii.a2b_base64(value).partition(b":")[2])
    except binascii.Error:
        return 0
