"""Coinbase Commerce's library verifies."""

import random

from coinbase_commerce.error import SignatureVerificationError
from coinbase_commerce.webhook import WebhookSignature

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "coinbase-commerce (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    body = a_body(draw, event={"id": "1", "type": "charge:confirmed"})
    return Signed(config={"secrets": [a_secret(draw)]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    header = request.values(b"x-cc-webhook-signature")[0].decode("latin-1")
    try:
        body = request.body.decode("utf-8", "replace")
        return bool(WebhookSignature.verify_sig_header(body, header, signed.config["secrets"][0]))
    except (SignatureVerificationError, TypeError):  # of a header that isn't ASCII
        return False
