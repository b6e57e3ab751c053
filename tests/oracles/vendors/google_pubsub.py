"""Google's library signs tokens as its push subscriptions do, and verifies them."""

import random
from functools import cache

import orjson
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import crypt, jwt

from tests.oracles.oracle import Signed, a_body, a_time

PACKAGE = "google-auth (PyPI)"
URL = "https://hooks.example.com/in/google-pubsub"
EMAIL = "push@project-1.iam.gserviceaccount.com"
KEY_SET = "https://www.googleapis.com/oauth2/v3/certs"


@cache
def a_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def sign(draw: random.Random) -> Signed:
    now = a_time(draw)
    pem = a_key().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    signer = crypt.RSASigner.from_string(pem, key_id="key-1")
    claims = {
        "aud": URL, "azp": "1234567890", "email": EMAIL, "email_verified": True, "iss": "https://accounts.google.com",
        "iat": int(now), "exp": int(now) + 3600, "sub": "1234567890",
    }  # fmt: skip
    token = jwt.encode(signer, claims).decode()
    return Signed(
        config={"audience": URL, "email": EMAIL},
        headers={"Authorization": f"Bearer {token}"},
        body=a_body(draw, message={"messageId": str(draw.randrange(10**12)), "data": "aGVsbG8="}),
        now=now,
        documents={KEY_SET: key_set().decode()},
        covers="nothing",
    )


def key_set() -> bytes:
    """Return the set that Google would publish for the key."""
    import jwt as pyjwt  # noqa: PLC0415 - not Google's module of that name

    entry = pyjwt.algorithms.RSAAlgorithm.to_jwk(a_key().public_key(), as_dict=True)
    return orjson.dumps({"keys": [{**entry, "kid": "key-1", "alg": "RS256"}]})
