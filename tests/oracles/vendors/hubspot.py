"""HubSpot's library computes signatures."""

import random

from hubspot.utils.signature import Signature

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "hubspot-api-client (PyPI)"


def sign(draw: random.Random) -> Signed:
    secret, now, body = a_secret(draw), a_time(draw), b"[" + a_body(draw, eventId=1) + b"]"
    url, query = f"https://{a_secret(draw, 5).lower()}.example.com/in/it", draw.choice(["", "a=1&b=2"])
    full = f"{url}?{query}" if query else url
    stamp = str(int(now * 1000) + draw.randrange(1000))
    headers = {
        "X-HubSpot-Request-Timestamp": stamp,
        "X-HubSpot-Signature-v3": Signature.get_signature(secret, body.decode(), "v3", full, "POST", stamp),
    }
    config = {"secrets": [secret]}
    return Signed(config=config, headers=headers, body=body, now=now, query=query, public_url=url)
