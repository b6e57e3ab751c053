"""Stripe's library signs test events."""

import random

import stripe

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "stripe (PyPI)"


def sign(draw: random.Random) -> Signed:
    secret, now, body = f"whsec_{a_secret(draw)}", a_time(draw), a_body(draw, id="evt_1")
    header = stripe.WebhookSignature.generate_signature_header(body.decode(), secret, int(now))
    return Signed(config={"secrets": [secret]}, headers={"Stripe-Signature": header}, body=body, now=now)
