"""Telnyx' library verifies; PyNaCl, by which it does, signs."""

import base64
import random
from unittest import mock

from nacl.signing import SigningKey
from telnyx.lib import webhook_verification

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_time, texts

PACKAGE = "telnyx (PyPI)"


def sign(draw: random.Random) -> Signed:
    key, now = SigningKey(draw.randbytes(32)), a_time(draw)
    body, stamp = a_body(draw, data={"id": "e1", "event_type": "t"}), str(int(now) - draw.randrange(-300, 300))
    signature = key.sign(f"{stamp}|".encode() + body).signature
    return Signed(
        config={"public_keys": [base64.b64encode(key.verify_key.encode()).decode()]},
        headers={"Telnyx-Signature-Ed25519": base64.b64encode(signature).decode(), "Telnyx-Timestamp": stamp},
        body=body,
        now=now,
    )


def accepts(request: Request, signed: Signed) -> bool:
    with mock.patch.object(webhook_verification.time, "time", return_value=signed.now):
        try:
            webhook_verification.verify_webhook_signature(request.body, texts(request), signed.config["public_keys"][0])
        except (webhook_verification.WebhookVerificationError, UnicodeDecodeError):
            return False
        return True
