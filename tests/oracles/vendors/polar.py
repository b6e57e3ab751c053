"""Polar's library verifies; the one of Standard Webhooks signs as Polar does.

It decodes signatures, so that it accepts several spellings of one: changes of what it accepts prove nothing.
"""

import base64
import random
from datetime import UTC, datetime
from unittest import mock

from polar.webhooks import validate_event
from standardwebhooks import Webhook

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "polar-sdk (PyPI)"


def sign(draw: random.Random) -> Signed:
    now, identity, body = float(int(a_time(draw))), f"{draw.getrandbits(128):x}", a_body(draw, type="order.paid")
    in_base64 = f"whsec_{base64.b64encode(draw.randbytes(24)).decode()}"
    secret = draw.choice([f"polar_whs_{a_secret(draw)}", f"whsec_{a_secret(draw)}", in_base64])
    key = secret if secret == in_base64 else secret.encode()
    headers = {
        "webhook-id": identity,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": Webhook(key).sign(identity, datetime.fromtimestamp(now, UTC), body.decode()),
    }
    with mock.patch("time.time", return_value=now):
        validate_event(body, headers, secret, frozenset(["order.paid"]), lambda event: event)
    return Signed(config={"secrets": [secret]}, headers=headers, body=body, now=now)
