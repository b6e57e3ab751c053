"""BigCommerce verifies by the library of Standard Webhooks, as its documentation shows."""

import base64
import random
from datetime import UTC, datetime

from standardwebhooks import Webhook

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "standardwebhooks (PyPI)"


def sign(draw: random.Random) -> Signed:
    secret, now, body = a_secret(draw), a_time(draw), a_body(draw, scope="store/order/created")
    webhook = Webhook(base64.b64encode(secret.encode()).decode())
    headers = {
        "webhook-id": f"{draw.getrandbits(128):x}",
        "webhook-timestamp": str(int(now)),
    }
    signature = webhook.sign(headers["webhook-id"], datetime.fromtimestamp(now, UTC), body.decode())
    return Signed(config={"secrets": [secret]}, headers={**headers, "webhook-signature": signature}, body=body, now=now)
