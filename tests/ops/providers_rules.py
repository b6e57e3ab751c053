"""Rules with a source for each provider that has fixtures, and what signs for it."""

import json
from base64 import b64encode
from collections.abc import Mapping
from functools import cache

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, derive_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from gateway.ops.fixtures import names
from tests.verify.vectors import Vector, vectors


@cache
def vectors_by_scheme() -> Mapping[str, Vector]:
    """Return the first vector of each provider: what a source of it has under `verify`, is in it."""
    return {vector.scheme: vector for vector in reversed(list(vectors()))}


@cache
def private_keys() -> Mapping[str, str]:
    """Return the private keys, in PEM, of the providers of which only the sender can sign."""
    key = derive_private_key(31, SECP256R1())
    return {"sendgrid": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()}


def config_of(provider: str) -> Mapping[str, object]:
    """Return what a source of the provider has under `verify`."""
    if provider == "sendgrid":
        key = derive_private_key(31, SECP256R1()).public_key()
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return {"scheme": provider, "public_keys": [b64encode(der).decode()]}
    return {"scheme": provider, **vectors_by_scheme()[provider].config}


def rules() -> str:
    """Return rules with a source for each provider, named like it, and no routes."""
    sources = {
        provider: {
            "verify": config_of(provider),
            **({"public_url": url} if (url := vectors_by_scheme()[provider].public_url) else {}),
        }
        for provider in names()
    }
    return json.dumps({"version": 1, "sources": sources, "destinations": {}, "routes": []})
