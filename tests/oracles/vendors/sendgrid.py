"""SendGrid's library verifies; python-ecdsa, another implementation than ours, signs."""

import base64
import hashlib
import random

from ecdsa import NIST256p, SigningKey
from ecdsa.util import sigencode_der
from sendgrid.helpers.eventwebhook import EventWebhook

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_time, texts

PACKAGE = "sendgrid (PyPI)"


def sign(draw: random.Random) -> Signed:
    key = SigningKey.from_secret_exponent(draw.randrange(1, NIST256p.order), NIST256p, hashlib.sha256)
    body, now = b"[" + a_body(draw, sg_event_id="e1") + b"]\r\n", a_time(draw)
    stamp = str(int(now))
    signature = key.sign_deterministic(stamp.encode() + body, hashlib.sha256, sigencode_der)
    return Signed(
        config={"public_keys": [base64.b64encode(key.verifying_key.to_der()).decode()]},
        headers={
            "X-Twilio-Email-Event-Webhook-Signature": base64.b64encode(signature).decode(),
            "X-Twilio-Email-Event-Webhook-Timestamp": stamp,
        },
        body=body,
        now=now,
    )


def accepts(request: Request, signed: Signed) -> bool:
    headers = texts(request)
    signature = headers["x-twilio-email-event-webhook-signature"]
    stamp = headers["x-twilio-email-event-webhook-timestamp"]
    try:
        if base64.b64encode(base64.b64decode(signature)).decode() != signature:
            return False  # the library takes other spellings of a signature, too
        webhook = EventWebhook(signed.config["public_keys"][0])
        return bool(webhook.verify_signature(request.body.decode(), signature, stamp))
    except ValueError:
        return False
