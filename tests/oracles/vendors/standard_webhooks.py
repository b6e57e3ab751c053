"""The library of Standard Webhooks signs messages."""

import random
from base64 import b64encode
from datetime import UTC, datetime

from standardwebhooks import Webhook

from tests.oracles.oracle import Signed, a_body, a_time

PACKAGE = "standardwebhooks (PyPI)"


def sign(draw: random.Random) -> Signed:
    secret, now, body = f"whsec_{b64encode(draw.randbytes(24)).decode()}", a_time(draw), a_body(draw, type="t")
    signature = Webhook(secret).sign("msg_1", datetime.fromtimestamp(now, UTC), body.decode())
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(now)), "webhook-signature": signature}
    return Signed(config={"secrets": [secret]}, headers=headers, body=body, now=now)
