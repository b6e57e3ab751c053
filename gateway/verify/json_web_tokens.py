"""JSON Web Tokens (RFC 7519) that vouch for a request: signed with a shared secret, or by a private key.

A token by itself is a credential; claims that are compared with the request, such as the SHA-256 of the body, make it a
signature. PyJWT does the cryptography, and is imported with the first token; what a token claims is checked here, by
the clock that all signatures are checked by.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from gateway.model import RefusedError
from gateway.verify.algorithms import OfSenderAloneError
from gateway.verify.check import BodyCheck, Draft, SigningSpec, checked_with
from gateway.verify.content import Content
from gateway.verify.key_ring import KeyEntry, KeyRing
from gateway.verify.remote_keys import type_of_key
from gateway.verify.request import Reason, Request, refused
from gateway.verify.signed_string import SignedString, SigningInput

if TYPE_CHECKING:
    from jwt import PyJWS

MAX_TOKEN_BYTES = 8192
MAX_KEY_ID = 256  # characters
SYMMETRIC = ("HS256", "HS384", "HS512")
ASYMMETRIC = ("RS256", "RS384", "RS512", "ES256", "ES384", "EdDSA")
ALGORITHMS = (*SYMMETRIC, *ASYMMETRIC)
_BEARER = b"bearer "
_PLAIN_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonWebToken:
    """A token in a header; in `Authorization` with or without the word Bearer before it.

    Its key is one of `keys`, or in the set (RFC 7517) at the https address `key_set`, fetched when it is needed; or its
    sender is asked for it by `key_request`.

    Every claim in `claims` has to be the string that its template gives, or that boolean; of an `aud` that is a list,
    one of it. A token without `exp` is good at any time, unless `tolerance` is given, which then counts from its `iat`.
    """

    header: str
    algorithms: tuple[str, ...]
    keys: KeyRing[bytes]
    key_set: str | None
    key_request: "KeyRequest | None" = None
    claims: tuple[tuple[str, SignedString | bool], ...]
    public_url: str | None
    leeway: float
    tolerance: float | None

    @property
    def covers_body(self) -> bool:
        """Whether a claim is compared with the body, so that the token is good for this one alone."""
        return any(isinstance(each, SignedString) and each.covers_body for _, each in self.claims)

    def check_head(self, head: Request, now: float) -> BodyCheck:
        tokens = head.values(self.header.lower().encode())
        if not tokens:
            raise refused(Reason.MISSING_SIGNATURE, f"expected a token {self._where()}, got none")
        if len(tokens) > 1 or len(tokens[0]) > MAX_TOKEN_BYTES:
            expected = f"expected one token {self._where()}, of at most {MAX_TOKEN_BYTES} bytes"
            raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got {len(tokens)}")
        token = tokens[0][len(_BEARER) :] if tokens[0][: len(_BEARER)].lower() == _BEARER else tokens[0]
        if self.key_set is not None or self.key_request is not None:
            return partial(self._check_all, token, now)
        claims, index = self._claims(token, self.keys.at(now))
        self._check_times(claims, now)
        return partial(self._check_claims, claims, index) if self.claims else checked_with(index)

    def sign(self, draft: Draft, request: Request, now: float, identity: str) -> None:
        if self.algorithms[0] not in SYMMETRIC:
            raise OfSenderAloneError
        content = Content(request)
        payload: dict[str, object] = {"iat": int(now), "exp": int(now) + 60, "jti": identity}
        for name, template in self.claims:
            given = SigningInput(request, content, b"", self.public_url or "", b"")
            payload[name] = template if isinstance(template, bool) else template.render(given).decode()
        with _any_length():
            signed = _jws().encode(orjson.dumps(payload), self.keys.first(now), algorithm=self.algorithms[0])
        draft.add(self.header, f"Bearer {signed}" if self.header.lower() == "authorization" else signed)

    def query(self, now: float) -> str:  # noqa: ARG002 - a check's signature
        return ""

    def signing_spec(self) -> SigningSpec:
        return SigningSpec(proof=f"JSON Web Token ({', '.join(self.algorithms)}) {self._where()}", header=self.header)

    def _where(self) -> str:
        return f"in the header {self.header}"

    def _check_all(self, token: bytes, now: float, request: Request, content: Content) -> int | None:
        key_id, key_type = self._key_named(token)
        if self.key_request is None:
            keys = content.fetched_key(self.key_set or "", key_id).by_id.get(key_id)
        else:
            url, request_body = self.key_request.of(key_id)
            keys = content.fetched_key(url, request_body=request_body).by_id.get(key_id)
        if keys is None:
            raise refused(
                Reason.BAD_KEY, f"expected a key that its sender has published {self._where()}, got something else"
            )
        key = keys.get(key_type)
        if key is None:
            raise self._malformed()
        claims, index = self._claims(token, (KeyEntry(key),))
        self._check_times(claims, now)
        return self._check_claims(claims, index, request, content)

    def _malformed(self) -> RefusedError:
        expected = f"expected a JSON Web Token of {', '.join(self.algorithms)} {self._where()}"
        return refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got something else")

    def _key_named(self, token: bytes) -> tuple[str, str]:
        """Return the `kid` of a token (RFC 7515, section 4.1.4), and the type of the keys for its `alg`."""
        from jwt.exceptions import PyJWTError  # noqa: PLC0415 - only where a token is used

        try:
            header = _jws().get_unverified_header(token)
        except (PyJWTError, ValueError):
            header = {}
        key_id = header.get("kid")
        if isinstance(key_id, str) and len(key_id) <= MAX_KEY_ID:
            return key_id, type_of_key(header.get("alg"))
        raise refused(
            Reason.MALFORMED_SIGNATURE, f"expected a token with a key's id {self._where()}, got something else"
        )

    def _claims(self, token: bytes, keys: Sequence[KeyEntry[Any]]) -> tuple[Mapping[str, Any], int | None]:
        """Return what a token claims, and the index of the key that verifies it. Raises RefusedError if none does."""
        from jwt.exceptions import DecodeError, InvalidKeyError, InvalidSignatureError, PyJWTError  # noqa: PLC0415

        found: list[tuple[Any, int | None]] = []
        malformed: Exception | None = None
        jws = _jws(refuses_short_keys=self.algorithms[0] not in SYMMETRIC)
        for entry in keys:  # all of them: the time taken doesn't depend on which one matched
            try:
                with _any_length():
                    decoded = jws.decode_complete(token, entry.key, algorithms=list(self.algorithms))
                found.append((orjson.loads(decoded["payload"]), entry.secret_index))
            except InvalidSignatureError:
                continue
            except (DecodeError, InvalidKeyError, PyJWTError, TypeError, ValueError) as error:
                malformed = error  # or the key is of another algorithm than the token, while one replaces the other
        if not found and malformed is not None:
            raise self._malformed() from malformed
        if not found:
            raise refused(Reason.BAD_SIGNATURE, f"the token {self._where()} isn't signed with a known key")
        if not isinstance(found[0][0], dict):
            raise refused(
                Reason.MALFORMED_SIGNATURE, f"expected a token with claims {self._where()}, got something else"
            )
        return found[0]

    def _check_times(self, claims: Mapping[str, Any], now: float) -> None:
        times = {}
        for name in ("exp", "nbf", "iat"):
            value = claims.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                times[name] = value
            elif value is not None:
                raise refused(Reason.MALFORMED_TIMESTAMP, f"expected a number as the token's {name}, got another type")
        if "exp" in times and now > times["exp"] + self.leeway:
            raise refused(Reason.STALE_TIMESTAMP, f"the token expired {now - times['exp']:.0f} s ago")
        for name in ("nbf", "iat"):
            if name in times and times[name] > now + self.leeway:
                raise refused(Reason.STALE_TIMESTAMP, f"the token's {name} is {times[name] - now:.0f} s ahead")
        if self.tolerance is not None:
            if "iat" not in times:
                raise refused(Reason.MISSING_TIMESTAMP, "expected iat in the token, got none")
            if now - times["iat"] > self.tolerance:
                expected = f"expected a token issued at most {self.tolerance:g} s ago"
                raise refused(Reason.STALE_TIMESTAMP, f"{expected}, got one of {now - times['iat']:.0f} s ago")

    def _check_claims(
        self, claims: Mapping[str, Any], index: int | None, request: Request, content: Content
    ) -> int | None:
        given = SigningInput(request, content, b"", self.public_url or "", b"")
        for name, template in self.claims:
            value = claims.get(name)
            if isinstance(template, bool):
                is_expected = value is template  # neither 1 nor "true"
            else:
                expected = template.render(given).decode("utf-8", "surrogateescape")
                values: Sequence[Any] = value if isinstance(value, list) and name == "aud" else [value]
                is_expected = expected in [each for each in values if isinstance(each, str)]
            if not is_expected:
                raise refused(Reason.BAD_SIGNATURE, f"the token's {name} doesn't match this request")
        return index


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRequest:
    """How Plaid is asked for one key: by a POST of its id, with the credentials of its API.

    https://plaid.com/docs/api/webhooks/webhook-verification/
    """

    host: str
    client_id: str = field(repr=False)
    api_secret: str = field(repr=False)

    def of(self, key_id: str) -> tuple[str, bytes]:
        """Return the address, whose fragment is the key's id for us, and the body. Raises RefusedError."""
        if not _PLAIN_ID.fullmatch(key_id):  # anybody may make one up: nothing but an id is sent on
            raise refused(
                Reason.MALFORMED_SIGNATURE, "expected a token with a key's id of letters and digits, got something else"
            )
        fields = {"client_id": self.client_id, "secret": self.api_secret, "key_id": key_id}
        return f"https://{self.host}/webhook_verification_key/get#{key_id}", orjson.dumps(fields)


def _jws(*, refuses_short_keys: bool = False) -> "PyJWS":
    from jwt import PyJWS  # noqa: PLC0415 - only where a token is used

    return PyJWS(algorithms=list(ALGORITHMS), options={"enforce_minimum_key_length": refuses_short_keys})


@contextmanager
def _any_length() -> Iterator[None]:
    """Keep the library from writing of a short secret on stderr: its vendor chose it, and `gateway check` warns."""
    from jwt.warnings import InsecureKeyLengthWarning  # noqa: PLC0415 - only where a token is used

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureKeyLengthWarning)
        yield
