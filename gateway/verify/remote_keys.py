"""Keys that a request names by an address: which addresses are good, and a bounded cache of what was fetched from them.

Nothing here fetches: a check that needs a key raises KeyNeededError, whoever verifies fetches it, and verifies again.

What is trusted is the vendor's own server. The address has its host, compared as a whole, and the TLS connection has
proved by the system's authorities that this server is it; so whatever it publishes under that path is a key of the
vendor's. A certificate's issuer and names would prove nothing more, and aren't looked at, but its dates are: by them a
vendor says which keys are in use. What the request says of the key beside its address is never believed.
"""

import re
from collections import OrderedDict
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import orjson

from gateway.model import RefusedError
from gateway.verify.request import Reason, refused

FRESH = 3600.0  # seconds for which a key is used before its address is asked again
USABLE = 86400.0  # seconds for which it is used if nothing answers there
PAUSE = 10.0  # seconds for which an address that failed isn't asked again: SNS sends again after 20
MAX_IN_SET = 64
MAX_KEYS = 32  # of a source: vendors have one or two at a time
MAX_FAILURES = 128
MAX_URL = 512
MAX_DOCUMENT_BYTES = 64 * 1024
MAX_KEYS_OF_REQUEST = 2  # a vendor that signs twice has one for each signature
_KEY_TYPES: Mapping[str, str] = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
_PATH = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")  # neither a query, an escape nor a step upwards
_LABEL = "[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_HOST = re.compile(rf"(?:(?:{_LABEL}|\*)\.)*{_LABEL}\.[a-z]{{2,}}")


class Fetch(Protocol):
    """Returns the document at an https address, for a POST of `request_body` if there is any. Raises UnfetchedError."""

    def __call__(self, url: str, *, timeout: float, limit: int, request_body: bytes = b"") -> Awaitable[bytes]: ...


class KeyNeededError(Exception):
    """A signature can't be verified before the key at `url` is fetched: by a POST if there is a `request_body`."""

    def __init__(self, url: str, request_body: bytes = b"") -> None:
        super().__init__(url)
        self.url = url
        self.request_body = request_body


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLocations:
    """The addresses at which a vendor has its keys: https, one of the hosts, a path that starts so."""

    hosts: tuple[str, ...]
    path: str = "/"
    _pattern: re.Pattern[str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        hosts = "|".join([re.escape(host).replace(r"\*", _LABEL) for host in self.hosts])
        pattern = re.compile(rf"https://(?:{hosts})(?={re.escape(self.path)}){_PATH.pattern}")
        object.__setattr__(self, "_pattern", pattern)

    def url(self, text: bytes) -> str:
        """Return the address that a request names; of a path alone it is the first host's. Raises RefusedError."""
        try:
            written = text[: MAX_URL + 1].decode("ascii")
        except UnicodeDecodeError:
            written = ""
        url = f"https://{self.hosts[0]}{written}" if written.startswith("/") else written
        if len(url) > MAX_URL or not self._pattern.fullmatch(url):
            expected = f"expected the key's address to be https://{' or '.join(self.hosts)} and a path in {self.path}"
            raise refused(Reason.BAD_KEY, f"{expected}, got something else")
        return url


def is_host(text: str) -> bool:
    """Return whether it is a host's name in lower case, in which `*` stands for one label."""
    return bool(_HOST.fullmatch(text))


def is_path(text: str) -> bool:
    """Return whether a path of an address can start so."""
    return text == "/" or bool(_PATH.fullmatch(text.removesuffix("/")))


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedKey:
    """A public key, of the library's type, and between which times it is good; or a set of keys.

    Those are by their ids, and by their types (`kty`): keys of several types may have one id (RFC 7517, section 4.5).
    """

    key: object = None
    by_id: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    not_before: float = 0.0
    not_after: float = float("inf")

    def check(self, now: float) -> None:
        """Raise RefusedError unless it is good now."""
        if not self.not_before <= now <= self.not_after:
            raise refused(Reason.BAD_KEY, "expected a key that is valid now, got one that isn't")


def read_document(document: bytes) -> FetchedKey:
    """Return what is in a document: a certificate or a public key in PEM, a JSON Web Key Set, or one key of Plaid's.

    Raises ValueError.
    """
    if document.lstrip().startswith(b"{"):
        return _single_key(document) or FetchedKey(by_id=_key_set(document))
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - only if a source needs it
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415 - the same
    from cryptography.x509 import InvalidVersion, load_pem_x509_certificate  # noqa: PLC0415 - the same

    try:
        if b"-----BEGIN CERTIFICATE-----" not in document:
            return FetchedKey(key=load_pem_public_key(document))
        certificate = load_pem_x509_certificate(document)
        return FetchedKey(
            key=certificate.public_key(),
            not_before=certificate.not_valid_before_utc.timestamp(),
            not_after=certificate.not_valid_after_utc.timestamp(),
        )
    except (UnsupportedAlgorithm, InvalidVersion) as error:
        raise ValueError("expected a public key or a certificate in PEM, got one of an unknown kind") from error


def type_of_key(algorithm: object) -> str:
    """Return the type (`kty`) of the keys for an algorithm of signed tokens (RFC 7518, section 3.1; RFC 8037).

    "" for one that takes a secret, and for anything else.
    """
    return _KEY_TYPES.get(algorithm[:2], "") if isinstance(algorithm, str) else ""


def _key_set(document: bytes) -> Mapping[str, Mapping[str, object]]:
    """Return the keys of a set (RFC 7517, section 5), without those that the library doesn't know or can't read."""
    from jwt import PyJWK  # noqa: PLC0415 - only if a source needs it
    from jwt.exceptions import PyJWTError  # noqa: PLC0415 - the same

    keys: list[PyJWK] = []
    with suppress(KeyError, ValueError, TypeError):
        for fields in orjson.loads(document)["keys"]:
            with suppress(PyJWTError, LookupError, ValueError, TypeError, AttributeError, RecursionError):
                keys.append(PyJWK(fields))
            if len(keys) == MAX_IN_SET:
                break
    if not keys:
        raise ValueError("expected a JSON Web Key Set, got another document")
    by_id: dict[str, dict[str, object]] = {}
    for key in keys:
        if isinstance(key.key_id, str):
            by_id.setdefault(key.key_id, {})[str(key.key_type)] = key.key
    return by_id


def _single_key(document: bytes) -> FetchedKey | None:
    """Return the key in a document that has one under `key`, with the time from which on it isn't good any more.

    https://plaid.com/docs/api/webhooks/webhook-verification/#get-webhook-verification-key. Raises ValueError.
    """
    try:
        fields = orjson.loads(document)["key"]
    except (KeyError, ValueError):
        return None
    from jwt import PyJWK  # noqa: PLC0415 - only if a source needs it
    from jwt.exceptions import PyJWTError  # noqa: PLC0415 - the same

    try:
        expires = fields.get("expired_at")
        not_after = float("inf") if expires is None else float(expires)
        key = PyJWK(fields)
        return FetchedKey(by_id={str(fields["kid"]): {str(key.key_type): key.key}}, not_after=not_after)
    except (PyJWTError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("expected a JSON Web Key, got another document") from error


class KeyCache:
    """The keys of one source, by their addresses. Times are in Unix seconds.

    A key is asked for again after FRESH, and used up to USABLE as long as its address doesn't respond. Those used least
    recently make room for others, so that addresses that fail or that strangers make up take nothing from those in use.
    """

    def __init__(self) -> None:
        self._keys: OrderedDict[str, tuple[FetchedKey, float]] = OrderedDict()
        self._failures: OrderedDict[str, float] = OrderedDict()

    @property
    def urls(self) -> Sequence[str]:
        """The addresses of the keys that are known."""
        return list(self._keys)

    def get(self, url: str, now: float, key_id: str | None = None, request_body: bytes = b"") -> FetchedKey:
        """Return the key at an address. Raises KeyNeededError if it must be fetched, RefusedError if it can't be.

        A set without the key of that id is fetched again, unless it has just been: anybody may make up ids.
        """
        key, fetched_at = self._keys.get(url, (None, 0.0))
        if key is not None:
            self._keys.move_to_end(url)
            age = now - fetched_at
            if 0 <= age < (FRESH if key_id is None or key_id in key.by_id else PAUSE):
                return key
        failed_at = self._failures.get(url)
        if failed_at is None or not 0 <= now - failed_at < PAUSE:
            raise KeyNeededError(url, request_body)
        if key is not None and 0 <= now - fetched_at < USABLE:
            return key
        raise key_unavailable("it could not be fetched")

    def knows(self, url: str) -> bool:
        """Return whether a key is known from an address. Of others, anybody may make up as many as they like."""
        return url in self._keys

    def keep(self, url: str, document: bytes, now: float) -> None:
        """Keep the key in a fetched document. Raises ValueError if there is none in it; then nothing is changed."""
        self._keys[url] = (read_document(document), now)
        self._keys.move_to_end(url)
        self._failures.pop(url, None)
        if len(self._keys) > MAX_KEYS:
            self._keys.popitem(last=False)

    def fail(self, url: str, now: float, *, is_gone: bool = False) -> None:
        """Note that an address gave no key; with `is_gone` its server says that there is none, and it is forgotten."""
        if is_gone:
            self._keys.pop(url, None)
        self._failures[url] = now
        self._failures.move_to_end(url)
        if len(self._failures) > MAX_FAILURES:
            self._failures.popitem(last=False)


def key_unavailable(why: str) -> RefusedError:
    """Return the refusal of a request whose key isn't there: its sender shall send it again."""
    return RefusedError(503, Reason.KEY_UNAVAILABLE.value, f"the sender's key isn't available at the moment: {why}")
