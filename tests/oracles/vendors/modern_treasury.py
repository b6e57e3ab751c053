"""Modern Treasury's library signs."""

import random

from modern_treasury import ModernTreasury

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "modern-treasury (PyPI)"


def sign(draw: random.Random) -> Signed:
    client = ModernTreasury(api_key="key", organization_id="organization")
    secret, body = a_secret(draw), a_body(draw, event="created")
    signature = client.webhooks.get_signature(body.decode(), key=secret)
    return Signed(config={"secrets": [secret]}, headers={"X-Signature": signature}, body=body, now=a_time(draw))
