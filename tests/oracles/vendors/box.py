"""Box's library computes signatures with each of two keys."""

import random
from datetime import UTC, datetime, timedelta, timezone

from box_sdk_gen.internal.utils import compute_webhook_signature

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "box-sdk-gen (PyPI)"


def sign(draw: random.Random) -> Signed:
    keys, now, body = [a_secret(draw), a_secret(draw)], a_time(draw), a_body(draw, trigger="FILE.UPLOADED")
    zone = draw.choice([UTC, timezone(timedelta(hours=-7))])
    headers = {
        "box-delivery-timestamp": datetime.fromtimestamp(now, zone).isoformat(),
        "box-signature-version": "1",
        "box-signature-algorithm": "HmacSHA256",
    }
    which = draw.randrange(2)
    signature = compute_webhook_signature(body.decode(), headers, keys[which])
    headers[["box-signature-primary", "box-signature-secondary"][which]] = str(signature)
    return Signed(config={"secrets": keys}, headers=headers, body=body, now=now)
