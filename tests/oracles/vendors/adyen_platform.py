"""Adyen's library signs other webhooks as a whole."""

import random

from Adyen.util import generate_payload_sig

from tests.oracles.oracle import Signed, a_body, a_time

PACKAGE = "Adyen (PyPI)"


def sign(draw: random.Random) -> Signed:
    key, body = draw.randbytes(32).hex().upper(), a_body(draw, type="balancePlatform.transfer.created")
    headers = {"HmacSignature": generate_payload_sig(body, key).decode()}
    return Signed(config={"secrets": [key]}, headers=headers, body=body, now=a_time(draw))
