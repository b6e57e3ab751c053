"""Svix's library signs messages; some of its users have the headers without the brand."""

import random
from base64 import b64encode
from datetime import UTC, datetime

from svix.webhooks import Webhook

from tests.oracles.oracle import Signed, a_body, a_time

PACKAGE = "svix (PyPI)"


def sign(draw: random.Random) -> Signed:
    secret, now, body = f"whsec_{b64encode(draw.randbytes(24)).decode()}", a_time(draw), a_body(draw, type="t")
    signature, brand = Webhook(secret).sign("msg_1", datetime.fromtimestamp(now, UTC), body.decode()), "svix"
    if draw.random() < 0.5:
        brand = "webhook"
    headers = {f"{brand}-id": "msg_1", f"{brand}-timestamp": str(int(now)), f"{brand}-signature": signature}
    return Signed(config={"secrets": [secret]}, headers=headers, body=body, now=now)
