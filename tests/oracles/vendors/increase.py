"""Increase's library verifies, by the one of Standard Webhooks.

It decodes signatures, so that it accepts several spellings of one: changes of what it accepts prove nothing.
"""

import random
from datetime import UTC, datetime
from unittest import mock

from increase import Increase
from standardwebhooks import Webhook

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "increase (PyPI)"


def sign(draw: random.Random) -> Signed:
    secret, now, identity = a_secret(draw), float(int(a_time(draw))), f"event_{draw.getrandbits(64):x}"
    body = a_body(draw, id=identity, type="event", category="account.created")
    key, at = secret.encode(), datetime.fromtimestamp(now, UTC)  # a string would be decoded from base64
    headers = {
        "webhook-id": identity,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": Webhook(key).sign(identity, at, body.decode()),
    }
    with mock.patch("standardwebhooks.webhooks.datetime", wraps=datetime) as clock:
        clock.now.return_value = at
        Increase(api_key="key").events.unwrap(body, headers=headers, key=key)
    return Signed(config={"secrets": [secret]}, headers=headers, body=body, now=now)
