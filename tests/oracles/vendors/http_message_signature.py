"""The library http-message-signatures signs and verifies as RFC 9421 and RFC 9530 say."""

import datetime as dt
import hashlib
import random
from functools import cache
from types import SimpleNamespace
from typing import Self
from unittest import mock

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from http_message_signatures import (
    HTTPMessageSignaturesException,
    HTTPMessageSigner,
    HTTPMessageVerifier,
    HTTPSignatureKeyResolver,
    signatures,
)
from http_message_signatures import algorithms as library
from http_sf.compat import Dictionary
from typing_extensions import override

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time, texts

PACKAGE = "http-message-signatures (PyPI)"
URL = "https://hooks.example.com/in/it"
HMAC = "hmac-sha256"
ALGORITHMS = {
    each.algorithm_id: each
    for each in (
        library.HMAC_SHA256,
        library.ED25519,
        library.ECDSA_P256_SHA256,
        library.RSA_PSS_SHA512,
        library.RSA_V1_5_SHA256,
    )
}


@cache
def private_key(algorithm: str) -> object:
    match algorithm:
        case "ed25519":
            return ed25519.Ed25519PrivateKey.generate()
        case "ecdsa-p256-sha256":
            return ec.generate_private_key(ec.SECP256R1())
        case _:
            return rsa.generate_private_key(public_exponent=65537, key_size=2048)


class Resolver(HTTPSignatureKeyResolver):  # type: ignore[misc]
    def __init__(self, private: object, public: object) -> None:
        self._private, self._public = private, public

    def resolve_private_key(self, key_id: str) -> object:  # noqa: ARG002 - the library's
        return self._private

    def resolve_public_key(self, key_id: str) -> object:  # noqa: ARG002 - the library's
        return self._public


def keys(signed: Signed) -> Resolver:
    algorithm = signed.config["algorithm"]
    if algorithm == HMAC:
        secret = signed.config["secrets"][0]["secret"].encode()
        return Resolver(secret, secret)
    private = private_key(algorithm)
    return Resolver(private, private.public_key())  # type: ignore[attr-defined]


def message(request: Request) -> SimpleNamespace:
    query = f"?{request.query}" if request.query else ""
    return SimpleNamespace(method=request.method, url=f"{URL}{query}", headers=texts(request))


def unsigned(draw: random.Random) -> Signed:
    now, body = a_time(draw), a_body(draw)
    return Signed(
        config={"algorithm": HMAC, "secrets": [{"secret": a_secret(draw), "keyid": "k1"}], "tag": "oracle"},
        headers={"Content-Type": "application/json", "X-Event-Id": a_secret(draw, 8)},
        body=body,
        now=now,
        path="/in/it",
        query=draw.choice(["", f"a={draw.randrange(99)}&b=%20x"]),
        public_url=URL,
    )


def sign(draw: random.Random) -> Signed:
    bare = unsigned(draw)
    algorithm = draw.choice(list(ALGORITHMS))
    config = dict(bare.config) | {"algorithm": algorithm}
    if algorithm != HMAC:
        del config["secrets"]
        pem = private_key(algorithm).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
        config["public_keys"] = [{"secret": pem.decode(), "keyid": "k1"}]
    digest = Dictionary()
    for name in draw.sample(["sha-256", "sha-512"], 2):
        digest[name] = hashlib.new(name.replace("-", ""), bare.body).digest()
    headers = {**bare.headers, "Content-Digest": str(digest)}
    target = draw.choice([["@target-uri"], ["@authority", "@path", "@query"]])
    more = draw.sample(["@scheme", "@request-target", "content-type", '"x-event-id";bs', "x-event-id"], 2)
    if bare.query:
        more.append('"@query-param";name="b"')
    covered = ["@method", "content-digest", '"content-digest";key="sha-256"', *target, *more]
    draw.shuffle(covered)
    made = Signed(
        config=config, headers=headers, body=bare.body, now=bare.now, path=bare.path, query=bare.query, public_url=URL
    )
    sent = message(made.request)
    HTTPMessageSigner(signature_algorithm=ALGORITHMS[algorithm], key_resolver=keys(made)).sign(
        sent,
        key_id="k1",
        created=dt.datetime.fromtimestamp(bare.now),  # noqa: DTZ006 - the library takes its timestamp
        nonce=draw.choice([None, a_secret(draw, 8)]),
        label=draw.choice(["sig1", "a", "acme-v1"]),
        tag="oracle",
        include_alg=draw.choice([True, False]),
        covered_component_ids=covered,
        use_existing_digest=True,
    )
    added = {name: sent.headers[name] for name in ("Signature-Input", "Signature")}
    return Signed(
        config=config, headers={**headers, **added}, body=bare.body, now=bare.now, path=bare.path, query=bare.query,
        public_url=URL,
    )  # fmt: skip


def accepts(request: Request, signed: Signed) -> bool:
    verifier = HTTPMessageVerifier(
        signature_algorithm=ALGORITHMS[signed.config["algorithm"]], key_resolver=keys(signed)
    )

    class Frozen(dt.datetime):
        @classmethod
        @override
        def now(cls, tz: dt.tzinfo | None = None) -> Self:
            return cls.fromtimestamp(signed.now, tz)

    with mock.patch.object(signatures.datetime, "datetime", Frozen):
        try:
            verifier.verify(message(request), expect_tag="oracle", body=request.body)
        except HTTPMessageSignaturesException:
            return False
        # It lets bits of base64 pass that don't count, as RFC 8941 would have it; we know one spelling of a signature.
        signature = Dictionary()
        signature.parse(texts(request)["signature"].encode())
        return str(signature) == texts(request)["signature"]
