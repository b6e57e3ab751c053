"""Adyen's library signs notifications of payments."""

import random

import orjson
from Adyen.util import generate_notification_sig

from tests.oracles.oracle import Signed, a_secret, a_time

PACKAGE = "Adyen (PyPI)"


def sign(draw: random.Random) -> Signed:
    key = draw.randbytes(32).hex().upper()
    item: dict[str, object] = {
        "eventCode": draw.choice(["AUTHORISATION", "CAPTURE"]),
        "success": draw.choice(["true", "false"]),
        "merchantAccountCode": "Geschäft",
        "pspReference": a_secret(draw, 16),
        "amount": {"value": draw.randrange(10**6), "currency": "EUR"},
        **({"originalReference": a_secret(draw, 16)} if draw.random() < 0.5 else {}),
        **({"merchantReference": draw.choice(["", "a:b", "\\", "ä"])} if draw.random() < 0.5 else {}),
    }
    item["additionalData"] = {"hmacSignature": generate_notification_sig(item, key).decode()}
    body = orjson.dumps({"live": "false", "notificationItems": [{"NotificationRequestItem": item}]})
    return Signed(config={"secrets": [key]}, headers={}, body=body, now=a_time(draw), covers="fields")
