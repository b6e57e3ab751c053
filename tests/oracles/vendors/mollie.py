"""Mollie's library signs and verifies."""

import random

from mollie.utils.webhooks.signature_validator import InvalidSignatureException, SignatureValidator

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "mollie-api-py (PyPI)"


def sign(draw: random.Random) -> Signed:
    signed = unsigned(draw)
    signature = SignatureValidator.create_signature(signed.body.decode(), signed.config["secrets"][0])
    return Signed(
        config=signed.config, headers={"X-Mollie-Signature": f"sha256={signature}"}, body=signed.body, now=signed.now
    )


def unsigned(draw: random.Random) -> Signed:
    body = a_body(draw, id="event_1", type="payment-link.paid")
    return Signed(config={"secrets": [a_secret(draw)]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    headers = [value.decode("latin-1") for value in request.values(b"x-mollie-signature")]
    try:
        body = request.body.decode("utf-8", "replace")
        return bool(SignatureValidator.validate(body, signed.config["secrets"], headers))
    except InvalidSignatureException:
        return False
