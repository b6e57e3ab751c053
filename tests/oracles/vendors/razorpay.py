"""Razorpay's library verifies."""

import random

from razorpay.errors import SignatureVerificationError
from razorpay.utility import Utility

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time, texts

PACKAGE = "razorpay (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    secret, body = a_secret(draw), a_body(draw, event="payment.captured")
    headers = {"X-Razorpay-Event-Id": a_secret(draw, 14)}
    return Signed(config={"secrets": [secret]}, headers=headers, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    try:
        signature = texts(request)["x-razorpay-signature"]
        return bool(Utility().verify_webhook_signature(request.body.decode(), signature, signed.config["secrets"][0]))
    except (SignatureVerificationError, UnicodeDecodeError, TypeError):
        return False
