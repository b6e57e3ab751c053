"""Credentials that are sent as they are, and no credential at all."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from gateway.model import UsageError
from gateway.verify.check import MAX_CANDIDATES, BodyCheck, Draft, SigningSpec, checked_with, nothing_to_check
from gateway.verify.content import Content, FieldPath
from gateway.verify.key_ring import KeyEntry, KeyRing
from gateway.verify.request import Reason, Request, refused, to_bytes


@dataclass(frozen=True, slots=True)
class Unverified:
    """Scheme `none`: everyone may send. Always explicit in the rules, never a default."""

    def check_head(self, head: Request, now: float) -> BodyCheck:  # noqa: ARG002 - a check's signature
        return nothing_to_check

    def sign(self, draft: Draft, request: Request, now: float, identity: str) -> None:
        pass

    def query(self, now: float) -> str:  # noqa: ARG002 - as above
        return ""

    def signing_spec(self) -> SigningSpec:
        return SigningSpec(proof="nothing: everyone may send")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A shared secret that is sent as it is: in a header after `prefix` (any case), in the query, or in the JSON body.

    A query parameter counts only if its name has no percent-encoding, since only then it is removed from the event.
    """

    header: str | None = None
    parameter: str | None = None
    path: FieldPath = ()
    prefix: str = ""
    secrets: KeyRing[bytes]

    def check_head(self, head: Request, now: float) -> BodyCheck:
        if self.path:
            return self._check_body
        return checked_with(self._check(self.given(head), now))

    def sign(self, draft: Draft, request: Request, now: float, identity: str) -> None:  # noqa: ARG002 - as above
        known = {entry.key for entry in self.secrets.at(now)}
        if self.path and not {*Content(request).fields(self.path)} <= known:
            raise UsageError(f"a test event for this source: expected its {self._what()}")
        if self.header is not None:
            draft.add(self.header, self.prefix + self.secrets.first(now).decode("utf-8", "surrogateescape"))

    def query(self, now: float) -> str:
        if self.parameter is None:
            return ""
        return f"{self.parameter}=" + "".join([_quote(byte) for byte in self.secrets.first(now)])

    def signing_spec(self) -> SigningSpec:
        return SigningSpec(proof=self._what(), header=self.header, query=self.parameter)

    def carried(self, request: Request, credential: bytes) -> Request:
        """Return the request with a credential added to its head, as its sender would."""
        if self.header is not None:
            headers = (*request.headers, (self.header.encode(), self.prefix.encode() + credential))
            return request._replace(headers=headers, names=None)
        parameter = f"{self.parameter}=" + "".join([_quote(byte) for byte in credential])
        return request._replace(query="&".join(filter(None, [request.query, parameter])))

    def _check_body(self, request: Request, content: Content) -> int | None:  # noqa: ARG002 - a check's signature
        found = content.fields(self.path)
        if not found or None in found:
            raise refused(Reason.MISSING_CREDENTIALS, f"expected {self._what()}, got none")
        indexes = [self._check([] if value is None else [value], content.now) for value in found]
        return max(
            [index for index in indexes if index is not None], default=None
        )  # of several, the one to be replaced

    def _check(self, given: Sequence[bytes], now: float) -> int | None:
        """Return the index of the secret that is among what was given. Raises RefusedError."""
        if not given:
            raise refused(Reason.MISSING_CREDENTIALS, f"expected {self._what()}, got none")
        matched: KeyEntry[bytes] | None = None
        if len(given) <= MAX_CANDIDATES:
            known = self.secrets.at(now)
            for value in given:
                for entry in known:
                    # No early exit: the time taken doesn't depend on which one matched.
                    if hmac.compare_digest(value, entry.key):
                        matched = matched or entry
        if matched is None:
            raise refused(Reason.BAD_CREDENTIALS, f"expected a known {self._what()}, got another one")
        return matched.secret_index

    def given(self, request: Request) -> list[bytes]:
        """Return what a request's head has as the credential, without the prefix, as it is compared."""
        if self.header is None:
            if request.has_too_many_parameters:
                return []
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
        if self.path:
            return f"credential in the field {'.'.join(map(str, self.path))} of the body"
        if self.header is None:
            return f"credential in the query parameter {self.parameter}"
        return f"credential in the header {self.header}"


def _quote(byte: int) -> str:
    return chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else f"%{byte:02X}"
