"""Builds the check of a signing method from the parsed values of its keys."""

import binascii
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from gateway.verify.algorithms import Algorithm, Hash, Hmac
from gateway.verify.boundaries import AmbiguousError
from gateway.verify.check import Check
from gateway.verify.config_keys import PLAID_HOSTS, Secret, unit_of
from gateway.verify.config_reader import ConfigPath
from gateway.verify.content import FieldPath
from gateway.verify.credentials import Credential, Unverified
from gateway.verify.encodings import ENCODINGS, SECRET_ENCODINGS, decode_secret
from gateway.verify.json_web_tokens import SYMMETRIC, JsonWebToken, KeyRequest
from gateway.verify.key_ring import KeyEntry, KeyRing
from gateway.verify.message_signatures import HMAC, MessageSignature, read_message_key, secret_message_key
from gateway.verify.public_keys import KeyUrl, PublicKey, PublicKeys, read_public_key
from gateway.verify.remote_keys import KeyLocations
from gateway.verify.request import to_bytes
from gateway.verify.signatures import SignatureCheck
from gateway.verify.signed_string import SignedString, parse_template
from gateway.verify.signing_methods import SigningMethod
from gateway.verify.sns import SnsSignature
from gateway.verify.timestamps import Timestamp

JWT_LEEWAY = 60.0  # of the times in a token
DEFAULT_TOLERANCE = 300.0  # as in the libraries of Standard Webhooks, Stripe and Slack
K = TypeVar("K")
LISTS = ("secrets", "public_keys")


def build_check(
    method: SigningMethod, where: ConfigPath, public_url: str | None, challenge: re.Pattern[str] | None = None
) -> Check | None:
    """Build a check; None if a value that it needs has a problem. `challenge` is what the source's handshake signs."""
    values = method.values
    secrets = ring(values.get("secrets", ()), secret_bytes)
    check: Check | None = None
    match method.scheme:
        case "hmac" | "hash" | "public-key" if {"algorithm", "encoding", "signed"} <= values.keys():
            check = _signature(method.scheme, values, where, public_url, challenge)
        case "token":
            check = Credential(
                header=values.get("header"),
                parameter=values.get("query"),
                path=values.get("field", ()),
                prefix=values.get("prefix", b"").decode(),
                secrets=secrets,
            )
        case "basic" if "username" in values:
            user = to_bytes(values["username"])
            pairs = [
                each._replace(key=binascii.b2a_base64(user + b":" + each.key, newline=False))
                for each in secrets.entries
            ]
            check = Credential(header="Authorization", prefix="Basic ", secrets=KeyRing(tuple(pairs)))
        case "bearer":
            check = Credential(header="Authorization", prefix="Bearer ", secrets=secrets)
        case "jwt" if {"algorithms", "claims"} <= values.keys():
            check = _token(values, where, public_url)
        case "http-message-signature" if "algorithm" in values:
            check = _message_signature(values, where, public_url)
        case "plaid-token" if {"client_id", "api_secret", "environment"} <= values.keys():
            check = _plaid_token(values)
        case "sns-message" if "topics" in values:
            check = SnsSignature(topics=frozenset(values["topics"]), timestamp=_published(values))
        case "none":
            check = Unverified()
        case _:
            pass
    return check


def _token(values: Mapping[str, Any], where: ConfigPath, public_url: str | None) -> JsonWebToken:
    claims = [
        (name, each if isinstance(each, bool) else _bounded(each, None, where.below("claims").below(name)))
        for name, each in values["claims"]
    ]
    kind = "secrets" if values["algorithms"][0] in SYMMETRIC else "public_keys"
    return JsonWebToken(
        header=values.get("header", "Authorization"),
        algorithms=values["algorithms"],
        keys=ring(values.get(kind, ()), secret_bytes),
        key_set=values.get("key_set"),
        claims=tuple([(name, each) for name, each in claims if each is not None]),
        public_url=public_url,
        leeway=JWT_LEEWAY,
        tolerance=values.get("tolerance"),
    )


def _plaid_token(values: Mapping[str, Any]) -> JsonWebToken:
    return JsonWebToken(
        header="Plaid-Verification",
        algorithms=("ES256",),
        keys=KeyRing(),
        key_set=None,
        key_request=KeyRequest(
            host=PLAID_HOSTS[values["environment"]], client_id=values["client_id"], api_secret=values["api_secret"]
        ),
        claims=(("request_body_sha256", parse_template("{body:sha256}")),),
        public_url=None,
        leeway=JWT_LEEWAY,
        tolerance=300.0,
    )


def _message_signature(values: Mapping[str, Any], where: ConfigPath, public_url: str | None) -> MessageSignature:
    algorithm = values["algorithm"]
    keys = []
    for name in LISTS:
        for written in values.get(name, ()):
            try:
                if algorithm == HMAC:
                    key = secret_message_key(_decode(written, values.get("secret_encoding", "raw")), written.keyid)
                else:
                    key = read_message_key(written.text, algorithm, written.keyid)
                keys.append(KeyEntry(key, written.secret_index, written.until))
            except ValueError as error:
                where.below(name).below(written.position).report(f"{error}, got something else")
    return MessageSignature(
        algorithm=algorithm,
        keys=KeyRing(tuple(keys)),
        key_set=values.get("key_set"),
        covered=values.get("covered"),
        tag=values.get("tag"),
        public_url=public_url or "",
        tolerance=values.get("tolerance", DEFAULT_TOLERANCE),
    )


def _decode(secret: Secret, encoding: str) -> bytes:
    """Decode a secret to the key of an HMAC. Raises ValueError also for an empty one: anyone could sign with it."""
    key = decode_secret(secret.text, encoding)
    if not key:
        raise ValueError(f"expected {SECRET_ENCODINGS[encoding]}")
    return key


def _signature(
    scheme: str,
    values: Mapping[str, Any],
    where: ConfigPath,
    public_url: str | None,
    challenge: re.Pattern[str] | None,
) -> SignatureCheck | None:
    algorithm = _algorithm(scheme, values, where)
    headers: tuple[str, ...] = values.get("header", ())
    id_header: str | None = values.get("id_header")
    if algorithm is None:
        return None
    signed = _bounded(values["signed"].with_id_header(id_header), unit_of(values), where.below("signed"))
    if signed is None:
        return None
    return SignatureCheck(
        headers=headers,
        names=tuple([name.lower().encode() for name in headers]),
        parameter=values.get("query"),
        path=values.get("field", ()),
        form=values.get("form"),
        recipient=_recipient(values.get("recipient")),
        algorithm=algorithm,
        prefix=values.get("prefix", b""),
        separator=values.get("separator"),
        timestamp=_timestamp(values),
        id_header=id_header,
        signed=signed,
        public_url=public_url,
        body_digest=values.get("body_digest"),
        challenge=challenge,
    )


def _bounded(signed: SignedString, unit: str | None, where: ConfigPath) -> SignedString | None:
    """Return a signed string with its guards; None if none would make it the string of one request alone."""
    try:
        return signed.with_guards(unit)
    except AmbiguousError as error:
        where.report(str(error))
        return None


def _algorithm(scheme: str, values: Mapping[str, Any], where: ConfigPath) -> Algorithm | None:
    """Return the algorithm with its keys; None if a value that it needs has a problem."""
    algorithm = values["algorithm"]
    if scheme == "public-key":
        return PublicKeys(
            algorithm=algorithm,
            encoding=values["encoding"],
            keys=_public_keys(values, where),
            key_url=_key_url(values.get("key_url")),
        )
    encode = ENCODINGS[values["encoding"]]
    length = len(encode(bytes(hashlib.new(algorithm, usedforsecurity=False).digest_size)))
    if scheme == "hash":
        secrets = ring(values.get("secrets", ()), secret_bytes)
        return Hash(algorithm=algorithm, encode=encode, secrets=secrets, length=length)
    if "secret_encoding" not in values:
        return None
    return Hmac(algorithm=algorithm, encode=encode, keys=_decoded(values, where), length=length)


def _public_keys(values: Mapping[str, Any], where: ConfigPath) -> KeyRing[PublicKey]:
    keys = []
    for written in values.get("public_keys", ()):
        try:
            keys.append(
                KeyEntry(read_public_key(written.text, values["algorithm"]), written.secret_index, written.until)
            )
        except ValueError as error:
            where.below("public_keys").below(written.position).report(f"{error}, got something else")
    return KeyRing(tuple(keys))


def _key_url(given: Mapping[str, Any] | None) -> KeyUrl | None:
    """Return where the address of a key is; None if there is none, or it has a problem."""
    if given is None or not {"hosts", "path"} <= given.keys():
        return None
    return KeyUrl(
        header=given["header"].lower().encode() if "header" in given else None,
        path=given.get("field", ()),
        locations=KeyLocations(hosts=given["hosts"], path=given["path"]),
    )


def _recipient(given: Mapping[str, Any] | None) -> tuple[FieldPath, str] | None:
    """Return whom a request must be for; None if it is for anybody, or that has a problem."""
    return (given["field"], given["is"]) if given and {"field", "is"} <= given.keys() else None


def _timestamp(values: Mapping[str, Any]) -> Timestamp | None:
    stamp = values.get("timestamp")
    return stamp and Timestamp(
        header=stamp.get("header"),
        name=stamp.get("header", "").lower().encode(),
        prefix=stamp.get("prefix", b""),
        path=stamp.get("field", ()),
        unit=stamp.get("unit", "s"),
        tolerance=values.get("tolerance", DEFAULT_TOLERANCE),
    )


def _published(values: Mapping[str, Any]) -> Timestamp | None:
    """Return where a message of SNS says when it was published; None if it may be of any time."""
    tolerance = values.get("tolerance", math.inf)
    return None if tolerance == math.inf else Timestamp(path=("Timestamp",), unit="iso", tolerance=tolerance)


def _decoded(values: Mapping[str, Any], where: ConfigPath) -> KeyRing[bytes]:
    """Decode the secrets to HMAC keys; an empty key is refused, since anyone could make its signatures."""
    keys = []
    for secret in values["secrets"]:
        try:
            keys.append(KeyEntry(_decode(secret, values["secret_encoding"]), secret.secret_index, secret.until))
        except ValueError as error:
            where.below("secrets").below(secret.position).report(f"{error}, got a string that isn't")
    return KeyRing(tuple(keys))


def ring(secrets: Sequence[Secret], read: Callable[[Secret], K]) -> KeyRing[K]:
    return KeyRing(tuple([KeyEntry(read(each), each.secret_index, each.until) for each in secrets]))


def secret_bytes(secret: Secret) -> bytes:
    return to_bytes(secret.text)
