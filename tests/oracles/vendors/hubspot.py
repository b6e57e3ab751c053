"""HubSpot's library computes signatures, of an address as its caller gives it: decoded, by HubSpot's documents.

https://developers.hubspot.com/docs/apps/developer-platform/build-apps/authentication/request-validation
"""

import random

from hubspot.utils.signature import Signature

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "hubspot-api-client (PyPI)"
DECODED = {
    "%3A": ":", "%2F": "/", "%3F": "?", "%40": "@", "%21": "!", "%24": "$", "%27": "'", "%28": "(", "%29": ")",
    "%2A": "*", "%2C": ",", "%3B": ";",
}  # fmt: skip


def a_query(draw: random.Random) -> str:
    """Return a query with characters of all kinds: as they are, encoded, and encoded twice."""
    pieces = [*DECODED, *DECODED.values(), "%20", "%26", "%3D", "%25", "%253A", "%3a", "+", "a", "&b="]
    return "a=" + "".join(draw.choices(pieces, k=draw.randrange(12)))


def sign(draw: random.Random) -> Signed:
    secret, now, body = a_secret(draw), a_time(draw), b"[" + a_body(draw, eventId=1) + b"]"
    url, query = f"https://{a_secret(draw, 5).lower()}.example.com/in/it", draw.choice(["", "a=1&b=2", a_query(draw)])
    full = f"{url}?{query}" if query else url
    for encoded, decoded in DECODED.items():
        full = full.replace(encoded, decoded)
    stamp = str(int(now * 1000) + draw.randrange(1000))
    headers = {
        "X-HubSpot-Request-Timestamp": stamp,
        "X-HubSpot-Signature-v3": Signature.get_signature(secret, body.decode(), "v3", full, "POST", stamp),
    }
    config = {"secrets": [secret]}
    return Signed(config=config, headers=headers, body=body, now=now, query=query, public_url=url)
