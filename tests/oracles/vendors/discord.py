"""Discord's library verifies; PyNaCl, by which it does, signs."""

import random

from discord_interactions import verify_key
from nacl.signing import SigningKey

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_time, texts

PACKAGE = "discord-interactions (PyPI)"


def sign(draw: random.Random) -> Signed:
    key, now = SigningKey(draw.randbytes(32)), a_time(draw)
    body, stamp = a_body(draw, version=1, type=1), str(int(now))
    signature = key.sign(stamp.encode() + body).signature.hex()
    return Signed(
        config={"public_keys": [key.verify_key.encode().hex()]},
        headers={"X-Signature-Ed25519": signature, "X-Signature-Timestamp": stamp},
        body=body,
        now=now,
    )


def accepts(request: Request, signed: Signed) -> bool:
    headers = texts(request)
    signature, stamp = headers["x-signature-ed25519"], headers["x-signature-timestamp"]
    return bool(verify_key(request.body, signature, stamp, signed.config["public_keys"][0]))
