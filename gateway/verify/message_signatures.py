"""HTTP Message Signatures (RFC 9421) of requests, whose bodies they cover by a Content-Digest (RFC 9530).

A signature says by itself what it covers. So the rules say what it has to cover: the method, the address and the body,
unless they name other components. The body is always covered, or empty. What the sender calls the address is
the source's `public_url`: a `Host` that comes with the request would be whatever its sender likes.

Not supported, and refused: a component in its strict form (`sf`), since that depends on the type of the field; those of
responses and of trailers (`req`, `tr`, `@status`). Everything but the body's digest is verified by the head alone.
"""

import hashlib
import hmac
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, urlsplit

from gateway.model import RefusedError, UsageError
from gateway.verify.algorithms import OfSenderAloneError
from gateway.verify.check import BodyCheck, Draft, SigningSpec
from gateway.verify.content import Content
from gateway.verify.key_ring import KeyEntry, KeyRing
from gateway.verify.public_keys import PublicKey, public_key, read_public_key
from gateway.verify.remote_keys import KeyNeededError
from gateway.verify.request import MAX_PARAMETERS, Reason, Request, preferred_refusal, refused, to_bytes
from gateway.verify.structured_fields import BareItem, InnerList, Item, parse_dictionary, parse_item, serialise
from gateway.verify.tokens import TOKEN

HMAC = "hmac-sha256"
ALGORITHMS: Mapping[str, str] = {
    HMAC: "",
    "ed25519": "ed25519",
    "ecdsa-p256-sha256": "ecdsa-p256-sha256",
    "rsa-pss-sha512": "rsa-pss-sha512",
    "rsa-v1_5-sha256": "rsa-sha256",
}
"""The algorithms (section 6.2.2), and what public_keys.py calls them."""
_KEY_TYPES: Mapping[str, str] = {
    "ed25519": "OKP",
    "ecdsa-p256-sha256": "EC",
    "rsa-pss-sha512": "RSA",
    "rsa-v1_5-sha256": "RSA",
}
"""The types (`kty`) of their keys in a key set."""
MAX_SIGNATURES = 4
MAX_COMPONENTS = 64
MAX_FIELD_BYTES = 8192  # of Signature-Input, of Signature, and of Content-Digest
MAX_KEY_ID = 256  # characters
_DIGESTS: Mapping[str, str] = {"sha-256": "sha256", "sha-512": "sha512"}
_DIGEST = "content-digest"
_P256 = 32  # bytes of each of the two integers in a signature

Component = tuple[str, frozenset[tuple[str, BareItem]]]
"""A component's name with its parameters, whose order doesn't tell two apart (section 2)."""


@dataclass(frozen=True, slots=True)
class MessageKey:
    """A key, by its `keyid` if it is known: itself, as a secret or in DER, and whether a signature is one with it."""

    id: str | None
    key: bytes = field(repr=False)
    verifies: Callable[[bytes, bytes], bool] = field(compare=False, repr=False)


class _Candidate(NamedTuple):
    """A signature that could verify a request: what it is over, and the id of its key, if it has one."""

    signature: bytes
    base: bytes
    key_id: str | None
    covers_body: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSignature:
    """One of up to four signatures in `Signature`, described in `Signature-Input`.

    Its key is one of `keys`, or in the set (RFC 7517) at the https address `key_set`. `covered` are the components that
    it must cover beside the body, None for the method and the address. With `tag`, others than that one's don't count.
    `tolerance` is for `created`, in seconds.
    """

    algorithm: str
    keys: KeyRing[MessageKey]
    key_set: str | None
    covered: tuple[Component, ...] | None
    tag: str | None
    public_url: str
    tolerance: float
    _address: "_Address" = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_address", _Address.of(self.public_url))

    def check_head(self, head: Request, now: float) -> BodyCheck:
        candidates = self._read(head, now)
        if self.key_set is not None:
            return partial(self._check_by_set, self.key_set, candidates)
        matched: dict[_Candidate, KeyEntry[MessageKey]] = {}
        known = self.keys.at(now)
        for candidate in candidates:
            for entry in known:  # all of them: the time taken doesn't depend on which one matched
                if entry.key.id in (None, candidate.key_id) and entry.key.verifies(candidate.signature, candidate.base):
                    matched.setdefault(candidate, entry)
        if not matched:
            raise refused(Reason.BAD_SIGNATURE, "the signature in the header Signature doesn't match this request")
        return partial(self._check_bodies, head, matched)

    def sign(self, draft: Draft, request: Request, now: float, identity: str) -> None:  # noqa: ARG002 - of the protocol
        key = self.keys.first(now) if self.algorithm == HMAC else None
        if key is None:
            raise OfSenderAloneError
        digest = serialise(Item(hashlib.sha256(request.body).digest()))
        draft.add("Content-Digest", f"sha-256={digest}")
        default: tuple[Component, ...] = (_bare("@method"), _bare("@target-uri"))
        components = dict.fromkeys((*(self.covered or default), _bare(_DIGEST)))
        items = [Item(name, dict(parameters)) for name, parameters in components]
        more = {"keyid": key.id, "tag": self.tag}
        given = {name: value for name, value in more.items() if value is not None}
        inputs = InnerList(tuple(items), {"created": int(now), **given})
        try:
            base = _Message(request._replace(headers=draft.raw(), names=None), self._address).base(inputs)
        except RefusedError as error:
            raise UsageError(f"a test event for this source: {error.detail}") from error
        draft.add("Signature-Input", f"sig1={serialise(inputs)}")
        draft.add("Signature", f"sig1={serialise(Item(hmac.digest(key.key, base, 'sha256')))}")

    def query(self, now: float) -> str:  # noqa: ARG002 - of the protocol
        return ""

    def signing_spec(self) -> SigningSpec:
        tolerance = None if self.tolerance == math.inf else self.tolerance
        return SigningSpec(
            proof=f"{self.algorithm} message signature in the header Signature",
            header="Signature",
            timestamp_header="Signature-Input",
            tolerance=tolerance,
        )

    @property
    def header_names(self) -> Sequence[bytes]:
        """Return the headers that must be signed, in lower case."""
        return [name.encode() for name, _ in self.covered or () if not name.startswith("@")]

    def _read(self, head: Request, now: float) -> Sequence[_Candidate]:
        """Return the signatures that may be one of this request. Raises RefusedError if none may."""
        inputs = _dictionary(head, "Signature-Input", Reason.MISSING_SIGNATURE)
        signatures = _dictionary(head, "Signature", Reason.MISSING_SIGNATURE)
        if len(inputs) > MAX_SIGNATURES:
            expected = f"expected at most {MAX_SIGNATURES} signatures in the header Signature-Input"
            raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got {len(inputs)}")
        message = _Message(head, self._address)
        candidates: list[_Candidate] = []
        refusals: list[RefusedError] = []
        for label, described in inputs.items():
            try:
                candidates.append(self._candidate(described, signatures.get(label), message, now))
            except RefusedError as error:
                refusals.append(error.with_traceback(None))
        if not candidates:
            raise preferred_refusal(refusals)
        return candidates

    def _candidate(
        self, described: Item | InnerList, written: Item | InnerList | None, message: "_Message", now: float
    ) -> _Candidate:
        signature = written.value if isinstance(written, Item) else None
        if not isinstance(described, InnerList) or not isinstance(signature, bytes):
            expected = "expected a list of components in Signature-Input, and bytes in Signature under the same name"
            raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got something else")
        parameters = described.parameters
        texts = {name: parameters.get(name) for name in ("keyid", "alg", "nonce", "tag")}
        for name, value in texts.items():
            if value is not None and (type(value) is not str or len(value) > MAX_KEY_ID):
                expected = f"expected a string of at most {MAX_KEY_ID} characters as {name} of the signature"
                raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got something else")
        if self.tag is not None and texts["tag"] != self.tag:
            raise refused(Reason.MISSING_SIGNATURE, "expected a signature with the source's tag, got something else")
        if texts["alg"] not in (None, self.algorithm):
            raise refused(Reason.MALFORMED_SIGNATURE, f"expected a signature of {self.algorithm}, got something else")
        self._check_times(parameters, now)
        components = [_component(item) for item in described.items]
        covered = set(components)
        if len(covered) < len(components) or len(components) > MAX_COMPONENTS:
            expected = f"expected at most {MAX_COMPONENTS} components, each once"
            raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got others")
        self._check_coverage(covered, message.head)
        key_id = texts["keyid"]
        return _Candidate(
            signature,
            message.base(described),
            key_id if isinstance(key_id, str) else None,
            _bare(_DIGEST) in covered,
        )

    def _check_times(self, parameters: Mapping[str, object], now: float) -> None:
        for name in ("created", "expires"):
            if parameters.get(name) is not None and type(parameters[name]) is not int:
                raise refused(Reason.MALFORMED_TIMESTAMP, f"expected Unix seconds as {name} of the signature")
        created, expires = parameters.get("created"), parameters.get("expires")
        if isinstance(expires, int) and now > expires:
            raise refused(Reason.STALE_TIMESTAMP, f"the signature expired {now - expires:.0f} s ago")
        if not isinstance(created, int):
            if self.tolerance != math.inf:
                raise refused(Reason.MISSING_TIMESTAMP, "expected created in the header Signature-Input, got none")
        elif abs(now - created) > self.tolerance:
            expected = f"expected a signature created at most {self.tolerance:g} s from now"
            way = "ago" if created < now else "ahead"
            raise refused(Reason.STALE_TIMESTAMP, f"{expected}, got one of {abs(now - created):.0f} s {way}")

    def _check_coverage(self, covered: set[Component], head: Request) -> None:
        missing: list[str] = []
        if self.covered is not None:
            missing = [_shown(each) for each in self.covered if each not in covered]
        else:
            if _bare("@method") not in covered:
                missing.append("@method")
            address = ["@authority", "@path", *(["@query"] if head.query else [])]
            if _bare("@target-uri") not in covered and not {_bare(name) for name in address} <= covered:
                missing.append(f"@target-uri or {' and '.join(address)}")
        if missing:
            raise refused(
                Reason.BAD_SIGNATURE, f"expected a signature that covers {', '.join(missing)}, got something else"
            )

    def _check_bodies(
        self, head: Request, matched: Mapping[_Candidate, KeyEntry[MessageKey]], request: Request, content: Content
    ) -> int | None:
        """Check the body by each good signature: not each has to cover it (section 4.3). One that vouches is enough."""
        refusals: list[RefusedError] = []
        for candidate, entry in matched.items():
            try:
                return self._check_body(head, candidate, entry.secret_index, request, content)
            except RefusedError as error:
                refusals.append(error.with_traceback(None))
        raise preferred_refusal(refusals)

    def _check_body(
        self, head: Request, candidate: _Candidate, index: int | None, request: Request, content: Content
    ) -> int | None:
        if candidate.covers_body:
            _check_digest(head, content)
        elif request.body:
            raise refused(Reason.BAD_SIGNATURE, "expected a signature that covers content-digest, got something else")
        return index

    def _check_by_set(
        self, key_set: str, candidates: Sequence[_Candidate], request: Request, content: Content
    ) -> int | None:
        needed = ""
        refusals: list[RefusedError] = []
        for candidate in candidates:
            try:
                if self._is_by_set(key_set, candidate, content):
                    return self._check_body(request, candidate, None, request, content)
            except KeyNeededError as error:
                needed = error.url
            except RefusedError as error:
                refusals.append(error.with_traceback(None))
        if needed:
            raise KeyNeededError(needed)
        refusals.append(
            refused(Reason.BAD_SIGNATURE, "the signature in the header Signature doesn't match this request")
        )
        raise preferred_refusal(refusals)

    def _is_by_set(self, key_set: str, candidate: _Candidate, content: Content) -> bool:
        if candidate.key_id is None:
            raise refused(Reason.BAD_KEY, "expected the keyid of a key in the header Signature-Input, got none")
        keys = content.fetched_key(key_set, candidate.key_id).by_id.get(candidate.key_id, {})
        key = keys.get(_KEY_TYPES[self.algorithm])
        try:
            verifies = public_message_key(key, self.algorithm, None).verifies
        except ValueError as error:
            expected = f"expected a key of {self.algorithm} that its sender has published"
            raise refused(Reason.BAD_KEY, f"{expected}, got something else") from error
        return verifies(candidate.signature, candidate.base)


def secret_message_key(secret: bytes, key_id: str | None) -> MessageKey:
    """Return a key of hmac-sha256 (section 3.3.3)."""

    def verifies(signature: bytes, base: bytes) -> bool:
        return hmac.compare_digest(hmac.digest(secret, base, "sha256"), signature)

    return MessageKey(key_id, secret, verifies)


def public_message_key(key: object, algorithm: str, key_id: str | None) -> MessageKey:
    """Return a key of `cryptography` as one of another algorithm. Raises ValueError if it is of another kind."""
    return _message_key(public_key(key, ALGORITHMS[algorithm]), algorithm, key_id)


def read_message_key(text: str, algorithm: str, key_id: str | None) -> MessageKey:
    """Return a public key as the rules write it. Raises ValueError with what was expected."""
    return _message_key(read_public_key(text, ALGORITHMS[algorithm]), algorithm, key_id)


def _message_key(key: PublicKey, algorithm: str, key_id: str | None) -> MessageKey:
    is_of_integers = algorithm == "ecdsa-p256-sha256"
    return MessageKey(key_id, key.der, _of_integers(key.verifies) if is_of_integers else key.verifies)


def parse_component(text: str) -> Component:
    """Return a component as the rules write it: `@method`, `date`, `@query-param;name="id"`. Raises ValueError."""
    name, semicolon, parameters = text.partition(";")
    try:
        return _component(parse_item(f'"{name}"{semicolon}{parameters}'.encode()))
    except RefusedError as error:
        raise ValueError(text) from error


def _of_integers(verifies: Callable[[bytes, bytes], bool]) -> Callable[[bytes, bytes], bool]:
    """Return how a signature is verified that is two integers one after the other (section 3.3.4), by DER."""
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature  # noqa: PLC0415 - if needed

    def verifies_integers(signature: bytes, base: bytes) -> bool:
        if len(signature) != 2 * _P256:
            return False
        first, second = int.from_bytes(signature[:_P256]), int.from_bytes(signature[_P256:])
        return verifies(encode_dss_signature(first, second), base)

    return verifies_integers


def _bare(name: str) -> Component:
    return name, frozenset()


def _shown(component: Component) -> str:
    name, parameters = component
    return serialise(Item(name, dict(parameters))).replace(f'"{name}"', name, 1)


_DERIVED = {"@method", "@target-uri", "@authority", "@scheme", "@request-target", "@path", "@query"}


def _component(item: Item) -> Component:
    """Return what a component is. Raises RefusedError for one that isn't known."""
    name, parameters = item.value, item.parameters
    if type(name) is str:
        kinds = {key: type(value) for key, value in parameters.items()}
        if name in _DERIVED:
            is_known = not kinds
        elif name.startswith("@"):
            is_known = name == "@query-param" and kinds == {"name": str}
        else:
            is_field = TOKEN.fullmatch(name) is not None and name == name.lower()
            is_known = is_field and (not kinds or kinds == {"key": str} or parameters == {"bs": True})
        if is_known:
            return name, frozenset(parameters.items())
    expected = "expected header fields, alone or with bs or key, and @-components of requests"
    raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got another component in the header Signature-Input")


class _Address(NamedTuple):
    """A source's `public_url`, in the parts that are components. `path` is empty if it is the request's."""

    url: str
    scheme: str
    authority: str
    path: str

    @staticmethod
    def of(url: str) -> "_Address":
        parts = urlsplit(url)
        scheme, authority = parts.scheme.lower(), parts.netloc.lower()
        default = ":443" if scheme == "https" else ":80"
        return _Address(url, scheme, authority.removesuffix(default), parts.path)


class _Message:
    """The head of a request, as what is signed of it. What several components are parts of is parsed once."""

    def __init__(self, head: Request, address: _Address) -> None:
        self.head = head
        self._address = address
        self._parameters: dict[str, list[str]] | None = None
        self._dictionaries: dict[str, dict[str, Item | InnerList]] = {}

    def base(self, described: InnerList) -> bytes:
        """Return the signature base (section 2.5). Raises RefusedError if a component of it is missing."""
        lines = [
            serialise(item).encode() + b": " + self._value(str(item.value), item.parameters) for item in described.items
        ]
        return b"\n".join([*lines, b'"@signature-params": ' + serialise(described).encode()])

    def _value(self, name: str, parameters: Mapping[str, BareItem]) -> bytes:
        if not name.startswith("@"):
            return self._field(name, parameters)
        head, address = self.head, self._address
        path = address.path or head.path
        query = f"?{head.query}" if head.query else ""
        match name:
            case "@method":
                text = head.method
            case "@scheme":
                text = address.scheme
            case "@authority":
                text = address.authority
            case "@path":
                text = path
            case "@query":
                text = f"?{head.query}"
            case "@request-target":
                text = path + query
            case "@target-uri":
                text = address.url + ("" if address.path else path) + query
            case _:
                text = self._query_parameter(str(parameters["name"]))
        return to_bytes(text)

    def _field(self, name: str, parameters: Mapping[str, BareItem]) -> bytes:
        """Return the value of a header field (section 2.1): its lines as they are, or one member of a dictionary."""
        lines = [line.strip(b" \t") for line in self.head.values(name.encode())]
        if not lines:
            raise refused(Reason.MISSING_HEADER, f"expected the header {name}, which is signed, got none")
        if "bs" in parameters:
            return b", ".join([serialise(Item(line)).encode() for line in lines])
        if "key" not in parameters:
            return b", ".join(lines)
        if name not in self._dictionaries:
            self._dictionaries[name] = _dictionary(self.head, name, Reason.MISSING_HEADER)
        member = self._dictionaries[name].get(str(parameters["key"]))
        if member is None:
            raise refused(Reason.MISSING_HEADER, f"expected a member of the header {name} that is signed, got none")
        return serialise(member).encode()

    def _query_parameter(self, name: str) -> str:
        """Return a parameter's value as it is signed (section 2.2.8): decoded, and encoded in the one way."""
        if self._parameters is None:
            if self.head.has_too_many_parameters:
                expected = f"expected a query of at most {MAX_PARAMETERS} parameters"
                raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got more")
            self._parameters = {}
            for key, value in parse_qsl(self.head.query, keep_blank_values=True, errors="surrogateescape"):
                self._parameters.setdefault(_encoded(key), []).append(value)
        found = self._parameters.get(name, [])
        if len(found) != 1:
            expected = "expected the query parameter that is signed once"
            raise refused(Reason.MISSING_HEADER, f"{expected}, got it {len(found)} times")
        return _encoded(found[0])


def _dictionary(head: Request, name: str, missing: Reason) -> dict[str, Item | InnerList]:
    lines = head.values(name.lower().encode())
    if not lines:
        raise refused(missing, f"expected the header {name}, got none")
    text = b", ".join(lines)
    expected = f"expected a dictionary of RFC 8941 in the header {name}, of at most {MAX_FIELD_BYTES} bytes"
    if len(text) > MAX_FIELD_BYTES:
        raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got {len(text)}")
    try:
        return parse_dictionary(text)
    except ValueError as error:
        raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got something else") from error


def _encoded(text: str) -> str:
    return quote(text, safe="*", errors="surrogateescape").replace("~", "%7E")


def _check_digest(head: Request, content: Content) -> None:
    """Raise RefusedError unless each digest that we know, and at least one, is the body's."""
    digests = _dictionary(head, "Content-Digest", Reason.MISSING_HEADER)
    known = [(algorithm, digests[name]) for name, algorithm in _DIGESTS.items() if name in digests]
    if not known:
        raise refused(
            Reason.MALFORMED_SIGNATURE, f"expected a Content-Digest of {' or '.join(_DIGESTS)}, got something else"
        )
    for algorithm, given in known:
        value = given.value if isinstance(given, Item) else None
        if not isinstance(value, bytes) or not hmac.compare_digest(value, content.digest(algorithm)):
            raise refused(Reason.BAD_SIGNATURE, "the Content-Digest isn't that of this body")
