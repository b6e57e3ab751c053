"""Slack's library signs requests."""

import random

from slack_sdk.signature import SignatureVerifier

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "slack-sdk (PyPI)"


def sign(draw: random.Random) -> Signed:
    secret, now, body = a_secret(draw), a_time(draw), a_body(draw, type="event_callback", event_id="Ev1")
    signature = SignatureVerifier(secret).generate_signature(timestamp=str(int(now)), body=body)
    headers = {"X-Slack-Request-Timestamp": str(int(now)), "X-Slack-Signature": str(signature)}
    return Signed(config={"secrets": [secret]}, headers=headers, body=body, now=now)
